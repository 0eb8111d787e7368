"""What a run that ends says: the reason once, and what is kept."""

from pathlib import Path

import pytest

from bitnet_lit.errors import DataError, Diverged, TrainingStopped, UserError
from bitnet_lit.training.failures import in_one_line


def ended_by(error, folder):
    with pytest.raises(type(error)) as raised, in_one_line(lambda: folder, world_size=2, rank=1):
        raise error
    return raised.value


def test_a_stop_keeps_its_words_whatever_the_folder_is_called(tmp_path):
    """A folder's name must not be taken for an error of NCCL."""
    stopped = ended_by(TrainingStopped("SIGTERM at step 9: saved; resume=outputs/nccl_test", 143), tmp_path)
    assert str(stopped) == "SIGTERM at step 9: saved; resume=outputs/nccl_test" and stopped.status == 143


@pytest.mark.parametrize("kind", [UserError, DataError, Diverged])
def test_what_is_kept_is_said(tmp_path, kind):
    assert str(ended_by(kind("why"), tmp_path)) == "why; there is no checkpoint yet: start again"
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_text("x")
    end = f"the last checkpoint is kept: go on with python -m bitnet_lit.train resume={tmp_path}"
    assert str(ended_by(kind("why"), tmp_path)) == f"why; {end}"


def test_the_folder_is_the_one_that_the_ranks_agreed_on(tmp_path):
    folder = [Path("of_this_rank")]
    with pytest.raises(Diverged, match=f"resume={tmp_path}$"), in_one_line(lambda: folder[0], world_size=2, rank=1):
        folder[0] = tmp_path
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "last.ckpt").write_text("x")
        raise Diverged("the loss is nan")


def test_a_lost_connection_is_told_from_other_faults(tmp_path):
    with pytest.raises(TrainingStopped, match="rank 1 of 2 lost the others"), in_one_line(lambda: tmp_path, 2, 1):
        raise RuntimeError("[/pytorch/gloo/transport] Connection closed by peer")
    with pytest.raises(RuntimeError, match="^a bug$"), in_one_line(lambda: tmp_path, 2, 1):
        raise RuntimeError("a bug")
