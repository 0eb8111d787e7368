"""Jobs side by side have GPUs of their own, and take them over from processes that ended."""

import os

import pytest
from omegaconf import OmegaConf

from bitnet_lit.runs import devices


@pytest.mark.parametrize(
    ("gpus", "accelerator", "of_a_job", "jobs"),
    [
        (4, "auto", 1, 4),
        (4, "gpu", 2, 2),
        (4, "gpu", "2", 2),
        (4, "gpu", 8, 1),
        (4, "gpu", "auto", 1),  # a job takes all of them
        (4, "cpu", 1, 2),
        (0, "auto", 1, 2),
    ],
)
def test_as_many_jobs_as_there_are_gpus_for(monkeypatch, gpus, accelerator, of_a_job, jobs):
    monkeypatch.setattr(devices, "visible_gpus", lambda: [str(index) for index in range(gpus)])
    assert devices.parallel_jobs(accelerator, of_a_job) == jobs


@pytest.mark.parametrize(
    ("gpus", "accelerator", "of_a_job", "at_once", "has_note"),
    [
        (2, "auto", 1, 3, True),
        (2, "auto", 1, -1, True),
        (2, "gpu", 2, 2, True),
        (2, "gpu", 1, 2, False),
        (2, "gpu", 1, 1, False),
        (2, "cpu", 1, 3, False),
        (0, "auto", 1, 3, False),
        (2, "auto", 1, None, False),  # another launcher
    ],
)
def test_jobs_that_share_a_gpu_are_told_of_mps(
    tmp_path, monkeypatch, capsys, gpus, accelerator, of_a_job, at_once, has_note
):
    monkeypatch.setattr(devices, "visible_gpus", lambda: [str(index) for index in range(gpus)])
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    launcher = {} if at_once is None else {"n_jobs": at_once}
    trainer = {"accelerator": accelerator, "devices": of_a_job}
    config = OmegaConf.create({"hydra": {"launcher": launcher}, "trainer": trainer})
    devices.note_sharing(config)
    assert ("nvidia-cuda-mps-control -d" in capsys.readouterr().err) == has_note
    (tmp_path / "control").touch()  # the daemon runs
    devices.note_sharing(config)
    assert capsys.readouterr().err == ""


def test_a_slot_is_one_process_and_is_free_when_that_ends(tmp_path):
    held = [devices.free_slot(tmp_path) for _ in range(3)]
    assert [number for number, _ in held] == [0, 1, 2]
    os.close(held[1][1])  # as when its process ends
    number, descriptor = devices.free_slot(tmp_path)
    assert number == 1
    for each in (held[0][1], held[2][1], descriptor):
        os.close(each)


def test_slots_have_different_gpus():
    assert [devices.gpus_of_slot(slot, ["0", "1", "2", "3"], 1) for slot in range(4)] == [["0"], ["1"], ["2"], ["3"]]
    assert [devices.gpus_of_slot(slot, ["4", "5", "6", "7"], 2) for slot in range(3)] == [
        ["4", "5"],
        ["6", "7"],
        ["4", "5"],  # more slots than GPUs
    ]


def test_a_process_sees_its_gpus_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "visible_gpus", lambda: ["2", "5"])
    monkeypatch.setattr(devices, "_taken", [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    first = devices.free_slot(tmp_path / devices.SLOTS_NAME)  # another process
    devices.take_gpus(tmp_path, "gpu", 1)
    devices.take_gpus(tmp_path, "gpu", 1)  # its second job
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"
    for descriptor in (first[1], *devices._taken):
        os.close(descriptor)
