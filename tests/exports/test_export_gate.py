"""The gate stops what is not the model: each fault here has once been somebody's converter."""

import copy

import pytest
import torch

from bitnet_lit.checkpoints.formats import gguf_tensors, latent, model_folder, packed
from bitnet_lit.checkpoints.formats.format import Tool, formats
from bitnet_lit.checkpoints.formats.rotary_order import interleave
from bitnet_lit.errors import ParityError
from bitnet_lit.exports import compare
from bitnet_lit.model.tensors import EMBEDDING
from tests.exports.exporting import FORMATS, QUANTS, export_to, files_below, leave_out_other_tools, saved_model
from tests.exports.test_export import needs_llama_cpp

WITH_CODES = ["latent", "latent_bf16", "packed", "tq2_0+q8_0", "tq1_0+q6_k", "f16+f16", "llama2c"]
Q = "model.layers.0.self_attn.q_proj.weight"


def seen_by_the_writer(stored, tensor=None, codes=None):
    """The stored model with other tensors or other codes; what the gate compares with stays the real one."""
    faulty = copy.copy(stored)
    if tensor is not None:
        faulty.tensor = lambda name: tensor(stored, name)
    if codes is not None:
        faulty.codes = lambda name: codes(stored, name)
    elif tensor is not None and not stored.packed:
        rule = copy.copy(stored)
        rule.tensor = faulty.tensor
        faulty.codes = rule.codes
    return faulty


def one_flipped_code(stored):
    def tensor(stored, name):
        weight = stored.tensor(name).clone()
        if name == Q:
            weight[5, 7] = -weight[5, 7] if stored.codes(name)[0][5, 7] else stored.codes(name)[1]
        return weight

    return seen_by_the_writer(stored, tensor)


def absmean_a_second_time(stored):
    """What a converter does that quantizes the dequantized weights again: codes stay, the scale loses the zeros."""

    def shrunk(stored, name):
        codes, scale = stored.codes(name)
        return codes, scale * codes.float().abs().mean()

    def tensor(stored, name):
        if name not in stored.quantized:
            return stored.tensor(name)
        return stored.tensor(name) * stored.codes(name)[0].float().abs().mean()

    return seen_by_the_writer(stored, tensor, shrunk)


def other_rotary_order(stored):
    def tensor(stored, name):
        weight = stored.tensor(name)
        heads = {"q_proj": stored.config.num_attention_heads, "k_proj": stored.config.num_kv_heads}
        kind = name.split(".")[-2]
        return interleave(weight, heads[kind]) if kind in heads else weight

    return seen_by_the_writer(stored, tensor)


def gate_and_up_swapped(stored):
    def tensor(stored, name):
        swapped = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
        kind = name.split(".")[-2]
        return stored.tensor(name.replace(kind, swapped.get(kind, kind)))

    return seen_by_the_writer(stored, tensor)


def embeddings_shifted(stored):
    def tensor(stored, name):
        weight = stored.tensor(name)
        return weight.roll(1, 0) if name == EMBEDDING else weight

    return seen_by_the_writer(stored, tensor)


def latent_weights_as_codes(stored):
    """Each block's largest magnitude becomes the scale, and most codes 0."""
    return seen_by_the_writer(stored, codes=lambda stored, name: (stored.tensor(name), torch.tensor(1.0)))


def a_norm_of_another_layer(stored):
    def tensor(stored, name):
        return stored.tensor(name.replace("layers.0.input", "layers.1.input"))

    return seen_by_the_writer(stored, tensor)


