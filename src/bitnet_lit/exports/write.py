"""Export: a model to a file or folder that another tool runs, compared with the original before it is called done.

The artefact is written to a temporary name, read back, compared (`compare.py`), and only then renamed; one that differs
is removed. What was found is printed, and kept beside the artefact as <name>.json (in a folder: export.json).
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from glob import escape
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from bitnet_lit.atomic import remove_leftovers
from bitnet_lit.checkpoints.formats.folder_tensors import latent_tensors, packed_tensors
from bitnet_lit.checkpoints.formats.gguf import reopened, write_gguf
from bitnet_lit.checkpoints.formats.llama2c import open_bin, write_bin
from bitnet_lit.checkpoints.formats.model_folder import describe, network_type, transformers_runs
from bitnet_lit.checkpoints.formats.model_folder_writer import statistics_metadata, write_folder
from bitnet_lit.checkpoints.locate import find_model, open_stored
from bitnet_lit.checkpoints.safetensors_writer import LazyTensor
from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.config import ExportConfig
from bitnet_lit.errors import ParityError, UserError, disk_errors
from bitnet_lit.exports.compare import TensorRow, verify
from bitnet_lit.exports.destination import check_out, default_out, described_files, given_out, replaced
from bitnet_lit.exports.share import check_repository, share
from bitnet_lit.exports.targets import packed_problems, problems, tokenizer_problem
from bitnet_lit.terminal import console

KINDS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.uint8: "u8", torch.int8: "i8"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Written = tuple[list[TensorRow], StoredModel]


def _target(config: ExportConfig) -> str:
    return {"latent": "hf", "gguf": f"gguf_{config.type}"}.get(config.format, config.format)


def _rows(tensors: list[LazyTensor]) -> list[TensorRow]:
    """One row for each weight; a packed one with its scale."""
    sizes = {tensor.name: tensor.nbytes for tensor in tensors}
    return [
        TensorRow(t.name, KINDS[t.dtype], t.shape, t.nbytes + sizes.get(f"{t.name}_scale", 0))
        for t in tensors
        if not t.name.endswith("_scale")
    ]


def _write_folder(config: ExportConfig, stored: StoredModel, out: Path) -> Written:
    packed, dtype = config.format == "packed", DTYPES[config.dtype]
    tensors = list(packed_tensors(stored, dtype) if packed else latent_tensors(stored, dtype))
    metadata = {}
    if config.format == "latent" and dtype == torch.float32:
        metadata = statistics_metadata(stored.quantized, stored.tensor, stored.quant)
    described = describe(stored.config, stored.quant, stored.tokenizer, stored.info, packed, config.dtype)
    write_folder(out, described, tensors, stored.tokenizer, metadata)
    rows = _rows(tensors)
    for row in rows:
        row.shape = stored.tensors[row.name]  # of a packed matrix, that of its codes
    return rows, open_stored(out)


def _write_llama2c(config: ExportConfig, stored: StoredModel, out: Path) -> Written:
    write_bin(stored, out)
    rows = [TensorRow(name, "f32", shape, 4 * math.prod(shape)) for name, shape in stored.tensors.items()]
    return rows, open_bin(out / "model.bin")


def _write_gguf(config: ExportConfig, stored: StoredModel, out: Path) -> Written:
    written = write_gguf(stored, out, config.type, config.embeddings)
    rows = [TensorRow(name, kind, stored.tensors[name], nbytes) for name, (kind, nbytes) in written.items()]
    return rows, reopened(out, stored)


WRITERS: dict[str, Callable[[ExportConfig, StoredModel, Path], Written]] = {
    "latent": _write_folder,
    "packed": _write_folder,
    "gguf": _write_gguf,
    "llama2c": _write_llama2c,
}


def _sizes(stored: StoredModel, rows: list[TensorRow]) -> dict[str, float]:
    """Bytes of the tensors, bits per weight with the embedding, and the ratio to 16 bits for everything."""
    weights = sum(math.prod(shape) for shape in stored.tensors.values())
    total = sum(row.nbytes for row in rows)
    return {
        "bytes": total,
        "parameters": weights,
        "bits_per_weight": 8 * total / weights,
        "ratio_to_fp16": 2 * weights / total,
    }


def print_report(report: dict[str, Any], page: Console) -> None:
    """The table of tensors (those of all layers in one line, with their largest error), sizes, what was compared."""
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
    page.print(
        f"{sizes['bytes'] / 1e6:,.1f} MB for {sizes['parameters']:,} parameters: {sizes['bits_per_weight']:.2f} bits a "
        f"weight with embeddings, 1/{sizes['ratio_to_fp16']:.1f} of fp16"
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
    """Write, compare, rename.

    Returns:
        out, format, target, sizes, tensors and parity, as they are kept beside the artefact.

    Raises:
        UserError: no model, or one that the format cannot hold.
        ParityError: what was written is not the model; nothing is left of it.
    """
    if config.share is not None:
        check_repository(config.share)
    stored = open_stored(find_model(config.checkpoint))
    target = _target(config)
    impossible = problems(target, stored.config, stored.quant)
    if config.format in ("latent", "packed"):  # ours in any case; whether transformers runs it, config.json says
        impossible = packed_problems(stored.config, stored.quant) if config.format == "packed" else []
    if impossible:
        raise UserError(f"{stored.path} as {target}: {'; '.join(impossible)}")
    out = given_out(config.out) if config.out else default_out(config, stored.path)
    is_file = config.format == "gguf"
    runs_there = config.format not in ("latent", "packed") or (
        transformers_runs(stored.quant, config.format == "packed") and network_type(stored.config) != "bitnet_lit"
    )
    report: dict[str, Any] = {
        "out": str(out),
        "format": config.format,
        "target": target,
        "runs_in_transformers": runs_there and config.format in ("latent", "packed"),
    }
    try:
        with disk_errors(f"out={out}", full="make room, or choose another out=", refused="choose another out="):
            check_out(out, stored, is_file)
            remove_leftovers(stored.path.parent, f"{escape(stored.path.stem)}-*")  # of killed exports of any format
            with replaced(out, is_file) as (temporary, note):
                rows, artefact = WRITERS[config.format](config, stored, temporary)
                parity = verify(stored, artefact, rows, target, runs_there) if config.verify else {}
                report["sizes"] = _sizes(stored, rows)
                report["tensors"] = [
                    {"name": r.name, "kind": r.kind, "shape": r.shape, "bytes": r.nbytes, "error": r.error}
                    for r in rows
                ]
                report["parity"] = parity
                files = described_files(temporary)
                report["files"] = {out.name: files[temporary.name]} if is_file else files
                kept = {key: value for key, value in report.items() if key != "out"}  # it may be moved
                note.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    except ParityError as error:
        raise ParityError(f"{out}: not written, it would not be the model: {error}") from None
    print_report(report, console())
    if config.format == "llama2c" and (problem := tokenizer_problem(target, stored.tokenizer)):
        print(f"note: no tokenizer.bin was written ({problem}): run.c needs one for this model", file=sys.stderr)
    if config.share is not None:
        print(f"shared: {share(config.share, stored, report)}")
    return report
