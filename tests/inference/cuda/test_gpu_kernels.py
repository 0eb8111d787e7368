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
        drawn = state.token.tolist()  # waits for the GPU
        assert state.drawn[step].tolist() == drawn
        for row, token in enumerate(drawn):
            known = logits[row, :pieces].numpy()
            assert distribution(known, ids[row], options)[token] > 0
            same += token == host[row].draw(known, ids[row])
            ids[row].append(token)
    assert position.tolist() == [15] * rows
    assert same >= 0.98 * 10 * rows  # a number within the rounding of a float32 sum of a border falls on its other side


@pytest.mark.parametrize("rows", [1, 3, 64])
def test_programs_of_a_text_agree(rows):
    """A text has as many programs as the GPU has room for. They find one threshold, and draw one token."""
    from bitnet_lit.inference.engines.cuda.sampling import SamplingState, Variant, option_numbers, sample

    pieces, drawn = 128256, []
    for options in (GenerationConfig(), GenerationConfig(top_k=40, top_p=0.9), GenerationConfig(temperature=0)):
        logits = 2 * torch.randn(rows, pieces, generator=torch.Generator().manual_seed(rows)).cuda()
        for _ in range(3):
            state = SamplingState(rows, torch.device("cuda"))
            state.options.copy_(torch.tensor(option_numbers(options, pieces)))
            state.uniform.fill_(0.37)
            position = torch.zeros(rows, dtype=torch.int64, device="cuda")
            sample(logits, state, position, Variant.of(options, pieces), advance=True)
            assert state.launch.tolist() == [1] * rows and position.tolist() == [1] * rows
            drawn.append(state.token.tolist())
            for row, token in enumerate(drawn[-1][:3]):
                assert distribution(logits[row].cpu().numpy(), [], options)[token] > 0
        assert drawn[-1] == drawn[-2] == drawn[-3]


def test_a_launch_does_not_read_what_an_earlier_one_sent():
    """Programs tell messages of a launch from those before, however many of them a text had then."""
    from bitnet_lit.inference.engines.cuda.sampling import SamplingState, Variant, option_numbers, sample

    rows, device = 2, torch.device("cuda")
    position = torch.zeros(rows, dtype=torch.int64, device=device)
    kept = SamplingState(rows, device)
    for launch in range(300):
        generator = torch.Generator().manual_seed(launch)
        options, pieces = (
            (GenerationConfig(temperature=0), 32000),
            (GenerationConfig(), 32000),
            (GenerationConfig(top_k=9), 40000),
            (GenerationConfig(), 900),
        )[int(torch.randint(4, (), generator=generator))]
        logits = 2 * torch.randn(rows, pieces, generator=generator).cuda()
        drawn = []
        for state in (kept, SamplingState(rows, device)):
            state.options.copy_(torch.tensor(option_numbers(options, pieces)))
            state.uniform.fill_(0.37)
            sample(logits, state, position, Variant.of(options, pieces), advance=True)
            drawn.append(state.token.tolist())
        assert drawn[0] == drawn[1], launch
    assert kept.launch.tolist() == [300] * rows


