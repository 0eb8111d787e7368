"""The kernels of the CUDA engine against plain PyTorch: integers equal, floats to their last bits."""

import math

import pytest
import torch

from bitnet_lit.config import GenerationConfig
from bitnet_lit.inference.engines.cuda.layout import pack_words, permute_bytes
from bitnet_lit.inference.sampling import Sampler, distribution
from bitnet_lit.quant.activations import AbsMax

pytestmark = pytest.mark.gpu
SIZES = [(300, 37), (64, 100), (2560, 384), (6912, 256)]  # inputs, outputs


def matrix(outputs, inputs, bias=False, seed=0):
    from bitnet_lit.inference.engines.cuda.projection import TernaryProjection

    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (outputs, inputs), generator=generator, dtype=torch.int8)
    scale = torch.rand(outputs, generator=generator) + 0.1
    bias = torch.randn(outputs, generator=generator).cuda() if bias else None
    return codes.cuda(), TernaryProjection.from_codes(codes.cuda(), scale.cuda(), bias, 127, 1e-5)


@pytest.mark.parametrize("tokens", [1, 5, 64, 300])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_accumulators_equal_the_reference(inputs, outputs, tokens):
    """Tokens of integers up to 127 are their own codes, with the scale 1: what comes out is the accumulator."""
    codes, projection = matrix(outputs, inputs)
    projection.scale.fill_(1.0)
    x = torch.randint(-127, 128, (tokens, inputs), device="cuda").float()
    x[:, 0] = 127.0
    x[-1] = 127.0 * codes[0] + 127.0 * (codes[0] == 0)  # the largest sum that there is
    expected = x.double() @ codes.double().T
    assert torch.equal(projection(x, None).double(), expected)
    added = torch.ones(tokens, outputs, device="cuda")
    assert torch.equal(projection(x, None, add_to=added).double(), expected + 1) and added.data_ptr()


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES[:2])
def test_norm_rounding_and_bias(inputs, outputs, bits, tokens):
    codes, projection = matrix(outputs, inputs, bias=True)
    projection.limit = 2 ** (bits - 1) - 1
    x, norm = torch.randn(tokens, inputs, device="cuda"), torch.rand(inputs, device="cuda") + 0.5
    x_codes, x_scale = AbsMax(bits).quantize(torch.nn.functional.rms_norm(x, (inputs,), norm, 1e-5))
    expected = (x_codes @ codes.float().T) * (x_scale * projection.scale) + projection.bias
    # A last bit of the norm moves a code in a thousand by one over a rounding border.
    step = (x_scale * projection.scale).max()
    assert ((projection(x, norm) - expected).abs() <= 2 * step + 1e-5 * expected.abs().max()).all()
    assert ((projection(x, norm) - expected).abs() < 1e-5 * expected.abs().max()).float().mean() > 0.5


