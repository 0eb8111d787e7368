"""Which kernels compute a layer: by the device of its input, the key quant.kernel, and what the kernels refuse."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from bitnet_lit.config import QuantConfig
from bitnet_lit.errors import UserError
from bitnet_lit.model import build_model
from bitnet_lit.model.layers import joint_layers
from bitnet_lit.quant import BitLinear, register
from bitnet_lit.quant.bit_linear import bit_linear_reference, set_strength
from bitnet_lit.quant.kernels import choose
from bitnet_lit.quant.kernels.choose import describe
from bitnet_lit.quant.kernels.interface import Kernels
from bitnet_lit.quant.kernels.triton import kernels as triton_kernels
from tests.quant.toy_schemes import Threshold
from tests.support import tiny_config

IDS = torch.arange(24).reshape(2, 12)
CPU = torch.device("cpu")


class Recording(Kernels):
    """Kernels for the CPU that compute the reference, and note what they were asked for."""

    name = "triton"

    def __init__(self, refuses=None):
        self.refuses, self.calls = refuses, []

    def refusal(self, layers, device, dtype):
        return self.refuses

    def normed_linears(self, x, norm, layers):
        self.calls.append(len(layers))
        if norm is not None:
            x = torch.nn.functional.rms_norm(x.float(), norm.weight.shape, norm.weight, norm.eps).to(x.dtype)
        return tuple(bit_linear_reference(x, layer.weight, layer.bias, layer.scheme) for layer in layers)


@pytest.fixture
def kernels(monkeypatch):
    recording = Recording()
    monkeypatch.setitem(choose.KERNELS, "cpu", recording)
    return recording


def tiny(**quant):
    torch.manual_seed(0)
    return build_model(tiny_config(vocab_size=64), QuantConfig(**quant))


def test_projections_of_one_input_are_computed_together(kernels):
    model = tiny()
    logits = model(IDS)
    layers = model.config.num_hidden_layers
    assert kernels.calls == [3, 1, 2, 1] * layers  # q, k, v; o; gate, up; down
    kernels.refuses = "no"
    assert_close(logits, model(IDS), atol=1e-5, rtol=1e-5)  # float32 sums in another order
    assert kernels.calls == [3, 1, 2, 1] * layers


@pytest.mark.parametrize("quant", [{"kernel": "reference"}, {"name": "none"}], ids=str)
def test_kernels_that_are_not_wanted(kernels, quant):
    tiny(**quant)(IDS)
    assert kernels.calls == []


def test_parts_that_are_not_quantized_know_which_kernels_are_wanted():
    model = tiny(name="none", kernel="reference")
    parts = [part for part in model.modules() if hasattr(part, "kernel")]
    assert {"Linear", "SoftmaxGradient"} == {type(part).__name__ for part in parts}
    assert {part.kernel for part in parts} == {"reference"}


def test_the_reference_computes_while_lambda_is_warmed_up(kernels):
    model = tiny()
    set_strength(model, torch.tensor(0.5))
    model(IDS)
    assert kernels.calls == []


def test_a_layer_that_stays_dense_splits_its_group(kernels):
    model = tiny(skip=["lm_head", "k_proj"])
    model(IDS)
    assert kernels.calls[:3] == [1, 1, 1]  # q, v and o by themselves


def test_hooks_are_called(kernels):
    model, seen = tiny(), []
    first = model.model.layers[0]
    for module in (first.self_attn.k_proj, first.post_attention_layernorm, first.mlp.ffn_sub_norm):
        module.register_forward_hook(lambda module, *_: seen.append(type(module)))
    model(IDS)
    assert [kind.__name__ for kind in seen] == ["BitLinear", "RMSNorm", "RMSNorm"]
    assert kernels.calls[:4] == [1, 1, 1, 1]  # q, k, v by themselves, and o
    assert 3 in kernels.calls  # the other layers are computed together


def test_a_layer_alone_is_computed_by_kernels_too(kernels):
    layer = BitLinear(8, 4, quant="b1")
    assert layer(torch.randn(3, 8)).shape == (3, 4)
    assert kernels.calls == [1]


@pytest.mark.parametrize(("skip", "sizes"), [([], [3, 2, 1, 1]), (["k_proj"], [2, 1, 1, 1, 1])], ids=str)
def test_the_groups_of_a_network_hold_each_layer_once(skip, sizes):
    model = tiny(skip=["lm_head", *skip])
    groups = joint_layers(model)
    assert sorted(map(len, groups), reverse=True) == sorted(sizes * model.config.num_hidden_layers, reverse=True)
    layers = [layer for group in groups for layer in group]
    assert sorted(map(id, layers)) == sorted(id(layer) for layer in model.modules() if isinstance(layer, BitLinear))


def test_the_line_of_the_plan(kernels):
    model = tiny()
    count = 7 * model.config.num_hidden_layers
    assert describe(model, CPU, torch.float32) == f"triton ({count} layers)"
    kernels.refuses = "scales per group"
    assert describe(model, CPU, torch.float32) == f"reference ({count} layers: scales per group)"
    assert describe(model, torch.device("mps"), torch.float32).endswith("there are no kernels for mps)")
    assert describe(tiny(name="none"), CPU, torch.float32) is None


def test_the_line_of_the_plan_where_the_network_is_compiled(kernels, monkeypatch):
    model = tiny()
    count = 7 * model.config.num_hidden_layers
    assert describe(model, CPU, torch.float32, is_compiled=True) == f"triton ({count} layers)"
    monkeypatch.setattr(Recording, "is_traceable", False)
    line = describe(model, CPU, torch.float32, is_compiled=True)
    assert line == f"reference ({count} layers: torch.compile cannot trace the kernels triton)"


def test_kernels_that_were_asked_for_and_cannot_run(kernels):
    kernels.refuses = "no Triton"
    with pytest.raises(UserError, match=r"quant.kernel=triton: cannot run here \(no Triton\): take quant.kernel=auto"):
        describe(tiny(kernel="triton"), CPU, torch.float32)


@pytest.mark.parametrize("key", ["kernel", "grad"])
def test_a_value_that_does_not_exist(key):
    with pytest.raises(UserError, match=f"quant.{key}=fast: must be one of"):
        QuantConfig(**{key: "fast"})


def test_a_saved_model_does_not_hold_them():
    assert QuantConfig(kernel="reference", grad="bf16").describe() == QuantConfig().describe()


class TestWhyTritonRefuses:
    """Its kernels are for GPUs of the Hopper generation. What they refuse needs no GPU to be known."""

    @pytest.fixture(autouse=True)
    def hopper(self, monkeypatch):
        monkeypatch.setattr(triton_kernels, "HAS_TRITON", True)
        monkeypatch.setattr(triton_kernels, "BUILD_REFUSAL", None)
        self.use(monkeypatch, 9, 0)

    def use(self, monkeypatch, major, minor):
        properties = SimpleNamespace(major=major, minor=minor)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)

    def line(self, model, dtype=torch.bfloat16):
        return describe(model, torch.device("cuda"), dtype)

    def test_it_computes_all_built_in_schemes_with_a_scale_for_a_matrix_or_a_row(self):
        for name in ("b158", "b158_row", "b1", "b158_learned", "sherry", "tequila"):
            assert self.line(tiny(name=name, grad="fp8")) == "triton (14 layers), gradients of the inputs in FP8"
        assert self.line(tiny(weight_scale="absmedian", grad="bf16")) == "triton (14 layers)"
        both = "gradients of the inputs and of the weights in FP8"
        assert self.line(tiny(activation_bits=4, grad="fp8_all")) == f"triton (14 layers), {both}"
        assert self.line(tiny(grad="fp8"), torch.float32) == "triton (14 layers)"

    def test_gradients_are_rounded_to_fp8_where_matrices_are_large(self, monkeypatch):
        assert self.line(tiny()) == "triton (14 layers)"
        monkeypatch.setattr(triton_kernels, "FP8_FROM", 32)
        monkeypatch.setattr(triton_kernels, "FP8_ALL_FROM", 64)
        some = tiny_config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64)
        line = self.line(build_model(some, QuantConfig()))
        assert line == "triton (14 layers), gradients in FP8: of the inputs, of the weights (10 layers)"
        monkeypatch.setattr(triton_kernels, "FP8_FROM", 64)
        line = self.line(build_model(some, QuantConfig()))
        assert line == "triton (14 layers), gradients of the inputs and of the weights in FP8 (10 layers)"

    def test_layers_that_are_computed_together_have_gradients_like_the_first(self, monkeypatch):
        monkeypatch.setattr(triton_kernels, "FP8_FROM", 64)
        monkeypatch.setattr(triton_kernels, "FP8_ALL_FROM", 64)
        few = tiny_config(hidden_size=64, num_attention_heads=4, num_key_value_heads=1, intermediate_size=64)
        model = build_model(few, QuantConfig())
        line = describe(model, torch.device("cuda"), torch.bfloat16, joint_layers(model))
        assert line == "triton (14 layers), gradients of the inputs and of the weights in FP8"

    def test_scales_per_group(self):
        model = tiny(name="b158_group", settings={"group_size": 32})
        assert self.line(model) == "reference (14 layers: scales: one for 32 inputs)"

    def test_rules_that_they_do_not_have(self):
        model = tiny(name="bitnet_v2", activation_bits=4)
        assert self.line(model) == "reference (14 layers: activations are rounded by AbsMeanActivations)"
        model = tiny(name="bitnet_v2", settings={"activation_scale": "absmax"}, grad="bf16")
        assert self.line(model) == "triton (14 layers)"
        register(Threshold)
        assert self.line(tiny(name="threshold")) == "reference (14 layers: weights are rounded by ThresholdRule)"

    def test_sizes_that_the_tma_cannot_load(self):
        torch.manual_seed(0)
        model = build_model(tiny_config(vocab_size=64, intermediate_size=72), QuantConfig())
        line = "triton (8 layers), reference (4 layers: 32 x 72 features are no multiples of 16)"
        assert self.line(model).startswith(line)

    def test_other_gpus(self, monkeypatch):
        for capability in ((8, 0), (8, 9), (10, 0)):
            self.use(monkeypatch, *capability)
            why = "compute capability {}.{}, and the kernels are for 9.0 (Hopper)".format(*capability)
            assert self.line(tiny()) == f"reference (14 layers: {why})"

    def test_a_gpu_of_amd_whose_number_is_that_of_hopper(self, monkeypatch):
        monkeypatch.setattr(torch.version, "hip", "7.1")
        assert self.line(tiny()) == "reference (14 layers: the kernels are for GPUs of NVIDIA)"

    def test_what_triton_compiles_with_is_missing(self, monkeypatch, tmp_path):
        for name in ("CC", "CPATH", "C_INCLUDE_PATH"):
            monkeypatch.delenv(name, raising=False)
        programs, headers = tmp_path / "programs", tmp_path / "headers"
        programs.mkdir()
        headers.mkdir()
        monkeypatch.setenv("PATH", str(programs))
        monkeypatch.setattr(triton_kernels.sysconfig, "get_paths", lambda scheme: {"include": str(headers)})
        why = triton_kernels._build_refusal()
        assert why == "Triton needs a C compiler, and there is neither gcc nor clang"
        monkeypatch.setattr(triton_kernels, "BUILD_REFUSAL", why)
        assert self.line(tiny()) == f"reference (14 layers: {why})"

        (programs / "gcc").touch(mode=0o755)
        why = f"Triton needs Python.h, which is not in {headers} (on Debian and Ubuntu, install python3-dev)"
        assert triton_kernels._build_refusal() == why
        monkeypatch.setenv("CPATH", "/opt/include")
        assert triton_kernels._build_refusal() is None
        monkeypatch.delenv("CPATH")
        (headers / "Python.h").touch()
        assert triton_kernels._build_refusal() is None

    def test_no_triton(self, monkeypatch):
        monkeypatch.setattr(triton_kernels, "HAS_TRITON", False)
        assert self.line(tiny()) == "reference (14 layers: Triton is not installed)"
        with pytest.raises(UserError, match=r"quant.kernel=triton: cannot run here \(Triton is not installed\)"):
            self.line(tiny(kernel="triton"))
