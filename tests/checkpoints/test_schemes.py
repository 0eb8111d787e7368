"""What each format and engine makes of a scheme: it holds it exactly, or says what it cannot hold."""

import json
import re

import numpy as np
import pytest
import torch

import bitnet_lit
from bitnet_lit.checkpoints.formats.format import all_targets
from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.checkpoints.locate import open_stored
from bitnet_lit.checkpoints.pretrained import from_pretrained
from bitnet_lit.config import MuonConfig, QuantConfig
from bitnet_lit.errors import UserError
from bitnet_lit.exports.targets import problems
from bitnet_lit.inference.engines.cpu.supported_models import why_unsupported
from bitnet_lit.inference.engines.cpu.weights import Arena, Weights, pack
from bitnet_lit.model.accounting import account
from bitnet_lit.quant import PackedBitLinear, packing, register
from bitnet_lit.training.optimizers import build_optimizer
from tests.exports.exporting import export_to, leave_out_other_tools, random_model, saved_model
from tests.inference.test_cpu_engine import needs_compiler
from tests.quant.toy_schemes import Centered, Gained, Quinary, Threshold
from tests.support import tiny_config

SCHEMES = {
    "row": QuantConfig(name="b158_row"),
    "group 64": QuantConfig(name="b158_group", settings={"group_size": 64}),
    "group 256": QuantConfig(name="b158_group", settings={"group_size": 256}),
    "row, median, 4 bits": QuantConfig(name="b158_row", weight_scale="absmedian", activation_bits=4),
    "sherry": QuantConfig(name="sherry"),
    "learned": QuantConfig(name="b158_learned"),
    "learned row": QuantConfig(name="b158_learned", settings={"per_row": True}),
    "tequila": QuantConfig(name="tequila", settings={"bias_factor": 0.1}),
    "bitnet_v2": QuantConfig(name="bitnet_v2", activation_bits=4),
}
TOYS = {cls.name: cls for cls in (Threshold, Quinary, Centered, Gained)}
EIGHT_BITS = r"llama.cpp by AbsMax\(bits=8\): take format=packed or latent, or train with quant.activation_bits=8"
OWN_LAYER = "its layer computes more than codes and scales"
NOT_CODES = dict.fromkeys(["centered", "gained", "tequila", "bitnet_v2"], OWN_LAYER)
# Target: what it says of the schemes it does not hold.
REFUSED = {
    "latent": dict.fromkeys([*SCHEMES, *TOYS], "transformers knows absmean with one scale"),
    "packed": {
        **dict.fromkeys(
            ["row", "group 64", "group 256", "row, median, 4 bits", "quinary", "learned row"],
            "transformers knows ternary codes with one scale",
        ),
        **NOT_CODES,
    },
    "gguf_tq2_0": {
        "group 64": r"has one: take type=f16 \(target gguf_f16\), or train with quant=b158_row or groups of a multiple",
        "quinary": "its codes are -2, -1, 0, 1, 2",
        "row, median, 4 bits": EIGHT_BITS,
        **NOT_CODES,
    },
    "gguf_f16": {
        "quinary": "its codes are -2, -1, 0, 1, 2",
        "row, median, 4 bits": EIGHT_BITS,
        **NOT_CODES,
    },
    "llama2c": NOT_CODES,
}
REFUSED["gguf_tq1_0"] = REFUSED["gguf_tq2_0"]
FORMATS = {
    "latent": {"format": "latent"},
    "latent_bf16": {"format": "latent", "dtype": "bfloat16"},
    "packed": {"format": "packed"},
    "tq2_0": {"format": "gguf", "type": "tq2_0"},
    "tq1_0": {"format": "gguf", "type": "tq1_0"},
    "f16": {"format": "gguf", "type": "f16"},
    "llama2c": {"format": "llama2c"},
}


@pytest.fixture(autouse=True)
def toys_are_known():
    for cls in TOYS.values():
        register(cls)


def quant_of(name):
    return SCHEMES.get(name) or QuantConfig(name=name)


@pytest.mark.parametrize("name", [*SCHEMES, *TOYS])
@pytest.mark.parametrize("target", all_targets(), ids=lambda target: target.target)
def test_every_target_holds_a_scheme_or_says_why_not(target, name):
    config = tiny_config(hidden_size=256, intermediate_size=512, sub_norm=False)
    found = "; ".join(problems(target, config, quant_of(name)))
    expected = REFUSED[target.target].get(name, "")
    assert re.search(expected, found) and bool(expected) == bool(found)


