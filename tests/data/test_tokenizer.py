"""Tokenizers: errors, bytes of text, streaming."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_lit.data.demo import demo_stories
from bitnet_lit.data.tokenizer import StreamDecoder, Tokenizer, train_tokenizer
from bitnet_lit.errors import UserError
from tests.support import TINYSTORIES, needs_tinystories

UNICODE = st.text(alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" ab\n\u2581é😀")))


def damaged(path, kind):
    whole = path.read_bytes()
    return {"empty": b"", "garbage": b"garbage" * 99, "cut": whole[: len(whole) // 2 + 1], "zeros": bytes(1000)}[kind]


@pytest.mark.parametrize("kind", ["empty", "garbage", "cut", "zeros"])
def test_what_is_no_model_is_refused_in_one_line(tokenizer, tmp_path, kind):
    path = tmp_path / "broken.model"
    path.write_bytes(damaged(tokenizer.path, kind))
    with pytest.raises(UserError, match="not a SentencePiece model") as error:
        Tokenizer(path)
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        Tokenizer(tmp_path / "none.model")


def test_vocabulary_too_large_says_what_is_reachable(tmp_path):
    with pytest.raises(
        UserError, match=r"vocab_size=30000 is too large for this text: it supports at most (\d+)"
    ) as error:
        train_tokenizer(demo_stories(50), 30000, tmp_path / "t.model")
    reachable = int(str(error.value).rsplit(" ", 1)[1])
    assert train_tokenizer(demo_stories(50), reachable, tmp_path / "t.model").vocab_size == reachable
    assert [path.name for path in tmp_path.iterdir()] == ["t.model"]


def test_vocabulary_too_small_says_what_is_needed(tmp_path):
    with pytest.raises(UserError, match="vocab_size=100 is too small"):
        train_tokenizer(demo_stories(50), 100, tmp_path / "t.model")
    assert not list(tmp_path.iterdir())


def test_text_bytes_counts_the_bytes_of_the_text(tokenizer):
    stories = [*demo_stories(50, seed=9), "naïve café 😀 x", "word"]
    ids = np.array([token for story in stories for token in tokenizer.encode(story)] + [tokenizer.bos_id])
    counted = tokenizer.text_bytes(ids[:-1], ids[1:])
    assert counted == sum(len(story.encode()) for story in stories)


@needs_tinystories
def test_text_bytes_on_real_stories_with_llama2s_tokenizer():
    tokenizer = Tokenizer(TINYSTORIES / "llama2_tokenizer.model")
    stories = [entry["story"].strip() for entry in json.loads((TINYSTORIES / "data00.json").read_text())[:200]]
    ids = np.array([token for story in stories for token in tokenizer.encode(story)])
    assert tokenizer.text_bytes(ids[:-1], ids[1:]) == sum(len(story.encode()) for story in stories)


@settings(max_examples=300, deadline=None)
@given(prompt=UNICODE, ids=st.lists(st.integers(0, 511), max_size=40))
def test_streaming_gives_what_decoding_gives(tokenizer_session, prompt, ids):
    """Any token ids, invalid byte sequences among them."""
    tokenizer = tokenizer_session
    # The unknown token has a surface of its own and never comes from a byte-fallback model.
    ids = [token for token in ids if token != tokenizer.processor.unk_id()]
    prompt_ids = tokenizer.encode(prompt)
    decoder = StreamDecoder(tokenizer, prompt_ids)
    streamed = "".join(decoder.feed(token) for token in ids) + decoder.flush()
    assert tokenizer.decode(prompt_ids + ids) == tokenizer.decode(prompt_ids) + streamed


def test_no_piece_ever_breaks_a_character(tokenizer):
    ids = tokenizer.encode("a 😀 b", bos=False)
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.feed(token) for token in ids]
    assert "".join(pieces) == "a 😀 b"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "😀" in pieces


@pytest.fixture(scope="module")
def tokenizer_session(shards):
    return Tokenizer(shards / "tokenizer.model")
