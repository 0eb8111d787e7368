"""What many tests share, and an environment without network, login or compiler runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Before anything imports the libraries that read these.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
}

import torch

from bitnet_lit.config import PrepareConfig
from bitnet_lit.data.prepare import prepare
from bitnet_lit.data.tokenizers import Tokenizer, open_tokenizer

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of demo shards: 400 stories, a vocabulary of 512."""
    out = tmp_path_factory.mktemp("shards")
    prepare(PrepareConfig(source="demo", out=str(out), num_stories=400, vocab_size=512, num_workers=1))
    return out


@pytest.fixture(scope="session")
def tokenizer(shards: Path) -> Tokenizer:
    return open_tokenizer(shards / "tokenizer.model")
