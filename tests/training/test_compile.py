"""Which parts of a network are compiled, and a compiler that fails."""

import os

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from bitnet_lit.cli import compose
from bitnet_lit.errors import UserError
from bitnet_lit.native import build
from bitnet_lit.training import module as module_file
from bitnet_lit.training.compile import CACHE, compile_failure, compile_networks, is_compiled, undo_compile
from bitnet_lit.training.run import train
from tests.support import TINY_RUN, tiny_model


def test_the_layers_and_the_loss_of_our_network_are_compiled_and_a_foreign_network_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model = tiny_model()
    names = set(model.state_dict())
    compile_networks(model)
    compiled = {name for name, part in model.named_modules() if part._compiled_call_impl is not None}
    assert compiled == {"model.layers.0", "model.layers.1", "model.norm", "softmax_gradient", "token_losses"}
    assert set(model.state_dict()) == names and is_compiled(model)
    undo_compile(model)
    assert not is_compiled(model)
    foreign = torch.nn.Sequential(torch.nn.Linear(2, 2))
    compile_networks(foreign)
    assert foreign._compiled_call_impl is not None and foreign[0]._compiled_call_impl is None


def test_kernels_are_kept_in_the_users_cache_if_it_can_be_written(tmp_path, monkeypatch):
    in_tmp = os.path.abspath(default_cache_dir())  # PyTorch writes it into the environment as it is imported
    monkeypatch.setattr(build, "cache_folders", lambda: [tmp_path / "file", tmp_path / "cache"])
    (tmp_path / "file").touch()
    ours = str(tmp_path / "cache" / "torchinductor")
    for before, after in ((in_tmp, ours), ("/x", "/x")):
        monkeypatch.setenv(CACHE, before)
        compile_networks(tiny_model())
        assert os.environ[CACHE] == after
    monkeypatch.setattr(build, "cache_folders", lambda: [tmp_path / "file"])
    monkeypatch.setenv(CACHE, in_tmp)
    compile_networks(tiny_model())
    assert os.environ[CACHE] == in_tmp


def failing_once(monkeypatch):
    """The first pass of a run fails as a compiler does."""
    failure = type("InductorError", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    original, calls = module_file.batch_loss, []

    def batch_loss(model, batch):
        calls.append(batch)
        if len(calls) == 1:
            raise failure("no compiler\nin sight")
        return original(model, batch)

    monkeypatch.setattr(module_file, "batch_loss", batch_loss)


def test_a_compiler_that_fails_is_one_line_and_the_run_goes_on(tmp_path, shards, monkeypatch, capsys):
    options = [f"run_dir={tmp_path}/run", f"data.dir={shards}", *TINY_RUN, "trainer.max_steps=2"]
    failing_once(monkeypatch)
    assert train(compose("train", options))["steps"] == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: not compiled")]
    assert len(lines) == 1 and "no compiler in sight" in lines[0]


def test_only_the_compilers_own_errors_are_its_failures():
    assert compile_failure(RuntimeError("CUDA out of memory")) is None
    assert compile_failure(torch._dynamo.exc.Unsupported("a\nb")) == "a b"


def test_compile_true_does_not_go_on_without(tmp_path, shards, monkeypatch):
    options = [f"run_dir={tmp_path}/run", f"data.dir={shards}", *TINY_RUN, "compile=true"]
    failing_once(monkeypatch)
    with pytest.raises(RuntimeError, match="no compiler"):
        train(compose("train", options))


def test_kernels_that_cannot_be_compiled_are_not_asked_for_with_compile_true(tmp_path, shards):
    options = [f"run_dir={tmp_path}/run", f"data.dir={shards}", *TINY_RUN, "compile=true", "quant.kernel=native"]
    with pytest.raises(UserError, match=r"quant.kernel=native: cannot run here \(torch.compile cannot trace"):
        train(compose("train", options))
