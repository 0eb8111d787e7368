"""Encoding by words gives SentencePiece's ids, on any text and any model."""

import io
import json
import os
import shutil
import tracemalloc

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2

from bitnet_lit.data.sources.demo import demo_stories
from bitnet_lit.data.tokenizers import fast_encoder, native_units
from bitnet_lit.data.tokenizers.fast_encoder import FastEncoder
from bitnet_lit.data.tokenizers.sentencepiece import SentencePieceTokenizer
from bitnet_lit.native.build import NoCompilerError
from tests.support import TINYSTORIES, needs_tinystories

TEXT = st.one_of(
    st.text(),
    st.text(alphabet=" ab"),
    st.text(alphabet=" a\n"),
    st.lists(st.sampled_from([" ", "  ", "\n", "\n\n", " \n", "the", "Then", "a", ".", '"'])).map("".join),
    st.text(alphabet=" ab\n\t\r\0\u2581\u00a0\u200bé😀.,1 2"),
)


def fast(encoder, text):
    return np.frombuffer(encoder.encode(text), np.uint16).tolist()


def check_equal(tokenizer):
    encoder, native = (FastEncoder(tokenizer.processor, np.dtype(np.uint16)) for _ in range(2))
    has_compiler = native.use_native()  # without one, it goes on in Python

    @settings(max_examples=600, deadline=None)
    @given(TEXT)
    def equal(text):
        assert fast(encoder, text) == fast(native, text) == tokenizer.encode(text, bos=False)

    @settings(max_examples=200, deadline=None)
    @given(st.lists(TEXT, max_size=8))
    def equal_together(texts):
        bos = np.array([1], np.uint16).tobytes()
        expected = [id for text in texts for id in (1, *tokenizer.encode(text, bos=False))]
        for each in (encoder, native):
            assert np.frombuffer(each.many(texts, bos), np.uint16).tolist() == expected

    equal()
    equal_together()
    assert has_compiler == any(map(shutil.which, ("c++", "g++", "clang++"))) or os.environ.get("CXX")
    return encoder


def test_equal_for_a_model_with_llama2cs_options(tokenizer):
    assert check_equal(tokenizer).by_words


@needs_tinystories
def test_equal_for_llama2s_model():
    tokenizer = SentencePieceTokenizer(TINYSTORIES / "llama2_tokenizer.model")
    encoder = check_equal(tokenizer)
    assert encoder.by_words
    for entry in json.loads((TINYSTORIES / "data00.json").read_text())[:300]:
        assert fast(encoder, entry["story"]) == tokenizer.encode(entry["story"], bos=False)


@needs_tinystories
def test_a_long_text_is_encoded_in_parts_with_the_ids_of_the_whole(tokenizer, monkeypatch):
    monkeypatch.setattr(fast_encoder, "CHARACTERS_AT_ONCE", 3)
    check_equal(tokenizer)
    check_equal(SentencePieceTokenizer(TINYSTORIES / "llama2_tokenizer.model"))


def test_parts_do_not_fill_the_memory(tokenizer, monkeypatch):
    monkeypatch.setattr(fast_encoder, "CHARACTERS_AT_ONCE", 2**16)
    encoder = FastEncoder(tokenizer.processor, np.dtype(np.uint16))
    text = "the cat sat on the mat " * 60_000 + "end"  # 1.4 MB
    expected = encoder.encode("the cat sat on the mat") * 60_000 + encoder.encode("end")
    tracemalloc.start()
    assert encoder.encode(text) == expected
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * len(text)  # 4 of them; its words all at once would take 50 bytes each, which makes 16


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram"},
        {"split_by_whitespace": False},
        {"normalization_rule_name": "nmt_nfkc"},
        {"byte_fallback": False},
        {"treat_whitespace_as_suffix": True},
        {"user_defined_symbols": ["a b"]},
        {"add_dummy_prefix": False},
    ],
    ids=str,
)
def test_models_that_do_not_allow_it_are_encoded_whole(tmp_path, options):
    model = io.BytesIO()
    defaults = {"model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("\n".join(demo_stories(60)).split("\n")),
        model_writer=model,
        vocab_size=400,
        hard_vocab_limit=False,
        minloglevel=2,
        **{**defaults, **options},
    )
    path = tmp_path / "other.model"
    path.write_bytes(model.getvalue())
    assert not check_equal(SentencePieceTokenizer(path)).by_words


def test_a_model_with_a_line_break_inside_a_piece(tokenizer, tmp_path):
    """Lines are no borders then; words still are."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(tokenizer.path.read_bytes())
    next(piece for piece in model.pieces if piece.piece == "er").piece = "a\n"
    (tmp_path / "t.model").write_bytes(model.SerializeToString())
    assert check_equal(SentencePieceTokenizer(tmp_path / "t.model")).by_words


def test_long_units_do_not_fill_the_memory(tokenizer):
    encoder = FastEncoder(tokenizer.processor, np.dtype(np.uint16))
    texts = [f"{number}" + "\u4f60\u597d" * 500 for number in range(20)]
    assert [fast(encoder, text) for text in texts] == [tokenizer.encode(text, bos=False) for text in texts]
    assert not encoder._cache
    fast(encoder, "a b\nb\nb")
    assert set(encoder._cache) == {"a", "b", "\0\nb"}  # a line break cuts too


def test_much_text_is_encoded_in_cpp_and_the_table_is_bounded(tokenizer, monkeypatch):
    monkeypatch.setattr(fast_encoder, "MAX_CACHED_UNITS", 50)
    in_cpp, in_python = (FastEncoder(tokenizer.processor, np.dtype(np.uint16), native_from=n) for n in (1000, None))
    words = " ".join(f"word{number}\nlonger-than-eight-letters{number}" for number in range(30))
    texts = [*demo_stories(5), words, words, "x" * 70_000 + " y", words[::-1].strip(), "y" * 100 + " " + "é" * 70]
    for text in [*texts, *texts]:
        assert fast(in_cpp, text) == fast(in_python, text) == tokenizer.encode(text, bos=False)
    assert in_cpp._native is not None and in_python._native is None


def test_in_cpp_it_still_knows_the_words_that_it_met_in_python(tokenizer):
    encoder = FastEncoder(tokenizer.processor, np.dtype(np.uint16), native_from=None)
    text = "Once upon a time\nthere was  a word"
    before = encoder.encode(text)
    if not encoder.use_native():
        pytest.skip("there is no compiler")
    assert encoder._native is not None
    encoder._native._encode_unit = None  # which encodes what is not known
    assert encoder.encode(text) == before


def test_without_a_compiler_it_goes_on_in_python(tokenizer, monkeypatch):
    def none(source):
        raise NoCompilerError("none")

    monkeypatch.setattr(native_units.build, "library", none)
    encoder = FastEncoder(tokenizer.processor, np.dtype(np.uint16))
    assert not encoder.use_native() and fast(encoder, "a word") == tokenizer.encode("a word", bos=False)