FAULTS = [
    *[(form, one_flipped_code) for form in WITH_CODES],
    *[(form, absmean_a_second_time) for form in WITH_CODES],
    *[(form, other_rotary_order) for form in WITH_CODES],
    *[(form, gate_and_up_swapped) for form in WITH_CODES],
    *[(form, embeddings_shifted) for form in WITH_CODES],
    *[(form, a_norm_of_another_layer) for form in WITH_CODES],
    *[(form, latent_weights_as_codes) for form in ("tq2_0+q8_0", "tq1_0+f16", "f16+f16")],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("gate") / "model"
    return saved_model(folder, QUANTS["b158"], tokenizer, num_hidden_layers=2, sub_norm=False, num_key_value_heads=2)


def inject(monkeypatch, fault, options):
    cls = formats().named(options["format"])
    write = cls.write
    monkeypatch.setattr(cls, "write", lambda self, stored, out: write(self, fault(stored), out))


@pytest.mark.parametrize(("form", "fault"), FAULTS, ids=lambda value: getattr(value, "__name__", value))
def test_a_fault_leaves_nothing_and_keeps_the_old(tmp_path, monkeypatch, model, form, fault):
    leave_out_other_tools(monkeypatch)
    options = FORMATS[form]
    older, fresh = tmp_path / "older" / "out", tmp_path / "fresh" / "out"
    export_to(older, model, **options)
    before = files_below(tmp_path)
    inject(monkeypatch, fault, options)
    for out in (older, fresh):
        with pytest.raises(ParityError, match="not written, because it would differ from the model"):
            export_to(out, model, **options)
        assert files_below(tmp_path) == before
    assert not fresh.exists()


def test_the_harness_itself_changes_nothing(tmp_path, monkeypatch, model):
    """The same path without a fault passes: it is the fault that the gate sees."""
    leave_out_other_tools(monkeypatch)
    for form in WITH_CODES:
        export_to(tmp_path / "plain" / form, model, **FORMATS[form])
        with monkeypatch.context() as patch:
            inject(patch, lambda stored: seen_by_the_writer(stored, lambda s, name: s.tensor(name)), FORMATS[form])
            export_to(tmp_path / "patched" / form, model, **FORMATS[form])
    assert files_below(tmp_path / "plain") == files_below(tmp_path / "patched")


def test_what_reads_as_it_was_written_transformers_still_sees(tmp_path, monkeypatch, model):
    """A folder that says something else to transformers than to us: latent weights that it would run as dense ones."""
    describe = model_folder.describe

    def without_quantization(*arguments):
        described = describe(*arguments)
        del described["quantization_config"]
        return described

    monkeypatch.setattr(latent, "describe", without_quantization)
    with pytest.raises(ParityError, match="transformers: logits differ"):
        export_to(tmp_path / "out", model, format="latent")
    assert files_below(tmp_path) == {}

    def dividing_scales(*arguments):
        described = describe(*arguments)
        described["quantization_config"]["linear_class"] = "bitlinear"
        return described

    monkeypatch.setattr(packed, "describe", dividing_scales)
    with pytest.raises(ParityError, match="transformers: logits differ"):
        export_to(tmp_path / "out", model, format="packed")
    assert files_below(tmp_path) == {}


@pytest.mark.llama_cpp
@needs_llama_cpp
def test_what_reads_as_it_was_written_llama_cpp_still_sees(tmp_path, monkeypatch, model):
    """Rows in Hugging Face's order, in the writer and in our reader alike."""
    for name in ("interleave", "deinterleave"):
        monkeypatch.setattr(gguf_tensors, name, lambda weight, heads: weight)
    with pytest.raises(ParityError, match="llama.cpp: logits differ"):
        export_to(tmp_path / "out.gguf", model, format="gguf")
    assert files_below(tmp_path) == {}


@pytest.mark.parametrize(
    ("error", "said"),
    [(RuntimeError("tensor 'x' has\nwrong shape"), "transformers cannot run it: RuntimeError: tensor 'x' has wrong")],
    ids=["RuntimeError"],
)
def test_a_tool_that_cannot_open_the_artefact(tmp_path, monkeypatch, model, error, said):
    def fails(*_):
        raise error

    monkeypatch.setattr(model_folder, "TRANSFORMERS", Tool("transformers", (), fails))
    with pytest.raises(ParityError, match=said) as raised:
        export_to(tmp_path / "out", model, format="packed")
    assert "\n" not in str(raised.value) and files_below(tmp_path) == {}


def test_a_tool_that_is_half_installed_is_said_to_be_missing(tmp_path, monkeypatch, model):
    def missing(*_):
        raise ModuleNotFoundError("No module named 'diskcache'", name="diskcache")

    monkeypatch.setattr(model_folder, "TRANSFORMERS", Tool("transformers", (), missing))
    report = export_to(tmp_path / "out", model, format="packed")
    assert report["parity"]["transformers"] == "not installed (diskcache)"


@pytest.mark.parametrize("figure", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_do_not_pass(figure):
    ids = torch.randint(0, 9, (1, 8))
    ours = torch.randn(1, 8, 9)
    theirs = ours.clone()
    theirs[0, 3, 2] = figure
    with pytest.raises(ParityError):
        compare._differences("theirs", ours, theirs, ids, 0.1, 0.02)
    assert compare._differences("theirs", ours, ours, ids, 0.1, 0.02)["max_logit_difference"] == 0
