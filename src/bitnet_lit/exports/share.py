"""An export and its model card are uploaded to the Hugging Face hub in one commit.

The card says what the model is, on what data and how it was trained, how it differs from the original, and how to run
it. All of this comes from the model's config.json and the export's report.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from bitnet_lit.checkpoints.file_names import NOTE_NAME
from bitnet_lit.checkpoints.formats.format import Format
from bitnet_lit.checkpoints.formats.model_folder import public_info
from bitnet_lit.checkpoints.stored_model import StoredModel
from bitnet_lit.errors import UserError, one_line
from bitnet_lit.extras import needs

LONGEST_CELL = 300  # characters


def _cell(text: str) -> str:
    """Write a text as a cell of a Markdown table: on one line, with | escaped."""
    return " ".join(text.split()).replace("|", "\\|")[:LONGEST_CELL]


def model_card(repository: str, stored: StoredModel, report: dict[str, Any], format: Format) -> str:
    """Write the README.md of a shared model; it begins with YAML, which the hub reads."""
    config, info, scheme = stored.config, public_info(stored.info), stored.quant.scheme
    runs = report["runs_in_transformers"]
    yaml = [f"library_name: {format.library}"] if runs and format.library else []
    yaml += ["pipeline_tag: text-generation", "tags:", "- bitnet", f"- {scheme.name}", f"- {format.name}"]
    sizes = report["sizes"]
    rows = {
        "weights": scheme.title,
        "network": f"{config.num_hidden_layers} layers, hidden {config.hidden_size}, feed-forward "
        f"{config.intermediate_size}, {config.num_attention_heads} heads ({config.num_kv_heads} of keys and values), "
        f"context {config.max_position_embeddings}, vocabulary {config.vocab_size}",
        "parameters": f"{sizes['parameters']:,}",
        "size": f"{sizes['bytes'] / 1e6:,.1f} MB, {sizes['bits_per_weight']:.2f} bits a weight with embeddings",
    }
    if "data" in info:
        rows["data"] = info["data"]
    rows |= {key: str(value) for key, value in info.get("recipe", {}).items()}
    metrics = info.get("metrics", {}).items()
    rows |= {name: f"{value:.4f}" for name, value in metrics if isinstance(value, int | float)}
    for reader, found in report["parity"].items():
        if isinstance(found, dict):
            rows[f"checked with {reader}"] = (
                f"loss differs by {found['loss_difference']:+.1e} on {report['parity']['text_tokens']} tokens"
            )
    lines = ["---", *yaml, "---", "", f"# {repository.split('/')[-1]}", ""]
    lines += [f"A {scheme.code_bits:.3g}-bit language model ({scheme.name})." if scheme.quantizes else ""]
    lines += [
        "",
        "| | |",
        "|--|--|",
        *(f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()),
        "",
        "## Run it",
        "",
    ]
    lines += ["\n\n".join(format.how_to_run(repository, runs)), ""]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def check_repository(repository: str) -> None:
    """Refuse an invalid name of a repository before anything is written.

    Raises:
        UserError: the name is not owner/name, or the package huggingface_hub is missing.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        raise UserError(f"share={repository}: must be owner/name")
    with needs("huggingface_hub", f"share={repository}"):
        import huggingface_hub  # noqa: F401


def share(repository: str, stored: StoredModel, report: dict[str, Any], format: Format) -> str:
    """Upload an export with its card; create the repository if it does not exist.

    Only the files that the export wrote are uploaded, not others in its folder. They are printed first.

    Returns:
        The URL of the repository.

    Raises:
        UserError: the user is not logged in or may not write there, or there is no connection. The export stays.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    out = Path(report["out"])
    files = [out / name for name in sorted([*report["files"], NOTE_NAME])] if out.is_dir() else [out]
    card = model_card(repository, stored, report, format).encode()
    sent: dict[str, Path | bytes] = {**{file.name: file for file in files}, "README.md": card}
    api = huggingface_hub.HfApi()
    print(f"sharing {len(sent)} files as {repository} on {api.endpoint}:")
    for name, content in sent.items():
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        print(f"  {name}  {size:,} bytes", flush=True)
    operations: list[Any] = [
        huggingface_hub.CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in sent.items()
    ]
    try:
        address = api.create_repo(repository, exist_ok=True)
        api.create_commit(repository, operations=operations, commit_message=f"{format.name} export")
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise UserError(
            f"share={repository}: {type(error).__name__}: {one_line(error, 200)}: the export is in "
            f"{out}; log in with `hf auth login` (or set HF_TOKEN) and run the same command again"
        ) from None
    return str(address)
