"""Reading the metrics.csv of a run: its first column is the optimizer step, the others are what was logged at it."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from bitnet_lit.errors import UserError
from bitnet_lit.runs.folder import CSV_NAME


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The rows of a metrics.csv; empty cells are left out, and so is a last line that is only half there.

    Raises:
        UserError: it is no such file, or damaged.
    """
    remedy = "put a copy of it there, or move it away"
    try:
        whole = path.read_bytes().rpartition(b"\n")[0].decode("utf-8")
        header, *lines = list(csv.reader(io.StringIO(whole, newline=""), strict=True)) or [["step"]]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged ({error}): {remedy}") from None
    if header[:1] != ["step"]:
        raise UserError(f"{path}: not the {CSV_NAME} of a run (its first column is not step): {remedy}")
    for number, cells in enumerate(lines, 2):
        if len(cells) != len(header) or not cells[0].isascii() or not cells[0].isdigit():
            raise UserError(f"{path}: damaged (line {number} is no row of {len(header)} cells): {remedy}")
    return [{key: value for key, value in zip(header, cells, strict=True) if value} for cells in lines]