@pytest.mark.parametrize(
    ("half", "heads", "reach", "splits", "positions", "largest"),
    [
        (True, (4, 2, 32), 256, 4, (0, 5, 63, 64, 130, 255, -1), 1),  # a program for each block
        (True, (20, 5, 128), 1024, 2, (0, 31, 512, 700, 1023, -1), 1),  # several blocks in a program
        (True, (4, 2, 32), 256, 4, (0, 5, 63, 64, 130, 255, -1), 1e6),  # a key and a value beyond float16
        (False, (3, 3, 18), 256, 1, (0, 33, 200, -1), 1),  # an odd size, and norms of queries and keys
    ],
)
def test_attention_over_the_past(half, heads, reach, splits, positions, largest):
    from bitnet_lit.inference.engines.cuda.kernels.attention import attend

    (H, KV, P), rows, dtype = heads, len(positions), torch.float16 if half else torch.float32
    torch.manual_seed(0)
    caches = [torch.randn(2, 2, KV, reach, P, dtype=dtype, device="cuda") for _ in positions]
    before = [cache[1].float() for cache in caches]
    qkv, cos, sin = (torch.randn(*shape, device="cuda") for shape in ((rows, (H + 2 * KV) * P), (reach, P), (reach, P)))
    qkv[:, [H * P + 3, -5]] *= largest
    q_norm, k_norm = torch.rand(P, device="cuda"), torch.rand(P, device="cuda")
    address = torch.tensor([cache.data_ptr() for cache in caches]).cuda()
    room, position = torch.full((rows,), reach).cuda(), torch.tensor(positions).cuda()
    block_p = max(16, 1 << (P - 1).bit_length())
    partial = torch.empty(rows, KV, splits, H // KV, block_p + 2, device="cuda")
    counter = torch.zeros(rows, KV, dtype=torch.int32, device="cuda")
    y = torch.zeros(rows, H * P, device="cuda")
    attend[(rows, KV, splits)](
        y, qkv, cos, sin, q_norm, k_norm, address, room, position, partial, counter, 1, reach // splits, P**-0.5, 1e-5,
        H=H, KV=KV, P=P, BLOCK_C=64 if reach // splits == 64 else 32, BLOCK_P=block_p, BLOCK_G=16, HALF=half,
        QK_NORM=not half, PDL=False,
    )  # fmt: skip
    assert not counter.any()

    def rotated(x, norm, at):
        x = x if half else torch.nn.functional.rms_norm(x, (P,), norm, 1e-5)
        return x * cos[at] + torch.cat([-x[:, P // 2 :], x[:, : P // 2]], dim=1) * sin[at]

    for row, at in enumerate(positions):
        if at < 0:
            assert not y[row].any()
            continue
        q, k, v = qkv[row].view(-1, P).split([H, KV, KV])
        q, k = rotated(q, q_norm, at), rotated(k, k_norm, at)
        keys, values = before[row][:, :, : at + 1].clone()
        most = torch.finfo(dtype).max  # as the CPU keeps what is larger
        keys[:, at], values[:, at] = k.clamp(-most, most).to(dtype), v.clamp(-most, most).to(dtype)
        stored = torch.stack([keys[:, at], values[:, at]])  # the last bit of a float16 is 1e-3 of it
        torch.testing.assert_close(caches[row][1, :, :, at].float(), stored, rtol=2e-3, atol=1e-5)
        keys, values = (one.repeat_interleave(H // KV, dim=0).double() for one in (keys, values))
        share = (torch.einsum("hp,hcp->hc", q.double(), keys) * P**-0.5).softmax(dim=1)
        expected = torch.einsum("hc,hcp->hp", share, values).flatten().float()
        # Scores of float16 queries are off by 1e-3 of their size, about 4 here; a mean of values by as much.
        torch.testing.assert_close(y[row], expected, rtol=2e-2 if largest > 1 else 0, atol=2e-2 if half else 1e-5)


def test_logits_that_are_no_numbers_are_found():
    from bitnet_lit.inference.engines.cuda.sampling import SamplingState, Variant, option_numbers, sample

    options = GenerationConfig()
    state = SamplingState(3, torch.device("cuda"))
    state.options.copy_(torch.tensor(option_numbers(options, 300)))
    logits = torch.zeros(3, 300, device="cuda")
    logits[1, 5], logits[2, 7] = math.nan, math.inf
    sample(logits, state, torch.zeros(3, dtype=torch.int64, device="cuda"), Variant.of(options, 300), advance=False)
    assert ((state.token >= 0) & (state.token < 300)).all()  # waits for the GPU
    assert state.drawn[0, 0] >= 0 and state.drawn[0, 1:].tolist() == [-1, -1]


def test_packing_on_the_gpu_is_packing_on_the_cpu():
    codes = torch.randint(-1, 2, (40, 700), dtype=torch.int8)
    assert torch.equal(pack_words(codes.cuda()).cpu(), pack_words(codes))
    assert torch.equal(permute_bytes(codes.cuda()).cpu(), permute_bytes(codes))
