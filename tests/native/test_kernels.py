"""The C++ for training on a CPU against the plain PyTorch code it stands for: values, gradients, integers, threads."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from bitnet_lit.config import QuantConfig
from bitnet_lit.model import build_model
from bitnet_lit.model.layers import apply_rotary, rotary_tables
from bitnet_lit.model.transformer import batch_loss, token_losses
from bitnet_lit.native import library, newton_schulz
from bitnet_lit.native.attention import rotary_attention
from bitnet_lit.native.build import NoCompilerError, is_kept
from bitnet_lit.native.gated_mlp import gated_mlp
from bitnet_lit.native.linears import normed_linears
from bitnet_lit.native.loss import next_token_loss
from bitnet_lit.quant import BitLinear
from bitnet_lit.quant.bit_linear import BitLinearFunction
from bitnet_lit.quant.kernels import cpu
from bitnet_lit.quant.kernels.choose import describe
from bitnet_lit.quant.kernels.interface import Norm
from bitnet_lit.training.muon import Muon
from bitnet_lit.training.orthogonalize import orthogonalize
from tests.support import tiny_config

if not library.is_available():
    pytest.skip("no C++ compiler", allow_module_level=True)

SCHEMES = [
    QuantConfig(),
    QuantConfig(name="b1"),
    QuantConfig(weight_scale="absmedian"),
    QuantConfig(activation_bits=4),
    QuantConfig(name="b158_row"),
    QuantConfig(name="b158_group", settings={"group_size": 4}),
    QuantConfig(name="sherry"),
    QuantConfig(name="none"),
]
# Sums of up to 512 float32 products in another order, of values near 1.
CLOSE = {"atol": 2e-5, "rtol": 2e-5}
# On processors with AMX, products of matrices from 128 x 128 on have an error of up to 2^-16 of each product of two
# numbers near 1, in sums of 200 and more of them (csrc/amx.h).
LARGE_CLOSE = {"atol": 1e-3, "rtol": 1e-4}


def linear(inputs, outputs, quant):
    layer = torch.nn.Linear(inputs, outputs, bias=False)
    return layer if quant.name == "none" else BitLinear.from_linear(layer, quant)


def reference(x, layer):
    if not isinstance(layer, BitLinear):
        return layer(x)
    codes, scale = layer._weights.quantize(layer.weight.detach())
    return BitLinearFunction.apply(x, layer.weight, codes, scale, layer._activations)


def gradients(outputs, tensors):
    """The gradients of a weighted sum of the outputs, with the same weights at each call."""
    torch.manual_seed(7)
    total = sum((output * torch.randn_like(output)).sum() for output in outputs)
    return torch.autograd.grad(total, tensors)


@pytest.mark.parametrize(
    "quant", SCHEMES, ids=lambda quant: f"{quant.name}-{quant.weight_scale}-{quant.activation_bits}"
)
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"),
    [((2, 50), 64, (48, 16, 16)), ((3,), 36, (7,)), ((1, 200), 260, (100, 33)), ((2, 105), 128, (96, 64))],
    ids=str,
)
def test_linears(quant, tokens, inputs, outputs):
    torch.manual_seed(0)
    layers = [linear(inputs, size, quant) for size in outputs]
    x = torch.randn(*tokens, inputs, requires_grad=True)
    ours, theirs = normed_linears(x, None, 0.0, layers), [reference(x, layer) for layer in layers]
    for mine, other in zip(ours, theirs, strict=True):
        if quant.name in ("none", "b158_group"):
            assert_close(mine, other, **(LARGE_CLOSE if inputs >= 128 else CLOSE))
        else:  # the integers are equal, and so is what they are multiplied by
            assert torch.equal(mine, other)
    tensors = [x, *(layer.weight for layer in layers)]
    close = LARGE_CLOSE if inputs >= 128 else {"atol": 1e-4, "rtol": 2e-5}  # sums over 100 tokens
    for mine, other in zip(gradients(ours, tensors), gradients(theirs, tensors), strict=True):
        assert_close(mine, other, **close)


def test_integers_of_values_at_rounding_borders():
    """Values of few bits often lie in the middle of two codes, where the last bit of the factor decides."""
    torch.manual_seed(0)
    layer = linear(64, 48, QuantConfig())
    x = torch.randn(400, 64).bfloat16().float()
    (ours,) = normed_linears(x, None, 0.0, [layer])
    assert torch.equal(ours, reference(x, layer))


@pytest.mark.parametrize("wrong", [-100, 512], ids=["left out by PyTorch", "outside of the vocabulary"])
def test_targets_that_are_no_tokens_are_answered_as_by_pytorch(wrong):
    torch.manual_seed(0)
    head, x, gain = torch.nn.Linear(32, 512, bias=False), torch.randn(1, 20, 32), torch.ones(32)
    targets = torch.randint(512, (1, 20))
    targets[0, 3] = wrong
    kernels = cpu.CpuKernels()
    assert kernels.next_token_loss(x, Norm(gain, 1e-5), head, targets) is None
    assert kernels.next_token_loss(x, Norm(gain, 1e-5), head, targets.clamp(0).int()) is None
    assert kernels.next_token_loss(x, Norm(gain, 1e-5), head, targets.clamp(0, 511)) is not None


def test_a_norm_of_another_class_is_called():
    torch.manual_seed(0)
    model = build_model(tiny_config(), QuantConfig())
    for layer in model.model.layers:
        layer.input_layernorm = torch.nn.LayerNorm(model.config.hidden_size, bias=True)
        torch.nn.init.normal_(layer.input_layernorm.bias)
    ids = torch.randint(model.config.vocab_size, (2, 21))
    ours = batch_loss(model, ids)
    for module in model.modules():
        if isinstance(module, BitLinear | torch.nn.Linear):
            module.kernel = "reference"
    assert_close(ours, batch_loss(model, ids), **CLOSE)


def test_no_tokens_have_gradients_of_zero():
    for quant in (QuantConfig(), QuantConfig(name="none")):
        model = build_model(tiny_config(), quant)
        model(torch.zeros(2, 0, dtype=torch.int64)).sum().backward()
        assert all(weight.grad is None or not weight.grad.any() for weight in model.parameters())


def test_a_layer_that_rounds_nothing_does_not_round_its_inputs():
    torch.manual_seed(0)
    layer, x = BitLinear.from_linear(torch.nn.Linear(64, 48, bias=False), QuantConfig(name="none")), torch.randn(9, 64)
    assert_close(normed_linears(x, None, 0.0, [layer])[0], F.linear(x, layer.weight), **CLOSE)


def test_a_machine_that_has_no_cache_yet(monkeypatch, tmp_path):
    monkeypatch.setattr("bitnet_lit.native.build.cache_folders", lambda: [tmp_path / "absent" / "cache"])
    assert not is_kept(library.TRAINING)
    assert not list(tmp_path.iterdir())


def test_a_norm_before_linears():
    torch.manual_seed(0)
    layers = [linear(64, 48, QuantConfig(name="none"))]
    x, gain = torch.randn(3, 40, 64, requires_grad=True), torch.rand(64, requires_grad=True)
    ours = normed_linears(x, gain, 1e-5, layers)
    theirs = [layers[0](F.rms_norm(x, (64,), gain, 1e-5))]
    assert_close(ours[0], theirs[0], **CLOSE)
    tensors = [x, gain, layers[0].weight]
    for mine, other in zip(gradients(ours, tensors), gradients(theirs, tensors), strict=True):
        assert_close(mine, other, atol=1e-4, rtol=2e-5)


def test_gradients_that_do_not_lie_side_by_side():
    torch.manual_seed(0)
    layers = [linear(32, size, QuantConfig()) for size in (16, 8, 8)]
    x = torch.randn(2, 20, 32, requires_grad=True)
    ours, theirs = normed_linears(x, None, 0.0, layers), [reference(x, layer) for layer in layers]
    upstream = [torch.randn(2, 16, 20).mT, torch.zeros(8).expand(2, 20, 8), torch.randn(2, 20, 8)]
    tensors = [x, *(layer.weight for layer in layers)]
    for mine, other in zip(
        torch.autograd.grad(ours, tensors, upstream), torch.autograd.grad(theirs, tensors, upstream), strict=True
    ):
        assert_close(mine, other, atol=1e-4, rtol=2e-5)


@pytest.mark.parametrize(("relu2", "has_norms", "hidden"), [(False, True, 48), (True, False, 48), (False, True, 128)])
def test_gated_mlp(relu2, has_norms, hidden):
    torch.manual_seed(0)
    dense, ffn = QuantConfig(name="none"), hidden + 32
    layers = [linear(hidden, ffn, dense), linear(hidden, ffn, dense), linear(ffn, hidden, dense)]
    x = torch.randn(2, 60, hidden, requires_grad=True)
    gains = [torch.rand(size, requires_grad=True) for size in (hidden, ffn)] if has_norms else [None, None]

    def norm(value, gain):
        return value if gain is None else F.rms_norm(value, value.shape[-1:], gain, 1e-5)

    h = norm(x, gains[0])
    gate = layers[0](h)
    act = F.relu(gate).square() if relu2 else F.silu(gate)
    theirs = layers[2](norm(act * layers[1](h), gains[1]))
    ours = gated_mlp(x, *gains, (1e-5, 1e-5), relu2, layers)
    assert_close(ours, theirs, **(LARGE_CLOSE if hidden >= 128 else CLOSE))
    tensors = [x, *(layer.weight for layer in layers), *(gain for gain in gains if gain is not None)]
    for mine, other in zip(gradients([ours], tensors), gradients([theirs], tensors), strict=True):
        assert_close(mine, other, **(LARGE_CLOSE if hidden >= 128 else {"atol": 2e-4, "rtol": 2e-5}))


@pytest.mark.parametrize(
    ("batch", "length", "heads", "kv_heads", "size"), [(2, 130, 4, 2, 32), (1, 1, 2, 2, 16), (3, 50, 3, 1, 10)]
)
def test_rotary_attention(batch, length, heads, kv_heads, size):
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, length, n * size, requires_grad=True) for n in (heads, kv_heads, kv_heads))
    cos, sin = (
        table[:length] for table in rotary_tables(tiny_config(vocab_size=8, head_dim=size, max_position_embeddings=256))
    )
    split = [part.unflatten(-1, (-1, size)).transpose(1, 2) for part in (q, k, v)]
    rotated = [apply_rotary(part, cos, sin) for part in split[:2]]
    theirs = F.scaled_dot_product_attention(*rotated, split[2], is_causal=True, enable_gqa=True)
    theirs = theirs.transpose(1, 2).flatten(-2)
    ours = rotary_attention(q, k, v, cos, sin)
    assert_close(ours, theirs, **CLOSE)
    for mine, other in zip(gradients([ours], [q, k, v]), gradients([theirs], [q, k, v]), strict=True):
        assert_close(mine, other, atol=5e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("tokens", "hidden", "vocabulary"),
    [((2, 70), 64, 1000), ((1, 1), 20, 7), ((3, 50), 128, 512), ((1, 1), 160, 32), ((530,), 128, 32064)],
)
def test_next_token_loss(tokens, hidden, vocabulary):
    torch.manual_seed(0)
    x, gain = torch.randn(*tokens, hidden, requires_grad=True), torch.rand(hidden, requires_grad=True)
    head, targets = torch.randn(vocabulary, hidden, requires_grad=True), torch.randint(vocabulary, tokens)
    ours = next_token_loss(x, gain, 1e-5, head, targets)
    logits = F.rms_norm(x, (hidden,), gain, 1e-5) @ head.T
    theirs = F.cross_entropy(logits.flatten(0, -2), targets.flatten())
    large = hidden >= 128
    assert_close(ours, theirs, **(LARGE_CLOSE if large else CLOSE))
    for mine, other in zip(gradients([ours], [x, gain, head]), gradients([theirs], [x, gain, head]), strict=True):
        assert_close(mine, other, atol=1e-5 if large else 1e-6, rtol=1e-3 if large else 1e-4)


def test_the_loss_of_logits_that_lie_far_apart():
    """Some lie 100 above those of the first words, some targets are as good as certain, and some impossible."""
    torch.manual_seed(0)
    x, head = torch.randn(90, 128), 0.01 * torch.randn(512, 128)
    x = (x / x.square().mean(-1, keepdim=True).sqrt()).requires_grad_()
    targets = torch.randint(512, (90,))
    with torch.no_grad():
        for token, word, logit in ((0, 300, 100.0), (1, 40, 75.0), (2, int(targets[2]), 20.0), (70, 500, 200.0)):
            head[word] += x[token] * logit / 128
    head.requires_grad_()
    gain = torch.ones(128, requires_grad=True)
    ours = next_token_loss(x, gain, 0.0, head, targets)
    assert_close(ours, F.cross_entropy(x @ head.T, targets), **LARGE_CLOSE)
    mine = gradients([ours], [x, head])
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, head)]
    theirs = gradients([F.cross_entropy(F.rms_norm(exact[0], (128,)) @ exact[1].T, targets)], exact)
    for ours, expected in zip(mine, theirs, strict=True):
        # An error of 2^-16 of logits of up to 200 is one of 3e-3 of a probability.
        assert_close(ours.double(), expected, atol=1e-6, rtol=5e-3)


def test_a_logit_that_is_not_finite_spoils_its_own_token_alone():
    torch.manual_seed(0)
    x, head, targets = torch.randn(70, 128), torch.randn(512, 128), torch.randint(512, (70,))
    x[3] = float("nan")
    x.requires_grad_()
    (mine,) = gradients([next_token_loss(x, torch.ones(128), 1e-5, head, targets)], [x])
    assert mine[3].isnan().all()
    assert mine[:3].isfinite().all()
    assert mine[4:].isfinite().all()


@pytest.mark.parametrize("shape", [(3, 128, 128), (1, 256, 128), (2, 150, 40), (2, 16, 100), (1, 1, 5)], ids=str)
def test_newton_schulz(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    options = (3.4445, -4.775, 2.0315), 5, 1e-7
    mine, exact = newton_schulz.orthogonalize(matrices, *options), orthogonalize(matrices, *options)
    if min(shape[1:]) < 128:  # float32; each iteration multiplies differences by up to 3.4
        assert_close(mine, exact, atol=5e-6, rtol=0)
        return
    # The iterations may round to bfloat16 (csrc/rounded.h), as torch.optim.Muon does. Both are about equally far away.
    theirs = torch.stack([torch.optim._muon._zeropower_via_newtonschulz(matrix, *options) for matrix in matrices])
    assert float((mine - exact).norm()) < 2 * float((theirs - exact).norm())


@pytest.mark.parametrize("nesterov", [True, False])
def test_muons_whole_step(nesterov):
    """In C++ and in PyTorch, for three steps of tall and wide matrices with weight decay."""
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in ((20, 12), (20, 12), (12, 20))]
    gradients_of = [[torch.randn_like(weight) for weight in start] for _ in range(3)]
    results = []
    for computing in (contextlib.nullcontext, library.switched_off):
        parameters = [torch.nn.Parameter(weight.clone()) for weight in start]
        optimizer = Muon(parameters, lr=0.1, weight_decay=0.1, nesterov=nesterov)
        for step in gradients_of:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.clone()
            with computing():
                optimizer.step()
        averages = [optimizer.state[parameter]["momentum_buffer"] for parameter in parameters]
        results.append([*(parameter.detach() for parameter in parameters), *averages])
    for mine, other in zip(*results, strict=True):
        assert_close(mine, other, atol=1e-5, rtol=1e-5)


def loss_and_gradients(quant, kernel, threads=1, **sizes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, **sizes}
    model = build_model(tiny_config(**sizes), QuantConfig(name=quant, kernel=kernel))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        loss = batch_loss(model, torch.randint(100, (3, 65)))
        loss.backward()
    finally:
        torch.set_num_threads(before)
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("quant", ["none", "b158", "b1"])
def test_any_number_of_threads_gives_the_same_bits(quant):
    one, two, three = (loss_and_gradients(quant, "native", threads) for threads in (1, 2, 3))
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(one, two, three, strict=True))


@pytest.mark.parametrize(
    "sizes",
    [{}, {"sub_norm": False, "hidden_act": "relu2"}, {"num_attention_heads": 4, "num_key_value_heads": 2}],
    ids=str,
)
def test_a_dense_model(sizes):
    for mine, other in zip(
        loss_and_gradients("none", "native", **sizes), loss_and_gradients("none", "reference", **sizes), strict=True
    ):
        assert_close(mine, other, atol=2e-6, rtol=1e-3)  # gradients are near 1e-2


@pytest.mark.parametrize("quant", ["b158", "b1"])
def test_a_quantized_model(quant):
    """A norm that rounds its last bit differently turns a code here and there, so gradients can only be alike."""
    ours, theirs = (loss_and_gradients(quant, kernel) for kernel in ("native", "reference"))
    assert_close(ours[0], theirs[0], atol=0, rtol=1e-3)
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        assert F.cosine_similarity(mine.flatten(), other.flatten(), dim=0) > 0.999


def test_what_is_not_finite_stays_so():
    x = torch.randn(4, 32)
    x[1, 3] = float("nan")
    (y,) = normed_linears(x, torch.ones(32), 1e-5, [linear(32, 16, QuantConfig())])
    assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all()


@pytest.mark.parametrize("sizes", [{"dropout": 0.1}, {"qk_norm": True}, {"qkv_bias": True}], ids=str)
def test_parts_that_only_the_reference_has(sizes):
    ours, theirs = (loss_and_gradients("none", kernel, **sizes) for kernel in ("native", "reference"))
    assert_close(ours[0], theirs[0], atol=0, rtol=1e-5)


def test_without_a_compiler_the_reference_computes(monkeypatch):
    def refuse():
        raise NoCompilerError("no C++ compiler")

    monkeypatch.setattr(library, "functions", refuse)
    cpu._missing.cache_clear()
    try:
        model = build_model(tiny_config(vocab_size=100), QuantConfig())
        line = describe(model, torch.device("cpu"), torch.float32)
        assert line is not None and line.startswith("reference") and "no C++ compiler" in line
        batch_loss(model, torch.randint(100, (2, 9))).backward()
        assert not library.is_available()
    finally:
        cpu._missing.cache_clear()


@pytest.fixture
def nothing_compiled(monkeypatch):
    """A process that has not loaded the C++; `nothing_compiled(True)` lets the machine have it."""
    cpu._missing.cache_clear()
    yield lambda kept: monkeypatch.setattr(cpu, "_kept", lambda: kept)
    cpu._missing.cache_clear()


def test_a_process_that_trains_nothing_compiles_nothing(nothing_compiled):
    nothing_compiled(False)
    model = build_model(tiny_config(vocab_size=100), QuantConfig())
    ids = torch.randint(100, (1, 9))
    with torch.no_grad():
        model(ids)
        token_losses(model, ids)
    assert not cpu._missing.cache_info().currsize


@pytest.mark.parametrize("quant", ["none", "b1", "b158"])
def test_losses_of_an_evaluation_are_those_of_the_reference(quant, nothing_compiled):
    """They have the same bits in a process that trains and in one that does not."""
    sizes = {"vocab_size": 100, "hidden_size": 128, "num_hidden_layers": 2}
    model = build_model(tiny_config(**sizes), QuantConfig(name=quant))
    ids = torch.randint(100, (3, 33))
    nothing_compiled(False)
    with torch.no_grad():
        expected, expected_hits = token_losses(model, ids)
        nothing_compiled(True)
        losses, hits = token_losses(model, ids)
        assert cpu._missing.cache_info().currsize
    # A float that is rounded otherwise can move an activation to the next of 255 codes, and a logit by some 1e-3.
    assert_close(losses, expected, atol=5e-3, rtol=0)
    assert (losses - expected).abs().mean() < 1e-3 and (hits == expected_hits).float().mean() > 0.95
    batch_loss(model, ids).backward()
    with torch.no_grad():
        again = torch.cat([token_losses(model, row[None])[0] for row in ids])
    assert torch.equal(again, losses)


def test_what_needs_no_gradient_has_the_same_bits_before_and_after_a_training():
    model = build_model(tiny_config(vocab_size=100, hidden_size=128), QuantConfig())
    ids = torch.randint(100, (2, 33))
    with torch.no_grad():
        before = model(ids)
    batch_loss(model, ids).backward()
    assert cpu._missing.cache_info().currsize
    with torch.no_grad():
        assert torch.equal(model(ids), before)
    reference = build_model(tiny_config(vocab_size=100, hidden_size=128), QuantConfig(kernel="reference"))
    reference.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(reference(ids), before)
