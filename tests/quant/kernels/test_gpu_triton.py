"""The Triton kernels against the definition, on a GPU of the Hopper generation: codes, integers, outputs, gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from bitnet_lit.config import QuantConfig
from bitnet_lit.model import build_model, next_token_loss
from bitnet_lit.model.layers import joint_layers
from bitnet_lit.quant import BitLinear
from bitnet_lit.quant.activations import AbsMax
from bitnet_lit.quant.bit_linear import set_strength
from bitnet_lit.quant.kernels.choose import chosen, describe
from bitnet_lit.quant.kernels.hold import HeldWeights
from tests.support import tiny_config

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
SCHEMES = {
    "b158": {},
    "absmedian": {"weight_scale": "absmedian"},
    "4 bits": {"activation_bits": 4},
    "b158_row": {"name": "b158_row"},
    "b1": {"name": "b1"},
    "sherry": {"name": "sherry"},
}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Fill new memory with NaN or the largest integer, so that an element that a kernel leaves out is seen."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels are for compute capability 9.0")
    torch.manual_seed(0)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape, dtype=torch.float32, scale=1.0):
    return (torch.randn(*shape, device=CUDA) * scale).to(dtype)


def cosine(a, b):
    return F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "inputs"), [(1, 16), (77, 48), (130, 288), (33, 768), (19, 5632)])
def test_activation_codes_equal_the_rule(rows, inputs, dtype):
    from bitnet_lit.quant.kernels.triton.norm_round import norm_round

    for bits in (8, 3):
        x = randn(rows, inputs, dtype=dtype)
        x[0] = 0
        codes, scale, _ = norm_round(x, None, 0.0, "", bits)
        expected, expected_scale = AbsMax(bits).quantize(x)
        assert torch.equal(codes, expected.to(torch.int8))
        assert_close(scale, expected_scale, rtol=1.2e-7, atol=0)  # CUDA divides by a number with its reciprocal


@pytest.mark.parametrize("activation", ["", "silu", "relu2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "inputs"), [(1, 64), (77, 768), (19, 5632)])
def test_normed_activation_codes(rows, inputs, dtype, activation):
    from bitnet_lit.model.layers import ACTIVATIONS
    from bitnet_lit.quant.kernels.triton.norm_round import norm_round

    x = randn(rows, inputs * (2 if activation else 1), dtype=dtype)
    weight = randn(inputs).abs()
    codes, scale, rstd = norm_round(x, weight, 1e-5, activation, 8)
    h = x
    if activation:
        gate, up = x.chunk(2, dim=1)
        h = ACTIVATIONS[activation](gate) * up
    normed = F.rms_norm(h.float(), weight.shape, weight, 1e-5).to(dtype)
    expected, expected_scale = AbsMax(8).quantize(normed)
    # The sum of the norm and exp round differently: 2e-6 of a float32 normed value, and a bfloat16 may round the other
    # way (1/256). A code of up to 127 then moves by at most one, and seldom.
    step = 2e-6 if dtype == torch.float32 else 2**-7
    assert_close(scale, expected_scale, rtol=step, atol=0)
    moved = (codes - expected).abs()
    assert moved.max() <= 1
    assert (moved > 0).float().mean() < (1e-4 if dtype == torch.float32 else 0.03)
    assert_close(rstd, torch.rsqrt(h.float().square().mean(1) + 1e-5), rtol=1e-5, atol=0)


def test_a_value_that_is_not_finite_reaches_the_output():
    layer = BitLinear(64, 32, quant="b158").to(CUDA)
    for value in (float("nan"), float("inf")):
        x = randn(5, 64)
        x[3, 7] = value
        y = layer(x)
        assert not y[3].isfinite().any()
        assert y[[0, 1, 2, 4]].isfinite().all()
    with torch.no_grad():
        layer.weight[3, 3] = float("nan")
    assert layer(randn(5, 64)).isnan().all()


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shapes", [[(16, 16)], [(288, 288), (96, 288), (96, 288)], [(2048, 768), (2048, 768)]])
def test_weight_codes_equal_the_rule(name, shapes):
    from bitnet_lit.quant.kernels.triton.kernels import _rule_name
    from bitnet_lit.quant.kernels.triton.weights import round_weights

    rule = QuantConfig(**SCHEMES[name]).scheme.weights
    weights = [randn(*shape, scale=0.02 * (i + 1)) + 0.001 for i, shape in enumerate(shapes)]
    codes, transposed, scale = round_weights(weights, _rule_name(rule), True)
    assert torch.equal(transposed.float().t(), codes.float())
    rows = [weight.shape[0] for weight in weights]
    for its_codes, its_scale, weight in zip(codes.split(rows), scale.split(rows), weights, strict=True):
        expected, expected_scale = rule.quantize(weight)
        assert_close(its_scale, expected_scale.reshape(-1).expand(weight.shape[0]), rtol=1e-6, atol=0)
        # A weight at the edge between two codes may fall to the other side, because the sums differ in the last bits.
        assert (its_codes != expected).float().mean() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"), [(1, 16, 16), (77, 48, 304), (130, 288, 864), (1000, 2048, 512), (513, 5632, 2048)]
)
def test_integers_are_exact(rows, inputs, outputs, dtype):
    from bitnet_lit.quant.kernels.triton.int8_product import int8_product

    x = torch.randint(-128, 128, (rows, inputs), device=CUDA, dtype=torch.int8)
    weight = torch.randint(-1, 2, (outputs, inputs), device=CUDA, dtype=torch.int8)
    x_scale, weight_scale = randn(rows, 1).abs(), randn(outputs).abs()
    y = int8_product(x, weight, x_scale, weight_scale, dtype)
    integers = (x.double() @ weight.double().t()).float()
    assert torch.equal(y, (integers * (x_scale * weight_scale)).to(dtype))


@pytest.mark.parametrize("rows", [1, 70])
@pytest.mark.parametrize("columns", [48, 288, 6144, 11264])
def test_rows_in_fp8(rows, columns):
    from bitnet_lit.quant.kernels.triton.fp8_rows import fp8_rows

    grad, column_scale = randn(rows, columns, dtype=torch.bfloat16), randn(columns).abs()
    fp8, scale = fp8_rows(grad, column_scale)
    value = grad.float() * column_scale
    assert_close(scale, value.abs().amax(1, keepdim=True) / 448, rtol=1e-6, atol=0)
    expected = value * (448 / value.abs().amax(1, keepdim=True))
    # The factor may differ in its last bit, so a value at the edge may fall to the other side (1/8 away).
    assert_close(fp8.float(), expected.to(torch.float8_e4m3fn).float(), rtol=0.125, atol=2**-9)
    assert (fp8.float() != expected.to(torch.float8_e4m3fn).float()).float().mean() < 1e-3


@pytest.mark.parametrize("rows", [16, 4016])
@pytest.mark.parametrize(("counts", "inputs"), [([48], 288), ([768, 256, 256], 768), ([2048, 2048], 1040)])
@pytest.mark.parametrize("per_row", [True, False])
def test_weight_gradients_in_fp8(rows, counts, inputs, per_row):
    from bitnet_lit.quant.kernels.triton.weight_gradient import transposed, weight_gradient_fp8

    fp8 = randn(rows, sum(counts), scale=60).clamp(-448, 448).to(torch.float8_e4m3fn)
    codes = torch.randint(-128, 128, (rows, inputs), dtype=torch.int8, device=CUDA)
    row_scale, whole = torch.rand(rows, 1, device=CUDA) * 3, torch.rand((), device=CUDA)
    inverse = torch.rand(sum(counts), device=CUDA) + 0.5
    if not per_row:
        inverse = torch.cat([part[:1].expand(len(part)) for part in inverse.split(counts)])
    assert torch.equal(transposed(fp8, None).float(), fp8.float().t())
    x = (codes * row_scale).to(torch.float8_e4m3fn)
    assert torch.equal(transposed(codes, row_scale).float(), x.float().t())
    expected = (fp8.double() * whole * inverse).t() @ x.double()
    result = weight_gradient_fp8(fp8, codes, row_scale, whole, inverse, counts, per_row, torch.float32)
    assert result.dtype == torch.float32
    # Tensor cores of the Hopper generation add FP8 products with 14 bits or so, in blocks (DeepSeek-V3, section 3.3.2).
    assert_close(result.double(), expected, rtol=0, atol=1e-2 * expected.abs().max().item())
    assert cosine(result, expected) > 0.9999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("rows", "columns"), [(1, 16), (513, 288), (2112, 100), (132, 5632)])
def test_sums_of_columns(rows, columns, dtype):
    from bitnet_lit.quant.kernels.triton.norm_backward import column_sums

    parts = randn(rows, columns)
    expected = parts.double().sum(0)
    # bf16 keeps 8 bits; the sum of `rows` float32 has an error of the order of its terms' last bits.
    assert_close(column_sums(parts, dtype).double(), expected, rtol=2**-8 if dtype == torch.bfloat16 else 0, atol=1e-4)


def gradients(layer, x, dtype, grad_y):
    layer.zero_grad()
    x = x.detach().requires_grad_()
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        y = layer(x)
    y.backward(grad_y.to(y.dtype))
    return y.detach(), x.grad, {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grad", ["fp8", "fp8_all", "bf16"])
def test_a_layer_against_the_reference(name, dtype, grad):
    quant = QuantConfig(**SCHEMES[name], grad=grad)
    layer = BitLinear(288, 96, bias=True, quant=quant).to(CUDA)
    layer.grad = grad
    x, grad_y = randn(4, 44, 288), randn(4, 44, 96)
    assert chosen([layer], x) is not None
    y, grad_x, grads = gradients(layer, x, dtype, grad_y)
    layer.kernel = "reference"
    expected_y, expected_x, expected = gradients(layer, x, dtype, grad_y)
    assert y.dtype == expected_y.dtype
    # The integers are equal; the reference rounds them to 16 bits before it applies the scales.
    assert_close(y, expected_y, rtol=2e-6 if dtype == torch.float32 else 2**-6, atol=1e-5)
    rounded = dtype == torch.bfloat16
    assert cosine(grad_x, expected_x) > (0.999 if grad != "bf16" and rounded else 0.99999)
    for key in grads:
        assert grads[key].dtype == expected[key].dtype
        assert cosine(grads[key], expected[key]) > (0.998 if grad == "fp8_all" and rounded else 0.9999)


SIZES = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def network(sizes=None, **quant):
    torch.manual_seed(0)
    return build_model(tiny_config(**{**SIZES, **(sizes or {})}), QuantConfig(**quant), "cuda")


def step(model, ids, dtype=torch.bfloat16):
    """The loss, and the gradient of each parameter."""
    model.zero_grad()
    torch.manual_seed(1)  # of dropout
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        loss = next_token_loss(model(ids[:, :-1]), ids[:, 1:])
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.fixture
def ids():
    return torch.randint(0, 512, (8, 129), device=CUDA)


GRADS = {"bf16": 0.999, "fp8": 0.995, "fp8_all": 0.99}
"""The least cosine of a parameter's gradient, over two layers, to the reference's."""
VARIANTS = {
    "b158": ({}, {}),
    "b1": ({}, {"name": "b1"}),
    "row": ({}, {"name": "b158_row"}),
    "relu2, no sub-norms, biases, qk_norm": (
        {"hidden_act": "relu2", "sub_norm": False, "qkv_bias": True, "qk_norm": True},
        {},
    ),
    "dropout": ({"dropout": 0.1}, {}),
    "k and up stay dense": ({}, {"skip": ["lm_head", "k_proj", "up_proj"]}),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "grad"), [(torch.float32, "fp8"), *((torch.bfloat16, g) for g in GRADS)])
def test_a_network_against_the_reference(ids, variant, dtype, grad):
    sizes, quant = VARIANTS[variant]
    loss, grads = step(network(sizes, grad=grad, **quant), ids, dtype)
    expected, expected_grads = step(network(sizes, kernel="reference", **quant), ids, dtype)
    assert_close(loss, expected, rtol=1e-5 if dtype == torch.float32 else 1e-3, atol=0)
    least = 0.9999 if dtype == torch.float32 else GRADS[grad]
    found = {name: cosine(grads[name], expected_grads[name]) for name in grads}
    print(variant, dtype, grad, min(found.values()), min(found, key=found.get))
    assert min(found.values()) > least, found


def test_the_same_compiled_checkpointed_and_accumulated(ids):
    _, expected = step(network(), ids)
    compiled = network()
    for layer in compiled.model.layers:
        layer.compile()
    for _ in range(2):
        _, grads = step(compiled, ids)
    assert min(cosine(grads[name], expected[name]) for name in grads) > 0.9995
    with torch.no_grad():
        assert compiled.eval()(ids[:, :-1]).isfinite().all()
    _, grads = step(network({"gradient_checkpointing": True}), ids)
    assert all(torch.equal(grads[name], expected[name]) for name in grads)


def test_weights_that_change_are_rounded_again(ids):
    model = network()
    first, _ = step(model, ids)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.neg_()
    second, _ = step(model, ids)
    model.model.layers[0].mlp.up_proj.weight.data.neg_()
    third, _ = step(model, ids)
    assert first == third != second


def test_weights_are_held_between_optimizer_steps(ids):
    model = network()
    for layer in model.model.layers:
        layer.compile()
    held, weight = HeldWeights(joint_layers(model)), model.model.layers[0].mlp.up_proj.weight
    held.round(torch.bfloat16)
    first, grads = step(model, ids)
    codes = model.model.layers[0].mlp.gate_proj.held.codes
    with torch.no_grad():
        weight.neg_()
    assert step(model, ids)[0] == first  # so they were not rounded again
    held.round(torch.bfloat16)
    assert model.model.layers[0].mlp.gate_proj.held.codes is codes  # the same memory, as CUDA graphs need it
    second, _ = step(model, ids)
    held.release()
    assert step(model, ids)[0] == second != first
    with torch.no_grad():
        weight.neg_()
    loss, expected = step(model, ids)
    assert loss == first and all(torch.equal(grads[name], expected[name]) for name in grads)


@pytest.mark.parametrize("grad", ["fp8", "fp8_all"])
def test_tensors_that_are_not_contiguous(grad):
    layer = BitLinear(64, 48, quant=QuantConfig(grad=grad)).to(CUDA)
    plain, memory = layer.weight.detach().clone(), randn(64 * 48 + 1)
    layer.grad = grad
    x, grad_y = randn(32, 64), randn(48)
    y, grad_x, _ = gradients(layer, x, torch.bfloat16, grad_y.expand(32, 48))
    for weight in (plain.t().contiguous().t(), memory[1:].view(48, 64).copy_(plain)):
        layer.weight = torch.nn.Parameter(weight)
        assert layer.weight.data_ptr() % 16 or not layer.weight.is_contiguous()
        found, found_x, _ = gradients(layer, x.t().contiguous().t(), torch.bfloat16, grad_y.expand(32, 48))
        assert torch.equal(found, y)
        assert torch.equal(found_x, grad_x)


def test_lambda_is_warmed_up_by_the_reference(ids):
    model, reference = network(), network(kernel="reference")
    for each in (model, reference):
        set_strength(each, torch.tensor(0.5, device=CUDA))
    assert torch.equal(step(model, ids)[0], step(reference, ids)[0])


@pytest.mark.parametrize(
    ("sizes", "quant", "reason"),
    [
        ({"intermediate_size": 360}, {}, "128 x 360 features are no multiples of 16"),
        ({"intermediate_size": 384}, {"name": "b158_group", "settings": {"group_size": 64}}, "scales: one for 64"),
    ],
    ids=["odd sizes", "groups"],
)
def test_what_falls_back_equals_the_reference(ids, sizes, quant, reason):
    model = network(sizes, **quant)
    assert reason in describe(model, CUDA, torch.bfloat16)
    loss, _ = step(model, ids)
    expected, _ = step(network(sizes, kernel="reference", **quant), ids)
    assert_close(loss, expected, rtol=1e-3, atol=0)


def test_kept_for_the_backward_pass_is_less_than_the_reference_keeps(ids):
    kept = {}
    for kernel in ("auto", "reference"):
        model = network({"hidden_size": 512, "intermediate_size": 1408}, kernel=kernel)
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", torch.bfloat16):
            model.model(ids.repeat(4, 1)[:, :-1])
            output = model.model(ids.repeat(4, 1)[:, :-1])
        kept[kernel] = torch.cuda.memory_allocated() - before
        del output
    assert kept["auto"] < 0.8 * kept["reference"]


def test_the_line_of_the_plan():
    model = network(grad="fp8")
    count = 7 * model.config.num_hidden_layers
    assert describe(model, CUDA, torch.bfloat16) == f"triton ({count} layers), gradients of the inputs in FP8"
    assert describe(model, CUDA, torch.float32) == f"triton ({count} layers)"


def test_no_gpu_before_hopper(monkeypatch):
    layer = BitLinear(64, 32, quant="b158").to(CUDA)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: type("Properties", (), {"major": 8, "minor": 6})()
    )
    assert "compute capability 8.6" in describe(torch.nn.Sequential(layer), CUDA, torch.bfloat16)
    assert layer(randn(2, 64)).shape == (2, 32)
