"""The tokenizer interface, as a class of a user's own meets it."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_lit import load
from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.config import QuantConfig
from bitnet_lit.data.tokenizers import Tokenizer, open_tokenizer, tokenizer
from bitnet_lit.errors import UserError
from tests.support import tiny_model


@pytest.fixture(scope="module")
def byte_tokenizer():
    """The example of the interface's docstring."""
    source = textwrap.dedent(tokenizer.__doc__.split("for example:\n")[1].split("A token stands for")[0])
    names = {"Tokenizer": Tokenizer}
    exec(source, names)
    return names["ByteTokenizer"]()


@given(prompt=st.text(), text=st.text())
def test_three_methods_give_streams_bytes_of_text_and_shards(byte_tokenizer, prompt, text):
    ids = byte_tokenizer.encode(text)
    assert byte_tokenizer.decode(ids) == text
    decoder = byte_tokenizer.stream_decoder(byte_tokenizer.encode(prompt))
    assert "".join(map(decoder.feed, ids)) + decoder.flush() == text
    encoded = np.frombuffer(byte_tokenizer.shard_encoder(np.dtype(np.uint16))(text), np.uint16)
    assert encoded.tolist() == ids[1:]
    inputs, targets = np.array(ids[:-1], np.int64), np.array(ids[1:], np.int64)
    # A space that begins a document is SentencePiece's, and counts nothing.
    assert byte_tokenizer.text_bytes(inputs, targets) == len(text.encode()) - text.startswith(" ")


def test_what_a_tokenizer_without_a_file_says_of_itself(byte_tokenizer, tmp_path):
    assert byte_tokenizer.path is None and byte_tokenizer.sentencepiece_vocabulary() is None
    byte_tokenizer.copy_to(tmp_path)
    assert not list(tmp_path.iterdir())

    class Other(type(byte_tokenizer)):
        def piece_bytes(self, token):
            return super().piece_bytes(token).upper()

    same, other = type(byte_tokenizer)(), Other()
    assert len(same.sha256) == 64 and same.sha256 == byte_tokenizer.sha256 != other.sha256


def test_a_model_of_such_a_tokenizer_is_saved_and_generates_when_it_is_given_again(byte_tokenizer, tmp_path):
    save_model_folder(tmp_path / "model", tiny_model(vocab_size=257), QuantConfig(), byte_tokenizer)
    with pytest.raises(UserError, match="give tokenizer="):
        load(tmp_path / "model").generate("a")
    model = load(tmp_path / "model", tokenizer=byte_tokenizer)
    text = model.generate("a", max_new_tokens=20, seed=0)
    assert len(text) > 1 and text == "a" + "".join(model.stream("a", max_new_tokens=20, seed=0))

    class Other(type(byte_tokenizer)):
        def piece_bytes(self, token):
            return super().piece_bytes(token).upper()

    with pytest.raises(UserError, match="Other: not the tokenizer this model was trained with"):
        load(tmp_path / "model", tokenizer=Other())


def test_a_folder_is_opened_by_the_tokenizer_in_it(shards, tmp_path):
    (tmp_path / "empty").mkdir()
    assert open_tokenizer(shards).path == shards / "tokenizer.model"
    with pytest.raises(UserError, match=r"empty: no tokenizer\.model or tokenizer\.json in this folder: give the"):
        open_tokenizer(tmp_path / "empty")


def test_reading_text_and_shards_needs_no_framework():
    code = "import sys, bitnet_lit.data.tokenizers, bitnet_lit.data.shards, bitnet_lit.data.order; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "lightning", "hydra", "wandb", "google.protobuf"} & set(loaded)
