"""`transformers` encodes and decodes with an exported folder as SentencePiece does."""

import random

import pytest
import sentencepiece
from transformers import AutoTokenizer

from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.config import ExportConfig, QuantConfig
from bitnet_lit.data.tokenizers import open_tokenizer
from bitnet_lit.data.tokenizers.tokenizer_json import JsonTokenizer
from bitnet_lit.exports.write import export
from tests.support import TINYSTORIES, needs_tinystories, tiny_model

PARTS = [
    "Once",
    " upon a",
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    ".",
    ",",
    "!!",
    "aaaa",
    "1234",
    "é",
    "日本",
    "\u00a0",
    "ﬁ",
    "🙂",
]


def random_texts(count):
    draw = random.Random(0)
    return ["", " ", "a", " a ", *("".join(draw.choices(PARTS, k=draw.randint(1, 12))) for _ in range(count))]


def assert_equal(theirs, ours, texts):
    for text in texts:
        ids = ours.encode(text)
        assert theirs.encode(text) == ids, repr(text)
        assert theirs.encode(text, add_special_tokens=False) == ids[1:], repr(text)
        assert theirs.decode(ids[2:], skip_special_tokens=True) == ours.decode(ids[2:]), repr(text)


@pytest.mark.parametrize("sizes", [{}, {"sub_norm": False}], ids=["bitnet", "llama"])
@pytest.mark.parametrize("format", ["latent", "packed"])
def test_an_export_has_a_tokenizer_for_transformers(tmp_path, tokenizer, format, sizes):
    save_model_folder(tmp_path / "model", tiny_model(**sizes), QuantConfig(), tokenizer)
    export(ExportConfig(checkpoint=str(tmp_path / "model"), format=format, out=str(tmp_path / "out"), verify=False))
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.unk_token_id) == (1, 2, 0)
    assert_equal(theirs, tokenizer, random_texts(200))
    assert open_tokenizer(tmp_path / "out").path.name == "tokenizer.model"  # what this project reads is the original
    assert JsonTokenizer(tmp_path / "out" / "tokenizer.json").encode("Once upon") == tokenizer.encode("Once upon")


@needs_tinystories
def test_a_tokenizer_that_keeps_every_space(tmp_path):
    ours = open_tokenizer(TINYSTORIES / "llama2_tokenizer.model")
    for name, content in ours.transformers_files().items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    assert_equal(AutoTokenizer.from_pretrained(tmp_path), ours, random_texts(200))


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram", "hard_vocab_limit": False},
        {"model_type": "bpe", "normalization_rule_name": "nfkc"},
        {"model_type": "bpe", "normalization_rule_name": "identity", "user_defined_symbols": ["cat"]},
    ],
    ids=str,
)
def test_what_is_no_plain_bpe_gets_no_tokenizer_json(tmp_path, options):
    path = tmp_path / "its.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["once upon a time there was a little cat"] * 50),
            model_writer=file,
            vocab_size=40,
            minloglevel=2,
            **options,
        )
    assert open_tokenizer(path).transformers_files() == {}
