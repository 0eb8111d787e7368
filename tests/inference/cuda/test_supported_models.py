"""What the CUDA engine refuses, by the name of the field or the scheme, and what it does not know of."""

from dataclasses import dataclass, fields

import pytest
import torch

import bitnet_lit
from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.config import EngineConfig, ModelConfig, QuantConfig
from bitnet_lit.errors import UserError
from bitnet_lit.inference.engines import choose
from bitnet_lit.inference.engines.cuda import supported_models
from bitnet_lit.inference.engines.cuda.supported_models import COMPUTED, why_unsupported
from bitnet_lit.model import tensors
from bitnet_lit.model.tensors import Kind, TensorSpec
from bitnet_lit.quant import register
from tests.quant.toy_schemes import Centered, Quinary, Threshold
from tests.support import tiny_config, tiny_model


@pytest.mark.parametrize(
    ("quant", "sizes", "why"),
    [
        ({"skip": ["lm_head", "down_proj"]}, {}, "quant.skip=['lm_head', 'down_proj']: in the CUDA engine the output"),
        ({"skip": []}, {}, "quant.skip=[]: in the CUDA engine the output head alone is dense"),
        ({"name": "b158_group"}, {}, "quant=b158_group: its scales are one for 128 inputs, the kernels have one for"),
        ({"name": "quinary"}, {}, "quant=quinary: its codes are -2, -1, 0, 1, 2, the kernels' are -1, 0 and +1"),
        ({"name": "centered"}, {}, "quant=centered: its layer computes more than a product of codes"),
        ({}, {"intermediate_size": 2**15 + 4}, "a matrix has 32772 inputs: the CUDA engine takes 32768 at most"),
        ({}, {"head_dim": 258}, "an attention head has 258 elements: the CUDA engine takes 256 at most"),
    ],
    ids=str,
)
def test_what_it_cannot_run_is_named(quant, sizes, why):
    for scheme in (Quinary, Centered):
        register(scheme)
    assert why_unsupported(tiny_config(**sizes), QuantConfig(**quant)).startswith(why)


@pytest.mark.parametrize("quant", ["b158", "b158_row", "b1", "none", "threshold"])
@pytest.mark.parametrize("sizes", [{}, {"qk_norm": True, "qkv_bias": True}, {"hidden_act": "relu2"}], ids=str)
def test_what_it_runs(quant, sizes):
    register(Threshold)
    assert why_unsupported(tiny_config(**sizes), QuantConfig(name=quant)) is None


def test_it_rounds_activations_to_any_number_of_bits():
    assert why_unsupported(tiny_config(), QuantConfig(activation_bits=4)) is None


def test_a_field_or_a_tensor_that_was_added_since_is_refused(monkeypatch):
    @dataclass
    class Newer(ModelConfig):
        logit_softcap: float = 0.0

    assert why_unsupported(Newer(), QuantConfig()) is None
    assert why_unsupported(Newer(logit_softcap=30.0), QuantConfig()).startswith("model.logit_softcap=30.0: ")
    assert COMPUTED.keys() <= {field.name for field in fields(ModelConfig)}
    added = TensorSpec("mlp.extra_norm.weight", Kind.NORM, ("intermediate_size",))
    monkeypatch.setattr(tensors, "LAYER", (*tensors.LAYER, added))
    assert why_unsupported(tiny_config(), QuantConfig()).startswith("tensor mlp.extra_norm.weight: ")


def test_the_options_of_the_engine():
    assert EngineConfig(engine="cuda").device == "cuda"
    assert EngineConfig(engine="cuda", device="cuda:1").device == "cuda:1"
    for options, why in (
        ({"device": "mps"}, "engine=cuda and device=mps: the CUDA engine runs on NVIDIA GPUs alone"),
        ({"head": "int4"}, r"engine=cuda and head=int4: the CUDA engine has head=auto\|int8\|float"),
        ({"kv_cache": "int8"}, r"engine=cuda and kv_cache=int8: the CUDA engine has kv_cache=half\|float"),
    ):
        with pytest.raises(UserError, match=why):
            EngineConfig(engine="cuda", **options)


def test_without_a_gpu_the_line_names_what_was_typed(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    save_model_folder(tmp_path / "model", tiny_model(), QuantConfig(), None)
    with pytest.raises(UserError, match="^engine=cuda: no NVIDIA GPU is available on this machine: take engine=auto$"):
        bitnet_lit.load(tmp_path / "model", engine="cuda")
    with pytest.raises(UserError, match="^device=cuda: not available on this machine: take device=cpu$"):
        bitnet_lit.load(tmp_path / "model", device="cuda")


def test_where_it_cannot_run_pytorch_does_and_says_why(tmp_path, monkeypatch):
    """A machine without the kernels: `auto` takes PyTorch with a note, and the engine's own name is refused."""
    monkeypatch.setattr(choose, "check_device", lambda *_: None)
    monkeypatch.setattr("bitnet_lit.inference.language_model.check_device", lambda *_: None)
    monkeypatch.setattr(supported_models, "why_unusable", lambda device: "triton is not installed: pip install triton")
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, device: self)  # the GPU that is not here
    save_model_folder(tmp_path / "model", tiny_model(), QuantConfig(), None)
    with pytest.warns(UserWarning, match="PyTorch runs it, slower than the CUDA engine: triton is not installed"):
        assert bitnet_lit.load(tmp_path / "model", device="cuda").engine.name == "PyTorch"
    with pytest.raises(UserError, match=r"engine=cuda: cannot run .*: triton is not installed.*: take engine=torch"):
        bitnet_lit.load(tmp_path / "model", engine="cuda")