@pytest.mark.parametrize("name", [*SCHEMES, *TOYS])
def test_every_format_keeps_what_it_holds(tmp_path, tokenizer, monkeypatch, name):
    """The export itself compares codes and scales; here what comes out runs as the model that went in."""
    leave_out_other_tools(monkeypatch)
    folder = saved_model(tmp_path / "model", quant_of(name), tokenizer, sub_norm=False)
    scheme = open_stored(folder).quant.scheme
    ids = torch.randint(0, 512, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = from_pretrained(folder).model(ids)
    for form, options in FORMATS.items():
        target = {"gguf": f"gguf_{options.get('type')}"}.get(options["format"], options["format"])
        refusal = REFUSED.get(target, {}).get(name)
        is_folder = form in ("latent", "latent_bf16", "packed")  # ours in any case; transformers is told by config.json
        if refusal and (not is_folder or refusal == OWN_LAYER):
            with pytest.raises(UserError, match=refusal):
                export_to(tmp_path / "out" / form, folder, **options)
            assert not (tmp_path / "out" / form).exists()
            continue
        report = export_to(tmp_path / "out" / form, folder, **options)
        if form in ("latent", "packed"):
            described = json.loads((tmp_path / "out" / form / "config.json").read_text())
            # Ternary codes with one scale: it is given both.
            in_transformers = form == "packed" and name in ("threshold", "sherry", "learned")
            assert described["model_type"] == ("llama" if in_transformers else "bitnet_lit")
            assert report["runs_in_transformers"] == in_transformers
            opened = open_stored(tmp_path / "out" / form)
            gains = [tensor for tensor in opened.tensors if tensor.endswith(".scale_gain")]
            assert bool(gains) == ("learned" in name and form == "latent")  # packed scales hold them
            assert opened.quant.scheme == scheme and opened.packed == (form == "packed")
            with torch.no_grad():  # the same integers, the same scales, the same products
                assert torch.equal(from_pretrained(tmp_path / "out" / form).model(ids), logits)


@pytest.mark.parametrize("name", ["threshold", "quinary", "row"])
def test_packed_codes_go_from_the_file_to_the_layer_as_they_are(tmp_path, monkeypatch, name):
    """No unpacking to check them, and no packing of what lies there packed."""
    folder = saved_model(tmp_path / "model", quant_of(name), None)
    export_to(tmp_path / "packed", folder, format="packed")
    expected = open_stored(folder)
    unpacked = []
    unpack = packing.unpack_codes
    monkeypatch.setattr(packing, "pack_codes", lambda codes: pytest.fail("packed again"))
    monkeypatch.setattr(packing, "unpack_codes", lambda codes: unpacked.append(codes) or unpack(codes))
    opened = from_pretrained(tmp_path / "packed")
    layers = {n: layer for n, layer in opened.model.named_modules() if isinstance(layer, PackedBitLinear)}
    assert len(unpacked) == (0 if name == "quinary" else len(layers))  # once each, by the layer that multiplies them
    for layer_name, layer in layers.items():
        codes, scale = expected.codes(f"{layer_name}.weight")
        stored = codes if name == "quinary" else unpack(layer.weight)
        assert torch.equal(stored, codes) and torch.equal(layer.weight_scale.reshape(scale.shape), scale)


def test_a_pair_of_bits_that_is_no_code_is_refused(tmp_path):
    export_to(tmp_path / "packed", saved_model(tmp_path / "model", quant_of("threshold"), None), format="packed")
    stored = open_stored(tmp_path / "packed")
    name = min(stored.quantized)
    read = stored.reader.read
    for value in range(256):
        packed = np.zeros((64, 256), np.uint8)
        packed[3, 5] = value
        stored.reader.read = lambda key, packed=packed: packed if key == name else read(key)
        if any(value >> shift & 3 == 3 for shift in (0, 2, 4, 6)):
            for method in (stored.codes, stored.packed_codes):
                with pytest.raises(UserError, match=r"holds codes that are not in -1\.\.1"):
                    method(name)
        else:
            assert torch.equal(packing.unpack_codes(stored.packed_codes(name)[0]), stored.codes(name)[0])


def test_packed_codes_that_no_level_has_are_refused(tmp_path):
    folder = saved_model(tmp_path / "model", quant_of("quinary"), None)
    export_to(tmp_path / "packed", folder, format="packed")
    stored = open_stored(tmp_path / "packed")
    name = min(stored.quantized)
    codes = stored.reader.read(name)
    assert codes.dtype == np.int8 and codes.min() == -2 and codes.max() == 2
    read = stored.reader.read
    for wrong in (np.full_like(codes, 3), np.full(codes.shape, 0.5, np.float32)):  # others store codes as bfloat16
        stored.reader.read = lambda key, wrong=wrong: wrong if key == name else read(key)
        with pytest.raises(UserError, match=r"holds codes that are not in -2\.\.2"):
            stored.codes(name)


def test_a_damaged_scale_of_one_group_is_named(tmp_path):
    folder = saved_model(tmp_path / "model", quant_of("group 64"), None)
    export_to(tmp_path / "packed", folder, format="packed")
    stored = open_stored(tmp_path / "packed")
    name = min(stored.quantized)
    scales = stored.reader.read(f"{name}_scale")
    assert scales.shape == (256, 4) and np.array_equal(stored.scale(name), scales)
    read = stored.reader.read
    scales[3, 2] = np.nan
    stored.reader.read = lambda key: scales if key == f"{name}_scale" else read(key)
    with pytest.raises(UserError, match=r"_scale holds nan"):
        stored.scale(name)


def test_an_unknown_scheme_of_a_folder_is_refused_and_not_imported(tmp_path):
    folder = saved_model(tmp_path / "model", quant_of("row"), None)
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    raw["bitnet_lit"]["quant"]["name"] = "this.Antigravity"
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"config.json: quant.name=this.Antigravity: must be one of b158"):
        open_stored(folder)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("row", "its scales are one for each row"),
        ("group 64", "its scales are one for 64 inputs"),
        ("row, median, 4 bits", "it rounds activations by AbsMax"),
        ("quinary", "its codes are -2, -1, 0, 1, 2"),
        ("centered", "its layer computes more"),
        ("learned row", "its scales are one for each row"),
        ("tequila", "its layer computes more"),
        ("bitnet_v2", "it rounds activations by AbsMeanActivations"),
        ("threshold", None),
    ],
)
def test_the_native_engine_says_what_it_cannot_run(tmp_path, tokenizer, name, why):
    reason = why_unsupported(tiny_config(), quant_of(name))
    assert why in reason if why else reason is None
    folder = saved_model(tmp_path / "model", quant_of(name), tokenizer)
    if why:
        with pytest.raises(UserError, match=why):
            bitnet_lit.load(folder, engine="cpu")
        with pytest.warns(UserWarning, match=f"PyTorch runs it.*{why}"):
            assert bitnet_lit.load(folder).engine.name == "PyTorch"


