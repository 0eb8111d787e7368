"""The writers one by one, against the libraries whose formats they write."""

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from bitnet_lit.checkpoints.formats.gguf import ERRORS
from bitnet_lit.checkpoints.formats.latent import round_keeping_codes
from bitnet_lit.checkpoints.formats.q6_k import quantize_q6_k
from bitnet_lit.checkpoints.safetensors_writer import LazyTensor, write_safetensors
from bitnet_lit.errors import UserError
from bitnet_lit.quant.weights import AbsMean, AbsMedian, PerGroup, PerRow, Sign

DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.int8]
NAMES = st.text("abz.019_", min_size=1, max_size=12)
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(NAMES, st.tuples(SHAPES, st.sampled_from(DTYPES)), max_size=8), st.integers(0, 99))
def test_safetensors_are_written_as_the_library_writes_them(tmp_path_factory, described, seed):
    folder = tmp_path_factory.mktemp("safetensors")
    torch.manual_seed(seed)
    tensors = {name: (torch.rand(shape) * 200).to(dtype) for name, (shape, dtype) in described.items()}
    save_file(tensors, folder / "theirs", metadata={"format": "pt"})
    lazy = [LazyTensor(name, tuple(t.shape), t.dtype, lambda t=t: t) for name, t in tensors.items()]
    write_safetensors(folder / "ours", lazy)
    assert (folder / "ours").read_bytes() == (folder / "theirs").read_bytes()
    assert sum(tensor.nbytes for tensor in lazy) == sum(t.numel() * t.element_size() for t in tensors.values())


def test_a_tensor_that_is_not_as_announced_is_our_bug(tmp_path):
    with pytest.raises(AssertionError, match="announced"):
        write_safetensors(tmp_path / "x", [LazyTensor("a", (2, 3), torch.float32, lambda: torch.zeros(3, 2))])


def q6_k_error(rows):
    """Largest error of a value over the largest magnitude of all, as the gate measures it."""
    stored = quantize_q6_k(rows)
    assert stored.dtype == np.uint8 and stored.shape == (len(rows), rows.shape[1] // 256 * 210)
    found = dequantize(stored, GGMLQuantizationType.Q6_K)
    return float(np.abs(found - rows).max()) / (float(np.abs(rows).max()) or 1.0)


@settings(max_examples=100, deadline=None)
@given(
    # One group of 16 drawn value by value and two more drawn at random: all that the parts of a block have in common.
    arrays.arrays(np.float32, (16,), elements=st.floats(-1, 1, width=32)),
    st.integers(0, 2**31),
    # The fp16 factor of a block whose largest value is 1e-3 is no normal number any more, and has few bits.
    st.sampled_from([1e-3, 0.02, 1.0, 60.0]),
    st.sampled_from([0.0, 1e-3, 0.3, 1.0]),
)
def test_q6_k_stays_within_its_bound(group, seed, size, others):
    rows = np.random.default_rng(seed).uniform(-others, others, size=(2, 256)).astype(np.float32)
    rows[0, 32:48] = group
    largest = np.abs(rows).max() or np.float32(1)
    assert q6_k_error(rows / largest * np.float32(size)) <= ERRORS["q6_k"]


@pytest.mark.parametrize(
    "kind", ["normal", "zeros", "outlier", "both signs", "one group", "alternating", "a block of zeros", "tiny blocks"]
)
def test_q6_k_on_shapes_that_break_quantizers(kind):
    rows = np.random.default_rng(0).normal(size=(16, 512)).astype(np.float32)
    if kind == "zeros":
        rows[:] = 0
    elif kind == "outlier":
        rows[:, 7] = 1000
    elif kind == "both signs":  # the code of one is -32, of the other 31: not 32, which would be a step off
        rows[:, 3], rows[:, 5] = 4, -4
    elif kind == "one group":
        rows[:, 16:] = 0
    elif kind == "alternating":
        rows[:] = np.where(np.arange(512) % 2, 1, -1)
    elif kind == "a block of zeros":
        rows[:, :256] = 0
    elif kind == "tiny blocks":
        rows[:, :256] *= 1e-6
    assert q6_k_error(rows) <= ERRORS["q6_k"]
    if kind == "normal":
        # Rounding to 32 steps each way, uniformly: sqrt(1/12) of a step of about 3 sigma / 32 in each block.
        found = dequantize(quantize_q6_k(rows), GGMLQuantizationType.Q6_K)
        assert np.sqrt(np.mean((found - rows) ** 2)) < 0.02


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(
        [
            AbsMean(),
            AbsMedian(),
            Sign(),
            AbsMean(PerRow()),
            AbsMedian(PerRow()),
            AbsMean(PerGroup(4)),
            AbsMean(PerGroup(32)),
        ]
    ),
    st.integers(0, 2**31),
    st.sampled_from([(4, 32), (8, 64), (64, 64), (3, 1)]),
    st.sampled_from([1e-4, 0.02, 1.0, 50.0]),
    st.sampled_from(["normal", "grid", "ternary", "constant", "outlier"]),
)
def test_bfloat16_weights_keep_their_codes(rule, seed, shape, size, kind):
    assume(shape[1] > 1 or not isinstance(rule.granularity, PerGroup))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator)
    if kind == "grid":  # many weights on the rounding borders, at half of the scale
        weight = (weight * 4).round() / 4
    elif kind == "ternary":
        weight = weight.round().clamp(-1, 1) * 0.7
    elif kind == "constant":
        weight = torch.full(shape, float(weight.flatten()[0]))
    elif kind == "outlier":
        weight.flatten()[0] = 1e3
    weight = weight * size
    codes, scale = rule.quantize(weight)
    # The sign of a weight against a mean that is the weight itself is that of the mean's own float rounding.
    assume(not (rule == Sign() and kind == "constant"))
    rounded = round_keeping_codes(weight, rule)
    assert rounded.dtype == torch.bfloat16
    found, found_scale = rule.quantize(rounded)
    assert torch.equal(found, codes)
    # Half a step of 8 bits, and for the few that were moved off a border another step: never more than the gate allows.
    assert float((found_scale / scale - 1).abs().max()) <= 2.0**-8
    assert float((rounded.float() - weight).abs().max()) <= ERRORS["bf16"] * 3 * float(weight.abs().max())


def test_bfloat16_that_cannot_keep_the_codes_says_so(monkeypatch):
    monkeypatch.setattr("bitnet_lit.checkpoints.formats.latent.MAX_ROUNDS", 0)
    with pytest.raises(UserError, match="export it as float32"):
        round_keeping_codes(torch.randn(8, 8), AbsMean())
