"""SentencePiece models: what is refused, the bytes of text that tokens stand for, and text token by token."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitnet_lit.data.sources.demo import demo_stories
from bitnet_lit.data.tokenizers import open_tokenizer
from bitnet_lit.data.tokenizers.sentencepiece import SentencePieceDecoder
from bitnet_lit.errors import UserError
from tests.support import TINYSTORIES, needs_tinystories

UNICODE = st.text(alphabet=st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" ab\n\u2581é😀")))


def damaged(path, kind):
    whole = path.read_bytes()
    return {
        "empty": b"",
        "garbage": b"garbage" * 99,
        "cut": whole[: len(whole) // 2 + 1],
        "zeros": bytes(1000),
        "flipped": whole.replace("\u2581".encode(), b"\xe2\x96\x01"),  # opens, but its pieces are no UTF-8
    }[kind]


@pytest.mark.parametrize("kind", ["empty", "garbage", "cut", "zeros", "flipped"])
def test_what_is_no_model_is_refused_in_one_line(tokenizer, tmp_path, kind):
    path = tmp_path / "broken.model"
    path.write_bytes(damaged(tokenizer.path, kind))
    with pytest.raises(UserError, match="not a SentencePiece model") as error:
        open_tokenizer(path)
    assert "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        open_tokenizer(tmp_path / "none.model")


def test_half_a_character_pair_is_encoded_as_a_replacement(tokenizer):
    assert tokenizer.encode("a \ud83d b") == tokenizer.encode("a \ufffd b")


def test_text_bytes_counts_the_bytes_of_the_text(tokenizer):
    stories = [*demo_stories(50, seed=9), "naïve café 😀 x", "word"]
    ids = np.array([token for story in stories for token in tokenizer.encode(story)] + [tokenizer.bos_id])
    counted = tokenizer.text_bytes(ids[:-1], ids[1:])
    assert counted == sum(len(story.encode()) for story in stories)


@needs_tinystories
def test_text_bytes_on_real_stories_with_llama2s_tokenizer():
    tokenizer = open_tokenizer(TINYSTORIES / "llama2_tokenizer.model")
    stories = [entry["story"].strip() for entry in json.loads((TINYSTORIES / "data00.json").read_text())[:200]]
    ids = np.array([token for story in stories for token in tokenizer.encode(story)])
    assert tokenizer.text_bytes(ids[:-1], ids[1:]) == sum(len(story.encode()) for story in stories)


def streamed(tokenizer, prompt_ids, ids):
    decoder = SentencePieceDecoder(tokenizer, prompt_ids)
    return "".join(decoder.feed(token) for token in ids) + decoder.flush()


@settings(max_examples=300, deadline=None)
@given(prompt=UNICODE, ids=st.lists(st.integers(0, 511), max_size=40))
def test_streaming_gives_what_decoding_gives(tokenizer_session, prompt, ids):
    """Any token ids, invalid byte sequences among them."""
    tokenizer = tokenizer_session
    prompt_ids = tokenizer.encode(prompt)
    assert tokenizer.decode(prompt_ids + ids) == tokenizer.decode(prompt_ids) + streamed(tokenizer, prompt_ids, ids)


def check_every_start(tokenizer):
    """All short sequences of the tokens that are special at the start of a text or at the end of a prompt.

    Llama 2's model takes away one space there, a model with llama2.c's options all of them; neither one that is a
    byte token.
    """
    names = ["\u2581", "\u2581a", "a", "<0x20>", "<0xC3>", "<0xA9>", "<unk>", "<s>", "</s>"]
    tokens = [tokenizer.processor.piece_to_id(name) for name in names]
    heads = [[], *([token] for token in tokens), [tokens[7], tokens[0]], [tokens[0], tokens[4]]]
    for ids in itertools.chain.from_iterable(itertools.product(tokens, repeat=length) for length in (1, 2, 3)):
        for head in heads:
            before, whole = tokenizer.decode(head), tokenizer.decode([*head, *ids])
            if whole.startswith(before):  # not where a character of the prompt is completed
                assert streamed(tokenizer, head, ids) == whole[len(before) :], (head, ids)


def test_streaming_at_the_start_of_a_text(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a b")) == "a b"
    check_every_start(tokenizer)


@needs_tinystories
def test_streaming_at_the_start_of_a_text_with_llama2s_model():
    check_every_start(open_tokenizer(TINYSTORIES / "llama2_tokenizer.model"))


def test_no_piece_ever_breaks_a_character(tokenizer):
    ids = tokenizer.encode("a 😀 b", bos=False)
    decoder = SentencePieceDecoder(tokenizer)
    pieces = [decoder.feed(token) for token in ids]
    assert "".join(pieces) == "a 😀 b"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert "😀" in pieces


def test_a_byte_piece_that_names_no_byte_is_refused(tokenizer, tmp_path):
    damaged = tokenizer.path.read_bytes().replace(b"<0x41>", b"<0xZZ>")
    (tmp_path / "tokenizer.model").write_bytes(damaged)
    with pytest.raises(UserError, match="not a SentencePiece model"):
        open_tokenizer(tmp_path / "tokenizer.model")


def test_every_beginning_of_a_file_is_refused_or_opens_with_the_pieces_that_it_holds(tokenizer, tmp_path):
    content = tokenizer.path.read_bytes()
    pieces = [tokenizer.piece_bytes(token) for token in range(tokenizer.vocab_size)]
    refused = 0
    for size in range(0, len(content), len(content) // 60):
        (tmp_path / "tokenizer.model").write_bytes(content[:size])
        try:
            opened = open_tokenizer(tmp_path / "tokenizer.model")
        except UserError as error:
            refused += 1
            assert "\n" not in str(error)
        else:  # cut behind a piece: a smaller vocabulary, whose sha256 is another one
            assert [opened.piece_bytes(token) for token in range(opened.vocab_size)] == pieces[: opened.vocab_size]
            assert opened.decode(opened.encode("Once upon a time")) == "Once upon a time"
    assert refused > 50


def test_a_copy_is_the_file_that_was_opened(tokenizer, tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    opened = open_tokenizer(tmp_path / "a" / "tokenizer.model")
    opened.path.write_bytes(b"another")
    opened.copy_to(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == tokenizer.path.read_bytes()


@pytest.fixture(scope="module")
def tokenizer_session(shards):
    return open_tokenizer(shards / "tokenizer.model")


def test_the_decoder_of_a_long_prompt_looks_at_its_first_text_only(tokenizer):
    """A prompt may have a million tokens, and none but the first with text says anything about what follows."""

    class Counted:
        read = 0

        def __iter__(self):
            for token in [tokenizer.bos_id, *tokenizer.encode("Lily", bos=False) * 1000]:
                self.read += 1
                yield token

    ids = Counted()
    decoder = tokenizer.stream_decoder(ids)
    assert ids.read < 10
    assert decoder.feed(tokenizer.encode("went", bos=False)[0]).startswith(" ")
