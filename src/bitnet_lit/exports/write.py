"""A model is exported to a file or folder that another tool runs.

The export is written to a temporary path, read back, compared with the original (`compare.py`), and only then renamed.
An export that differs is removed. The report is printed and kept beside the export as <name>.json, or in an exported
folder as export.json.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from glob import escape
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bitnet_lit.checkpoints.formats.format import WrittenTensor
from bitnet_lit.checkpoints.locate import find_model, open_stored
from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.config import ExportConfig
from bitnet_lit.errors import ParityError, UserError, disk_errors
from bitnet_lit.exports.compare import verify
from bitnet_lit.exports.destination import check_out, default_out, described_files, given_out, replaced, stem_of
from bitnet_lit.exports.share import check_repository, share
from bitnet_lit.files.temporary_paths import remove_leftovers
from bitnet_lit.terminal import console


def _sizes(stored: StoredModel, rows: list[WrittenTensor]) -> dict[str, float]:
    """Return the bytes of the tensors, the bits per weight with embeddings, and the ratio of fp16's size to this."""
    weights = sum(math.prod(shape) for shape in stored.tensors.values())
    total = sum(row.nbytes for row in rows)
    return {
        "bytes": total,
        "parameters": weights,
        "bits_per_weight": 8 * total / weights,
        "ratio_to_fp16": 2 * weights / total,
    }


def print_report(report: dict[str, Any], page: Console) -> None:
    """Print the table of tensors, the sizes and the comparisons. Equal tensors of all layers share one row."""
    table = Table(title=report["out"], box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for column in ("tensor", "n", "kind", "bits", "bytes", "error"):
        table.add_column(column, no_wrap=True, justify="left" if column in ("tensor", "kind") else "right")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in report["tensors"]:
        name = re.sub(r"\.\d+\.", ".*.", row["name"].removeprefix("model.").removesuffix(".weight"))
        groups.setdefault((name, row["kind"]), []).append(row)
    for (name, kind), rows in groups.items():
        errors = [row["error"] for row in rows if row["error"] is not None]
        values = sum(math.prod(row["shape"]) for row in rows)
        nbytes = sum(row["bytes"] for row in rows)
        error = f"{max(errors):.1e}" if errors else "-"
        table.add_row(name, str(len(rows)), kind, f"{8 * nbytes / values:.2f}", f"{nbytes:,}", error)
    page.print(table)
    sizes = report["sizes"]
    ratio = sizes["ratio_to_fp16"]
    page.print(
        f"{sizes['bytes'] / 1e6:,.1f} MB for {sizes['parameters']:,} parameters: {sizes['bits_per_weight']:.2f} bits a "
        f"weight with embeddings, {f'1/{ratio:.1f} of' if ratio >= 1 else f'{1 / ratio:.1f} times'} fp16"
    )
    for name, found in report["parity"].items():
        if isinstance(found, dict):
            page.print(
                f"{name}: loss {found['loss']:.4f} ({found['loss_difference']:+.1e}), logits differ by "
                f"{found['mean_logit_difference']:.1e} of their spread, {found['same_likeliest_token']:.1%} same "
                "tokens"
            )
        elif name == "loss_with_quantized_activations":
            page.print(
                f"its graph does not quantize activations: loss {report['parity']['loss']:.4f} there, {found:.4f} as "
                "trained"
            )
        elif isinstance(found, str):
            page.print(f"{name}: {found}")


def export(config: ExportConfig) -> dict[str, Any]:
    """Export a model and print the report.

    Returns:
        The report, as it is kept beside the export: out (not kept), format, target, sizes, tensors, parity, ...

    Raises:
        UserError: there is no model, the format cannot hold it, or it cannot be written to `out`.
        ParityError: the export differs from the model; it was removed.
    """
    if config.share is not None:
        check_repository(config.share)
    stored = open_stored(find_model(config.checkpoint))
    format = config.chosen_format
    if impossible := format.problems(stored.config, stored.quant):
        raise UserError(f"{stored.path} as {format.target}: {'; '.join(impossible)}")
    if warning := stored.info.get("warning"):
        print(f"warning: {stored.path}: {warning}", file=sys.stderr)
    for option in config.unused_options:
        print(f"note: {option} has no effect: format={format.name} has no such option", file=sys.stderr)
    out = given_out(config.out) if config.out else default_out(format, stored.path)
    runs_there = not format.tool_problems(stored.config, stored.quant)
    report: dict[str, Any] = {
        "out": str(out),
        "format": format.name,
        "target": format.target,
        "runs_in_transformers": runs_there and format.library == "transformers",
    }
    try:
        with disk_errors(f"out={out}", full="make room, or choose another out=", refused="choose another out="):
            check_out(out, stored, format)
            remove_leftovers(stored.path.parent, f"{escape(stem_of(stored.path))}-*")  # of killed exports
            with replaced(out, format.is_file) as (temporary, note):
                rows = format.write(stored, temporary)
                parity = {}
                if config.verify:
                    try:
                        artefact = format.reopen(temporary, stored)
                        parity = verify(stored, artefact, rows, format.tool if runs_there else None)
                    except UserError as error:  # the model has been read to its end
                        raise ParityError(f"it cannot be read: {error}") from None
                report["sizes"] = _sizes(stored, rows)
                report["tensors"] = [
                    {"name": r.name, "kind": r.kind, "shape": r.shape, "bytes": r.nbytes, "error": r.error}
                    for r in rows
                ]
                report["parity"] = parity
                files = described_files(temporary)
                report["files"] = {out.name: files[temporary.name]} if format.is_file else files
                kept = {key: value for key, value in report.items() if key != "out"}  # an export may be moved
                note.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    except ParityError as error:
        raise ParityError(f"{out}: not written, because it would differ from the model: {error}") from None
    print_report(report, console())
    if remark := format.remark(stored):
        print(f"note: {remark}", file=sys.stderr)
    if config.share is not None:
        print(f"shared: {share(config.share, stored, report, format)}")
    if stored.tokenizer is not None and (command := format.next_command(out, config.schemes)):
        console(stderr=True).print(f"next: {shlex.join(command)}")
    return report
