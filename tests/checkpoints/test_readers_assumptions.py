"""What the reader of a format has written in: the vocabulary, the kind of tokenizer, its special tokens."""

import io
import json
import struct
from itertools import islice

import pytest
import sentencepiece

from bitnet_lit.checkpoints.formats.format import target_named
from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.checkpoints.pretrained import from_pretrained
from bitnet_lit.config import EvaluateConfig, PrepareConfig, QuantConfig
from bitnet_lit.data.prepare import prepare
from bitnet_lit.data.sources.demo import demo_stories
from bitnet_lit.data.tokenizers import open_tokenizer
from bitnet_lit.errors import UserError
from bitnet_lit.inference.evaluation import evaluate
from bitnet_lit.inference.language_model import load
from tests.data.tokenizers.test_tokenizer_json import metaspace
from tests.exports.exporting import export_to
from tests.support import tiny_model


def trained(path, **options):
    """A SentencePiece model of 400 pieces."""
    defaults = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "vocab_size": 400}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=islice(demo_stories(1), 200),
        model_writer=model,
        hard_vocab_limit=False,
        minloglevel=2,
        **{**defaults, **options},
    )
    path.write_bytes(model.getvalue())
    return open_tokenizer(path)


KINDS = {
    "bpe": ({}, None, None),
    "unigram": ({"model_type": "unigram"}, "is not a BPE", "is not a BPE"),
    "normalizing": ({"normalization_rule_name": "nmt_nfkc"}, "normalizes", "normalizes"),
    "other ids": ({"unk_id": 3, "bos_id": 0, "eos_id": 1, "pad_id": 2}, None, "BOS is not piece 1"),
    "no bytes": ({"byte_fallback": False}, None, "bytes do not begin at 3"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_that_a_reader_would_take_for_another(tmp_path, kind):
    options, gguf, llama2c = KINDS[kind]
    tokenizer = trained(tmp_path / "tokenizer.model", **options)
    for target, expected in (("gguf_tq2_0", gguf), ("gguf_f16", gguf), ("llama2c", llama2c)):
        problem = target_named(target).tokenizer_problem(tokenizer)
        assert problem is None if expected is None else expected in str(problem), target
    assert not target_named("packed").tokenizer_problem(tokenizer) and not target_named("hf").tokenizer_problem(
        tokenizer
    )


def test_the_export_says_so(tmp_path, capsys):
    tokenizer = trained(tmp_path / "tokenizer.model", model_type="unigram")
    model = tiny_model(sub_norm=False, vocab_size=tokenizer.vocab_size)
    save_model_folder(tmp_path / "model", model, QuantConfig(), tokenizer)
    with pytest.raises(UserError, match=r"is not a BPE.*take format=packed"):
        export_to(tmp_path / "x.gguf", tmp_path / "model", format="gguf", type="f16", embeddings="f16", verify=False)
    assert not (tmp_path / "x.gguf").exists()
    export_to(tmp_path / "c", tmp_path / "model", format="llama2c", verify=False)
    assert "no tokenizer.bin was written (its SentencePiece model is not a BPE)" in capsys.readouterr().err
    assert not (tmp_path / "c" / "tokenizer.bin").exists() and from_pretrained(tmp_path / "c" / "model.bin").tokenizer


def test_a_tokenizer_json_is_refused_or_said(tmp_path, capsys):
    built, names = metaspace()
    built.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = open_tokenizer(tmp_path / "tokenizer.json")
    model = tiny_model(sub_norm=False, vocab_size=tokenizer.vocab_size)
    save_model_folder(tmp_path / "model", model, QuantConfig(), tokenizer)
    with pytest.raises(UserError, match=r"no SentencePiece tokenizer\.model.*take format=packed"):
        export_to(tmp_path / "x.gguf", tmp_path / "model", format="gguf", type="f16", embeddings="f16", verify=False)
    export_to(tmp_path / "c", tmp_path / "model", format="llama2c", verify=False)
    assert "no tokenizer.bin was written (no SentencePiece tokenizer.model)" in capsys.readouterr().err


def test_run_c_finds_a_piece_for_each_row(tmp_path, tokenizer):
    """As its `build_tokenizer` reads the file: a longest piece, then score, length and bytes of vocab_size pieces."""
    rows = tokenizer.vocab_size + 9
    save_model_folder(tmp_path / "model", tiny_model(sub_norm=False, vocab_size=rows), QuantConfig(), tokenizer)
    export_to(tmp_path / "c", tmp_path / "model", format="llama2c", verify=False)
    content = io.BytesIO((tmp_path / "c" / "tokenizer.bin").read_bytes())
    (longest,) = struct.unpack("<i", content.read(4))
    pieces = []
    for _ in range(rows):
        score, length = struct.unpack("<fi", content.read(8))
        assert length <= longest or len(pieces) >= tokenizer.vocab_size
        pieces.append((score, content.read(length)))
    assert content.read() == b"" and len({piece for _, piece in pieces}) == rows
    assert pieces[1][1] == b"\n<s>\n" and pieces[3 + 65][1] == b"<0x41>"


def test_a_tokenizer_of_another_model_is_refused_or_said(tmp_path, tokenizer, recwarn):
    other = trained(tmp_path / "other.model")
    model = tiny_model(vocab_size=tokenizer.vocab_size)
    save_model_folder(tmp_path / "model", model, QuantConfig(), tokenizer)
    for removed in (False, True):
        if removed:
            (tmp_path / "model" / "tokenizer.model").unlink()
        with pytest.raises(UserError, match="not the tokenizer this model was trained with"):
            load(tmp_path / "model", tokenizer=other.path)
    assert load(tmp_path / "model", tokenizer=tokenizer.path).generate("Once", max_new_tokens=2)
    assert not recwarn
    save_model_folder(tmp_path / "plain", tiny_model(vocab_size=2048), QuantConfig(), None)
    with pytest.warns(UserWarning, match="has 512 pieces, the model 2048 rows"):
        load(tmp_path / "plain", tokenizer=tokenizer.path)


def test_data_of_another_tokenizer_is_not_evaluated(tmp_path, tokenizer):
    """Also where the model's own tokenizer file is gone: its config knows the hash."""
    out = str(tmp_path / "data")
    prepare(PrepareConfig(source="demo", out=out, num_stories=60, vocab_size=400, num_workers=1, seed=5))
    save_model_folder(tmp_path / "model", tiny_model(vocab_size=tokenizer.vocab_size), QuantConfig(), tokenizer)
    config = EvaluateConfig(checkpoint=str(tmp_path / "model"), data_dir=out, accelerator="cpu")
    with pytest.raises(UserError, match="not the one that wrote"):
        evaluate(config)
    (tmp_path / "model" / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="was written with another tokenizer"):
        evaluate(config)
