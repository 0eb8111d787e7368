"""A model of the Hugging Face hub, downloaded or found in the cache."""

from __future__ import annotations

from pathlib import Path

from bitnet_lit.data.tokenizers.sentencepiece import SentencePieceTokenizer
from bitnet_lit.errors import UserError
from bitnet_lit.extras import needs

HUB_SECONDS = 10  # for the first answer: a network that swallows packets gives none
FILES = ["*.json", "*.safetensors", *SentencePieceTokenizer.file_names]


def download_model(repository: str) -> Path:
    """The folder of a model owner/name; from the cache alone where the hub does not answer.

    Raises:
        UserError: what the hub says, or that it says nothing; one line.
    """
    with needs("huggingface_hub", f"checkpoint={repository}"):
        import huggingface_hub
    unreachable: Exception | None = None
    try:
        # Asked first, because the download itself waits for an answer without end.
        huggingface_hub.HfApi().model_info(repository, timeout=HUB_SECONDS)
    except Exception as error:  # of the HTTP library underneath, which changes from version to version
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
            f"{' '.join(str(reason).split())[:200]}"
        ) from None
