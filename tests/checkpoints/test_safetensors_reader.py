"""The numpy reader against the library's torch reader, for every dtype; maps; sharded files."""

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bitnet_lit.checkpoints.safetensors_reader import SafetensorsReader, safetensors_files
from bitnet_lit.errors import UserError

KNOWN = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i8": torch.int8,
    "u8": torch.uint8,
    "flag": torch.bool,
}


@pytest.fixture
def tensors():
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)) * 3
    values[0, 0] = float("inf")
    finite = values.nan_to_num(posinf=1).abs()
    return {name: (values if dtype.is_floating_point else finite).to(dtype) for name, dtype in KNOWN.items()}


def test_values_are_those_of_the_file(tmp_path, tensors):
    save_file({**tensors, "scalar": torch.tensor(2.5)}, tmp_path / "m.safetensors", metadata={"who": "me"})
    reader = SafetensorsReader([tmp_path / "m.safetensors"])
    assert reader.metadata == {"who": "me"} and reader.shapes()["f32"] == (3, 5)
    assert reader.read("scalar") == np.float32(2.5) and reader.read("scalar").shape == ()
    for name, tensor in tensors.items():
        expected = tensor.float() if tensor.is_floating_point() else tensor
        assert np.array_equal(reader.read(name), expected.numpy()), name
        assert reader.read(name).flags.writeable
    assert np.array_equal(reader.raw("f32"), tensors["f32"].numpy())
    assert np.array_equal(reader.raw("bf16"), tensors["bf16"].view(torch.uint16).numpy())
    assert np.array_equal(reader.raw("u8"), tensors["u8"].numpy()) and reader.raw("f16") is None
    place = reader.place("bf16")
    stored = os.pread(place.descriptor, tensors["bf16"].numel() * 2, place.offset)
    assert np.array_equal(np.frombuffer(stored, place.dtype), reader.raw("bf16").reshape(-1))
    assert reader.place("f16") is None


def test_several_files_by_an_index(tmp_path, tensors):
    save_file({"a": tensors["f32"]}, tmp_path / "one.safetensors")
    save_file({"b": tensors["u8"]}, tmp_path / "two.safetensors")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    reader = SafetensorsReader(safetensors_files(tmp_path))
    assert np.array_equal(reader.raw("b"), tensors["u8"].numpy()) and set(reader.shapes()) == {"a", "b"}


def test_a_dtype_that_is_not_known(tmp_path, tensors):
    save_file({"w": tensors["f32"].to(torch.float8_e4m3fn)}, tmp_path / "m.safetensors")
    with pytest.raises(UserError, match="tensor w is F8_E4M3: known are F64"):
        SafetensorsReader([tmp_path / "m.safetensors"])
