"""What was exported is a model again: the same bytes a second time, the same codes and scales by another way."""

import pytest
import torch

from bitnet_lit.checkpoints.formats.llama2c import open_bin
from bitnet_lit.checkpoints.locate import open_stored
from bitnet_lit.checkpoints.pretrained import from_pretrained
from bitnet_lit.exports.compare import layerwise_logits
from tests.exports.exporting import (
    FORMATS,
    QUANTS,
    export_to,
    files_below,
    leave_out_other_tools,
    random_model,
    saved_model,
)

LLAMA = {"sub_norm": False, "num_key_value_heads": 2, "intermediate_size": 512, "tie_word_embeddings": False}


@pytest.fixture(autouse=True)
def own_reading(monkeypatch):
    leave_out_other_tools(monkeypatch)


def same_codes(one, other):
    assert one.quantized == other.quantized and one.quantized
    for name in one.quantized:
        (codes, scale), (other_codes, other_scale) = one.codes(name), other.codes(name)
        assert torch.equal(codes, other_codes) and torch.equal(scale, other_scale), name


@pytest.mark.parametrize("options", FORMATS)
def test_exporting_twice_gives_the_same_bytes(tmp_path, tokenizer, options):
    folder = saved_model(tmp_path / "model", QUANTS["b158"], tokenizer, **LLAMA)
    for attempt in ("a", "b"):
        export_to(tmp_path / attempt / "out", folder, **FORMATS[options])
    first, second = files_below(tmp_path / "a"), files_below(tmp_path / "b")
    assert first == second and first


@pytest.mark.parametrize("quant", ["b158", "absmedian", "b1"])
@pytest.mark.parametrize("sizes", [LLAMA, {"num_key_value_heads": 1}], ids=["llama", "bitnet"])
def test_packed_folders_are_as_good_as_what_they_were_made_from(tmp_path, tokenizer, quant, sizes):
    latent = saved_model(tmp_path / "model", QUANTS[quant], tokenizer, **sizes)
    packed = tmp_path / "packed" / "model"
    export_to(packed, latent, format="packed")
    same_codes(open_stored(latent), open_stored(packed))

    export_to(tmp_path / "again" / "model", packed, format="packed")
    assert files_below(tmp_path / "again") == files_below(tmp_path / "packed")

    for checkpoint, name in ((latent, "of_latent"), (packed, "of_packed")):
        export_to(tmp_path / name, checkpoint, format="gguf", embeddings="q6_k")
    assert (tmp_path / "of_latent").read_bytes() == (tmp_path / "of_packed").read_bytes()

    if sizes is LLAMA:
        for checkpoint, name in ((latent, "c_of_latent"), (packed, "c_of_packed")):
            export_to(tmp_path / name, checkpoint, format="llama2c")
        assert files_below(tmp_path / "c_of_latent") == files_below(tmp_path / "c_of_packed")


def test_a_latent_export_trains_and_exports_as_its_source(tmp_path, tokenizer):
    folder = saved_model(tmp_path / "model", QUANTS["b158"], tokenizer, **LLAMA)
    export_to(tmp_path / "latent" / "model", folder, format="latent")
    assert (tmp_path / "latent/model/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert (tmp_path / "latent/model/config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert not open_stored(tmp_path / "latent/model").packed

    export_to(tmp_path / "bf16", folder, format="latent", dtype="bfloat16")
    rounded, exact = open_stored(tmp_path / "bf16"), open_stored(folder)
    for name in exact.quantized:
        assert torch.equal(rounded.codes(name)[0], exact.codes(name)[0]), name
    export_to(tmp_path / "bf16_packed", tmp_path / "bf16", format="packed")
    same_codes(rounded, open_stored(tmp_path / "bf16_packed"))


@pytest.mark.parametrize("quant", ["none", "b158", "absmedian", "b1"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_llama2cs_file_gives_the_logits_of_its_source(tmp_path, tokenizer, quant, tied):
    sizes = {**LLAMA, "tie_word_embeddings": tied}
    folder = saved_model(tmp_path / "model", QUANTS[quant], tokenizer, **sizes)
    export_to(tmp_path / "c", folder, format="llama2c")
    stored, there = open_stored(folder), open_bin(tmp_path / "c" / "model.bin")
    assert there.tokenizer.sha256 == tokenizer.sha256
    ids = torch.randint(0, 512, (2, 40))
    # No tolerance: floats are stored as they are, and the rows of q and k come back to their places.
    assert torch.equal(layerwise_logits(there, ids), layerwise_logits(stored, ids, float_activations=True))
    if quant == "none":
        with torch.no_grad():
            expected = random_model(QUANTS[quant], **sizes)(ids)
            assert torch.equal(from_pretrained(tmp_path / "c" / "model.bin").model(ids), expected)
    # A model of llama2.c is a model: it goes on to be a folder, and comes back to the same file.
    export_to(tmp_path / "folder", tmp_path / "c" / "model.bin", format="latent")
    export_to(tmp_path / "c2", tmp_path / "folder", format="llama2c")
    assert (tmp_path / "c2" / "model.bin").read_bytes() == (tmp_path / "c" / "model.bin").read_bytes()
    assert (tmp_path / "c2" / "tokenizer.bin").read_bytes() == (tmp_path / "c" / "tokenizer.bin").read_bytes()


def test_layer_by_layer_is_the_whole_network(tmp_path, tokenizer):
    """What the gate computes is what a user of the folder gets."""
    for quant in QUANTS:
        folder = saved_model(tmp_path / quant, QUANTS[quant], tokenizer, num_hidden_layers=2)
        ids = torch.randint(0, 512, (1, 50))
        with torch.no_grad():
            expected = from_pretrained(folder).model(ids)
        # The same operations on the same numbers; only the head's product is written in another way.
        torch.testing.assert_close(layerwise_logits(open_stored(folder), ids), expected, rtol=1e-5, atol=1e-5)