@needs_compiler
@pytest.mark.parametrize("name", ["threshold", "sherry", "learned"])
def test_the_native_engine_runs_a_ternary_rule_that_it_does_not_know(tmp_path, tokenizer, name):
    """Codes and scales come from the rule itself; the kernels multiply them."""
    folder = saved_model(tmp_path / "model", quant_of(name), tokenizer)
    stored = open_stored(folder)
    weights = Weights(stored)
    for name in sorted(stored.quantized):
        codes, scale = stored.codes(name)
        packed, found_scale = weights._packed(name)
        assert np.array_equal(packed, pack(codes.numpy(), Arena())) and found_scale == float(scale)
    ids = [3, 5, 7]
    native, torch_engine = (bitnet_lit.load(folder, engine=engine).engine for engine in ("cpu", "torch"))
    ours, theirs = (engine.forward([ids], [engine.new_cache()]) for engine in (native, torch_engine))
    assert native.name.startswith("native")
    assert np.abs(ours - theirs).max() < 0.05 * theirs.std()  # the head is rounded to 8 bits, the cache to 16


def test_what_a_layer_has_of_its_own_is_saved_read_back_and_counted(tmp_path, tokenizer):
    quant = quant_of("gained")
    model = random_model(quant)
    gain = "model.layers.0.mlp.up_proj.gain"
    with torch.no_grad():
        model.get_parameter(gain).uniform_(0.5, 2)
    save_model_folder(tmp_path / "m", model, quant, tokenizer)
    opened = from_pretrained(tmp_path / "m")
    assert torch.equal(opened.model.get_parameter(gain), model.get_parameter(gain))
    ids = torch.randint(0, 512, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(opened.model(ids), model(ids))
    stored = open_stored(tmp_path / "m")
    assert stored.tensors[gain] == (256,) and stored.tensors["model.layers.0.mlp.up_proj.constant"] == (1,)
    buffers = sum(buffer.numel() for name, buffer in model.named_buffers() if name.endswith(".constant"))
    assert account(model.config, quant).parameters == sum(p.numel() for p in model.parameters()) + buffers
    loss = opened.model.train()(ids).square().mean()
    loss.backward()
    assert opened.model.get_parameter(gain).grad.abs().sum() > 0
    vectors = build_optimizer(opened.model, MuonConfig()).parts[1].param_groups[1]  # AdamW's, without weight decay
    assert vectors["weight_decay"] == 0 and any(p is opened.model.get_parameter(gain) for p in vectors["params"])
    assert "its layer computes more" in str(why_unsupported(model.config, quant))