@pytest.mark.parametrize("act", ["silu", "relu2"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_gated_layers(act, tokens):
    from bitnet_lit.model.layers import ACTIVATIONS

    codes, gate_up = matrix(2 * 100, 96)
    _, down = matrix(96, 100, seed=1)
    x = torch.randint(-127, 128, (tokens, 96), device="cuda").float()
    x[:, 0] = 127.0
    gate, up = ((x @ codes.float().T) * gate_up.scale).chunk(2, dim=1)
    hidden, left = gate_up.gated(x, None, act)
    expected = down(ACTIVATIONS[act](gate) * up, None)
    torch.testing.assert_close(down(hidden, None, act=left), expected, rtol=2e-2, atol=2e-2 * float(expected.std()))


def test_one_token_is_the_same_alone_and_among_others():
    _, projection = matrix(3840, 2560)
    x, norm = torch.randn(64, 2560, device="cuda"), torch.rand(2560, device="cuda") + 0.5
    together = projection(x, norm)
    alone = torch.cat([projection(row[None], norm) for row in x])
    torch.testing.assert_close(alone, together, rtol=0, atol=2 * float(together.std()) / 127)


@pytest.mark.parametrize(("vocabulary", "inputs", "tokens"), [(300, 64, 1), (300, 64, 3), (5003, 300, 17)])
def test_the_likeliest_tokens_have_exact_logits(vocabulary, inputs, tokens):
    from bitnet_lit.inference.engines.cuda.head import Int8Head

    rows, norm = torch.randn(vocabulary, inputs, device="cuda"), torch.rand(inputs, device="cuda") + 0.5
    head = Int8Head.from_rows(rows, norm, 1e-5, vocabulary - 3)
    x = 3 * torch.randn(tokens, inputs, device="cuda")
    logits = torch.empty(tokens, vocabulary, device="cuda")
    head(x, logits)
    exact = torch.nn.functional.rms_norm(x, (inputs,), norm, 1e-5).double() @ rows.double().T
    assert ((logits - exact).abs() < 0.06 * exact.std()).all()  # of rounding rows to 127 steps: 6 deviations are 5 %
    best = exact[:, : vocabulary - 3].argmax(dim=1, keepdim=True)
    assert torch.equal(logits[:, : vocabulary - 3].argmax(dim=1, keepdim=True), best)
    torch.testing.assert_close(logits.gather(1, best).double(), exact.gather(1, best), rtol=1e-5, atol=1e-4)


OPTIONS = [
    {"temperature": 0},
    {},
    {"top_k": 5},
    {"top_k": 20, "top_p": 0.7, "min_p": 0.05},
    {"top_p": 1.0, "min_p": 0.1},
    {"top_p": 0.5, "temperature": 2.0},
    {"repeat_penalty": 1.7, "repeat_last_n": 8},
    {"temperature": 0, "repeat_penalty": 3.0, "repeat_last_n": 100},
    {"top_p": 1.0, "temperature": 1e4},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("vocabulary", "pieces"), [(300, 290), (32000, 32000)])
def test_sampling_is_that_of_the_host(options, vocabulary, pieces):
    """Every token that is drawn is one that the host could draw, and with the same random number mostly the same."""
    from bitnet_lit.inference.engines.cuda.sampling import (
        UNIFORMS,
        SamplingState,
        Variant,
        option_numbers,
        sample,
    )

    rows, options = 16, GenerationConfig(seed=3, **options)
    host, ahead = ([Sampler(options, row) for row in range(rows)] for _ in range(2))
    state, variant = SamplingState(rows, torch.device("cuda")), Variant.of(options, pieces)
    state.options.copy_(torch.tensor(option_numbers(options, pieces)))
    state.uniform.copy_(torch.tensor([[one.uniform() for _ in range(UNIFORMS)] for one in ahead], dtype=torch.float64))
    ids = [[7 * row, 3] for row in range(rows)]
    state.length.fill_(2)
    state.recent[:, :2] = torch.tensor(ids)
    position, same = torch.full((rows,), 5, device="cuda"), 0
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        logits = 3 * torch.randn(rows, vocabulary, generator=generator)
        sample(logits.cuda(), state, position, variant, advance=True)
        assert torch.equal(state.token, state.drawn)
        for row, token in enumerate(state.drawn.tolist()):
            known = logits[row, :pieces].numpy()
            assert distribution(known, ids[row], options)[token] > 0
            same += token == host[row].draw(known, ids[row])
            ids[row].append(token)
    assert position.tolist() == [15] * rows
    assert same >= 0.98 * 10 * rows  # a number within the rounding of a float32 sum of a border falls on its other side


def test_logits_that_are_no_numbers_are_found():
    from bitnet_lit.inference.engines.cuda.sampling import SamplingState, Variant, option_numbers, sample

    options = GenerationConfig()
    state = SamplingState(3, torch.device("cuda"))
    state.options.copy_(torch.tensor(option_numbers(options, 300)))
    logits = torch.zeros(3, 300, device="cuda")
    logits[1, 5], logits[2, 7] = math.nan, math.inf
    sample(logits, state, torch.zeros(3, dtype=torch.int64, device="cuda"), Variant.of(options, 300), advance=False)
    assert state.drawn[0] >= 0 and state.drawn[1:].tolist() == [-1, -1]
    assert ((state.token >= 0) & (state.token < 300)).all()


def test_packing_on_the_gpu_is_packing_on_the_cpu():
    codes = torch.randint(-1, 2, (40, 700), dtype=torch.int8)
    assert torch.equal(pack_words(codes.cuda()).cpu(), pack_words(codes))
    assert torch.equal(permute_bytes(codes.cuda()).cpu(), permute_bytes(codes))
