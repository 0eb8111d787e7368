"""A `Start` is the checkpoint that a run goes on from. It must fit the run's data, network and length."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from bitnet_lit.checkpoints.formats.model_folder import trained_step
from bitnet_lit.errors import UserError
from bitnet_lit.files.foreign_json import read_json
from bitnet_lit.files.json_shapes import Integer, Record
from bitnet_lit.runs.folder import BEST, CHECKPOINTS, LAST, METRICS_NAME, MODEL, MODEL_LAST, find_run
from bitnet_lit.training.checkpoint_file import read_checkpoint
from bitnet_lit.training.identity import check_identity
from bitnet_lit.training.plan import Plan
from bitnet_lit.training.quantization_start import QUANTIZED_SINCE

_METRICS = Record({"steps": Integer(0, 2**63 - 1)})


@dataclass(frozen=True)
class Start:
    """Describes the checkpoint that a run goes on from. Its tensors stay in the file.

    Attributes:
        folder: the run folder.
        path: the checkpoint file.
        step: optimizer steps that are done.
        shapes: shapes of the network's tensors, by name.
        state: `state_dict` of the callback `Checkpoints`: the best loss so far, what was written, and the run's
            identity; empty where the checkpoint has none.
        quantized_since: the optimizer step from which the network is quantized; None where it still is dense.
    """

    folder: Path
    path: Path
    step: int
    shapes: dict[str, tuple[int, ...]]
    state: dict[str, Any]
    quantized_since: int | None

    def plan(self, plan: Plan) -> Plan:
        """Return the plan of the resumed run: what is quantized stays quantized, however long the run is now."""
        return plan if self.quantized_since is None else replace(plan, quantization_step=self.quantized_since)

    @property
    def sequences_per_step(self) -> int | None:
        """Sequences of the run's optimizer steps; None in a checkpoint of an earlier version."""
        value = self.state.get("sequences_per_step")
        return value if isinstance(value, int) else None

    def check_identity(self, now: dict[str, Any], has_hashed: bool = True) -> None:
        """Compare the run's identity in the checkpoint with the one it has now (see `identity.check_identity`).

        Raises:
            UserError: they differ.
        """
        saved = self.state.get("identity")
        if isinstance(saved, dict):  # checkpoints of earlier versions hold no identity
            check_identity(saved, now, str(self.folder), has_hashed)

    def check_weights(self, model: nn.Module) -> None:
        """Compare the names and shapes of the checkpoint's weights with those of the network.

        Raises:
            UserError: they differ.
        """
        saved = self.shapes
        wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        different = [name for name in {**wanted, **saved} if wanted.get(name) != saved.get(name)]
        if different:
            name = different[0]
            raise UserError(
                f"{self.path}: does not fit the run's config: {name} is {saved.get(name, 'missing')} there, and "
                f"{wanted.get(name, 'not wanted')} in the network: give the config or the checkpoint as it was"
            )

    def check_incomplete(self, steps: int, others: dict[str, Any]) -> None:
        """Make sure that a run of `steps` optimizer steps is not complete yet.

        Args:
            others: `callbacks.extra` of the config. One of these callbacks may have ended the run.

        Raises:
            UserError: the run is complete.
        """
        was_stopped = self.state.get("stopped_by") is not None and self.state["stopped_by"] == others
        if (self.step < steps and not was_stopped) or not self._is_complete():
            return
        if self.step < steps:
            name = next(iter(others), "<name>")
            raise UserError(
                f"resume={self.folder}: complete: a callback ended it at step {self.step} of {steps}: to go "
                f"on, change what ended it, such as callbacks.extra.{name}.<key>=..., or take it out: "
                f"callbacks.extra.{name}=null"
            )
        raise UserError(
            f"resume={self.folder}: complete at step {self.step}: give a larger trainer.max_steps to go on, and with "
            f"it schedule.total_steps, if the run has none: {self.step} keeps the curve, the new length stretches it"
        )

    def _is_complete(self) -> bool:
        """Return whether every file that a run writes at its end exists and belongs to this checkpoint."""
        folder = self.folder
        try:
            reported = read_json(folder / METRICS_NAME, _METRICS, "remove it")["steps"]
        except UserError:
            return False
        best = self.state.get("best_step", trained_step(folder / MODEL))  # checkpoints of earlier versions lack it
        if self.path.name != LAST:  # if last.ckpt is damaged, a resume makes it again
            try:
                read_checkpoint(folder / CHECKPOINTS / LAST)
            except UserError:
                return False
        return (
            reported == self.step == self.state.get("validated_step", self.step)
            and trained_step(folder / MODEL) == best
            and (folder / CHECKPOINTS / BEST).exists()
            and (best == self.step or trained_step(folder / MODEL_LAST) == self.step)
        )


def read_start(resume: str) -> Start:
    """Read the checkpoint that `resume=` names: a checkpoint file, or last.ckpt of a run folder.

    Raises:
        UserError: the checkpoint is missing or damaged. If best.ckpt can be read, the text offers it.
    """
    folder, path = find_run(resume)
    try:
        content = read_checkpoint(path)
    except UserError as error:
        best = folder / CHECKPOINTS / BEST
        if path == best or not best.exists():
            raise UserError(f"{error}: put a copy of it there, or start again") from None
        try:
            step = read_checkpoint(best)["global_step"]
        except UserError:
            raise UserError(f"{error}: {BEST} cannot be read either: put a copy there, or start again") from None
        raise UserError(f"{error}: {BEST} is whole, go on from its step {step}: resume={best}") from None
    state = content["callbacks"].get("Checkpoints")
    return Start(
        folder,
        path,
        int(content["global_step"]),
        {name.removeprefix("model."): tuple(tensor.shape) for name, tensor in content["state_dict"].items()},
        state if isinstance(state, dict) else {},
        content.get(QUANTIZED_SINCE, 0),
    )
