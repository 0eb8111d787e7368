"""Training a SentencePiece model: the sizes that a text supports, long lines, and text that cannot be read."""

import os
import re

import pytest

from bitnet_lit.data.sources.demo import demo_stories
from bitnet_lit.data.tokenizers.train_sentencepiece import _training_sentences, train_tokenizer
from bitnet_lit.errors import UserError


def test_vocabulary_too_large_says_what_is_reachable(tmp_path):
    with pytest.raises(
        UserError, match=r"vocab_size=30000 is too large for this text: it supports at most (\d+)"
    ) as error:
        train_tokenizer(demo_stories(50), 30000, tmp_path / "t.model")
    reachable = int(re.search(r": give vocab_size=(\d+), or more text$", str(error.value))[1])
    assert train_tokenizer(demo_stories(50), reachable, tmp_path / "t.model").vocab_size == reachable
    assert [path.name for path in tmp_path.iterdir()] == ["t.model"]


def test_vocabulary_too_small_says_what_is_needed(tmp_path):
    for size, needed in ((1, "259"), (100, r"3\d\d"), (260, r"3\d\d")):
        with pytest.raises(UserError, match=rf"vocab_size={size} is too small.* take {needed}"):
            train_tokenizer(demo_stories(50), size, tmp_path / "t.model")
    assert not list(tmp_path.iterdir())


def test_the_file_does_not_depend_on_the_machine(tmp_path, monkeypatch):
    """Its hash identifies the tokenizer: a run and shards of another machine must agree on it."""
    hashes = set()
    for cores in (1, 3):
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        hashes.add(train_tokenizer(demo_stories(50), 400, tmp_path / "t.model").sha256)
    assert len(hashes) == 1


def test_an_unknown_token_is_decoded_as_a_character_and_not_as_an_escape_sequence(tmp_path):
    """An untrained model draws <unk> too."""
    assert train_tokenizer(demo_stories(50), 400, tmp_path / "t.model").decode([0]) == " \u2047 "


def test_no_text_to_train_on(tmp_path):
    with pytest.raises(UserError, match="no text to train a tokenizer on"):
        train_tokenizer(["", " \n\n "], 400, tmp_path / "t.model")


def test_text_in_one_long_line_is_trained_on(tmp_path):
    """SentencePiece itself leaves out lines of more than 4192 bytes."""
    spaced, unspaced = " ".join(demo_stories(200)).replace("\n", " "), "\u4f60\u597d" * 5000
    tokenizer = train_tokenizer([spaced, unspaced], 500, tmp_path / "t.model")
    assert len(tokenizer.encode("Once upon a time", bos=False)) == 4
    assert len(tokenizer.encode("\u4f60\u597d", bos=False)) <= 3  # not bytes


@pytest.mark.parametrize("failure", [UserError("a.txt: bad"), OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_text_that_fails_while_a_tokenizer_is_trained_is_told_as_it_is(tmp_path, failure):
    def texts():
        yield "some text"
        raise failure

    with pytest.raises(type(failure)) as error:
        train_tokenizer(texts(), 400, tmp_path / "tokenizer.model")
    assert error.value is failure and not list(tmp_path.iterdir())


@pytest.mark.timeout(60)  # it takes a fraction of a second; cutting in quadratic time would take hours
def test_a_line_of_many_megabytes_is_cut_in_linear_time():
    line = "a word and another " * 400_000  # 8 MB
    parts = list(_training_sentences([line + "é" * 2000]))
    assert "".join(parts) == line + "é" * 2000
    assert max(len(part.encode()) for part in parts) <= 4192
