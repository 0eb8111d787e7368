"""A model of the Hugging Face hub is downloaded here, or taken from the hub's cache."""

from __future__ import annotations

from pathlib import Path

from bitnet_lit.data.tokenizers.sentencepiece import SentencePieceTokenizer
from bitnet_lit.errors import UserError, one_line
from bitnet_lit.extras import needs

HUB_SECONDS = 10  # for the first answer: a firewall that drops packets gives none
FILES = ["*.json", "*.safetensors", *SentencePieceTokenizer.file_names]


def download_model(repository: str) -> Path:
    """Return the folder of the model owner/name; where the hub does not answer, only the cache is used.

    Raises:
        UserError: the model is neither on the hub nor in the cache, or the hub cannot be reached.
    """
    with needs("huggingface_hub", f"checkpoint={repository}"):
        import huggingface_hub
    unreachable: Exception | None = None
    try:
        # This request comes first because it has a timeout; the download itself may wait forever.
        huggingface_hub.HfApi().model_info(repository, timeout=HUB_SECONDS)
    except Exception as error:  # the HTTP library, and so its exceptions, differ between versions
        unreachable = error
    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, allow_patterns=FILES, max_workers=4, local_files_only=unreachable is not None
            )
        )
    except Exception as error:
        reason = unreachable or error
        raise UserError(
            f"checkpoint={repository}: no such file or folder here, and the hub says: {type(reason).__name__}: "
            f"{one_line(reason, 200)}"
        ) from None
