"""What a checkpoint says of its run is compared when the run goes on, by the ranks that know it."""

import pytest

from bitnet_lit.errors import UserError
from bitnet_lit.runs.ranks import is_first_of_node
from bitnet_lit.training.identity import check_identity

TEACHER = "distill.teacher's sha256"


def test_a_rank_that_did_not_hash_the_teacher_leaves_it_to_the_first_of_its_node():
    saved, now = {"seed": 1, TEACHER: "aa"}, {"seed": 1, TEACHER: None}
    with pytest.raises(UserError, match="distill.teacher's sha256 was aa"):
        check_identity(saved, now, "run")
    check_identity(saved, now, "run", has_hashed=False)
    with pytest.raises(UserError, match="seed was 1"):
        check_identity(saved, now | {"seed": 2}, "run", has_hashed=False)


@pytest.mark.parametrize(
    ("environment", "is_first"),
    [
        ({}, True),
        ({"RANK": "8", "LOCAL_RANK": "0"}, True),
        ({"RANK": "9", "LOCAL_RANK": "1"}, False),
        ({"SLURM_PROCID": "3", "SLURM_LOCALID": "1"}, False),
    ],
    ids=str,
)
def test_the_first_rank_of_a_node(monkeypatch, environment, is_first):
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_first_of_node() is is_first
