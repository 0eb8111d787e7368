"""One small whole thing of each kind that a user can give to a command: what the fuzzer damages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import BitNetConfig, LlamaConfig, LlamaForCausalLM

from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.config import PrepareConfig, QuantConfig
from bitnet_lit.data.prepare import prepare
from bitnet_lit.data.tokenizers import Tokenizer, open_tokenizer
from tests.data.tokenizers.test_tokenizer_json import byte_level, metaspace
from tests.exports.exporting import export_to, leave_out_other_tools
from tests.forked import ForkServer, call_command
from tests.parity.test_imports import llama2c_weights, write_bin, write_pt
from tests.support import TINY_RUN, tiny_model

SMALL_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 64,
}
TRAIN = [*TINY_RUN, "model.num_hidden_layers=1", "trainer.max_steps=4", "trainer.val_check_interval=2"]


def make_models(root: Path, tokenizer: Tokenizer) -> None:
    """Model folders of ours and of transformers, files of llama2.c."""
    small = {"num_hidden_layers": 1, "vocab_size": 512}
    save_model_folder(root / "latent", tiny_model(**small), QuantConfig(), tokenizer)
    with pytest.MonkeyPatch.context() as patch:
        leave_out_other_tools(patch)
        export_to(root / "packed", root / "latent", format="packed")
    for name, options in (("hub", {}), ("sharded", {"max_shard_size": "60KB"})):
        LlamaForCausalLM(LlamaConfig(**SMALL_LLAMA)).save_pretrained(root / name, **options)
    # Same tensors, other configs: what opens first is config.json.
    raw = json.loads((root / "latent" / "config.json").read_text())
    hub_bitnet = {**BitNetConfig(**{**SMALL_LLAMA, "num_key_value_heads": 4}).to_dict(), "tie_word_embeddings": True}
    shutil.copytree(root / "latent", root / "hub_bitnet")
    hub_bitnet |= {"quantization_config": raw["quantization_config"], "bos_token_id": 1, "eos_token_id": 2}
    hub_bitnet |= {"hidden_act": "silu"}
    (root / "hub_bitnet" / "config.json").write_text(json.dumps(hub_bitnet))
    for name, build in (("byte_level", byte_level), ("metaspace", metaspace)):
        shutil.copytree(root / "hub", root / name)
        built, names = build()
        built.save(str(root / name / "tokenizer.json"))
        (root / name / "tokenizer_config.json").write_text(json.dumps(names))
    weights, arguments = llama2c_weights(2, tied=False)
    write_bin(root / "stories.bin", weights, arguments, tied=False)
    write_pt(root / "stories.pt", weights, arguments)


def make_data(root: Path) -> None:
    """A folder of shards, and texts to make one of."""
    config = PrepareConfig(source="demo", out=str(root / "data"), num_stories=60, vocab_size=512, num_workers=1)
    prepare(config)
    texts = root / "texts"
    texts.mkdir()
    stories = [f'Once upon a time there were {number} cats. They said "no".' for number in range(20)]
    (texts / "a.txt").write_text("\n<|endoftext|>\n".join(stories))
    (texts / "b.json").write_text(json.dumps([{"story": story} for story in stories]))
    (texts / "c.jsonl").write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    (root / "prompts.txt").write_text("Once upon a time\nThere was a cat\n")


def make_run(root: Path, server: ForkServer) -> None:
    """A run folder that has been trained halfway and stopped by its length."""
    (root / "run").mkdir()
    arguments = ["data.dir=data", *TRAIN, "trainer.max_steps=2", "schedule.total_steps=4", "hydra.run.dir=run"]
    shutil.copytree(root / "data", root / "run" / "data")
    result = server.run(call_command, "train", arguments, cwd=root / "run")
    assert result.status == 0, result


def make_originals(root: Path, server: ForkServer) -> None:
    """Everything."""
    make_data(root)
    make_models(root, open_tokenizer(root / "data" / "tokenizer.model"))
    make_run(root, server)
