"""Counts against the built model and against a hand count."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bitnet_lit.cli import compose
from bitnet_lit.composed_config import CONF_DIR
from bitnet_lit.config import QuantConfig
from bitnet_lit.model import build_model
from bitnet_lit.model.accounting import account
from tests.support import tiny_config, tiny_model

# model=custom is a network of the user's own, which is counted by its parameters.
SIZES = sorted(path.stem for path in Path(CONF_DIR, "model").glob("*.yaml") if path.stem != "custom")


@pytest.mark.parametrize("size", SIZES)
def test_every_size_counts_what_it_builds(size):
    config = compose("train", [f"model={size}", "run_dir=unused"]).model
    config.vocab_size = 32000
    model = build_model(config, QuantConfig(), device="meta")
    counted = account(config, QuantConfig())
    assert counted.parameters == sum(p.numel() for p in model.parameters())


def test_the_sizes_asked_for_are_there():
    asked = ["demo", "15m", "42m", "110m", "700m", "1.3b", "3b", "2b4t", "bitnet_rs", "llama2c_15m", "llama2c_42m"]
    assert set(asked) <= set(SIZES)


def test_hand_count():
    # hidden 32, kv 16, ffn 64, 2 layers, vocabulary 512, sub-norms
    counted = account(tiny_config(num_key_value_heads=2), QuantConfig(), sequence_length=64)
    assert counted.projections == 2 * (32 * 32 * 2 + 32 * 16 * 2 + 32 * 64 * 3)
    assert counted.embedding == 512 * 32
    assert counted.norms == 2 * (32 + 32 + 32 + 64) + 32
    assert counted.forward_flops_per_token == 2 * (counted.projections + 512 * 32) + 2 * (4 * 32 * 65 / 2)


def test_matrix_flops_agree_with_torchs_counter():
    model = tiny_model("none")
    ids = torch.zeros(1, 64, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids)
    counts = counter.get_flop_counts()["Global"]
    matrices = sum(flops for operation, flops in counts.items() if "mm" in str(operation))
    counted = account(model.config, QuantConfig(name="none"), 64)
    attention = 2 * (4 * 32 * 65 / 2)
    assert matrices == 64 * (counted.forward_flops_per_token - attention)


def test_projections_that_stay_dense_count_their_32_bits():
    config = tiny_config(hidden_size=32, intermediate_size=64)
    ternary = account(config, QuantConfig()).bits_per_weight
    found = account(config, QuantConfig(skip=["lm_head", "down_proj"])).bits_per_weight
    share = 32 * 64 / (4 * 32 * 32 + 3 * 32 * 64)  # of down_proj among the weights of a layer
    assert found == pytest.approx(32 * share + ternary * (1 - share), rel=0.02)  # scales are of matrices of other sizes
    assert account(config, QuantConfig(name="none")).bits_per_weight == 32
