"""`read_metrics` reads the metrics.csv of a run.

The first column is the optimizer step. Each other column is a metric, and its cell is empty where it was not logged.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

from bitnet_lit.errors import UserError
from bitnet_lit.runs.folder import CSV_NAME


def read_metrics(path: Path) -> list[dict[str, str]]:
    """Return the rows of a metrics.csv as text by column. Empty cells and an incomplete last line are left out.

    Raises:
        UserError: the file cannot be read, is damaged, or is no metrics.csv.
    """
    remedy = "put a copy of it there, or move it away"
    try:
        whole = path.read_bytes().rpartition(b"\n")[0].decode("utf-8")
        header, *lines = list(csv.reader(io.StringIO(whole, newline=""), strict=True)) or [["step"]]
    except OSError as error:
        remedy = "check its permissions" if isinstance(error, PermissionError) else remedy
        raise UserError(f"{path}: cannot be read ({error.strerror}): {remedy}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged ({error}): {remedy}") from None
    if header[:1] != ["step"]:
        raise UserError(f"{path}: not the {CSV_NAME} of a run (its first column is not step): {remedy}")
    for number, cells in enumerate(lines, 2):
        if len(cells) != len(header) or not cells[0].isascii() or not cells[0].isdigit():
            raise UserError(f"{path}: damaged (line {number} is no row of {len(header)} cells): {remedy}")
    return [{key: value for key, value in zip(header, cells, strict=True) if value} for cells in lines]
