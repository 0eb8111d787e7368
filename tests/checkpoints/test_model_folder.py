"""The model folder: what comes back, what is refused, what a kill leaves."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.checkpoints.locate import find_model
from bitnet_lit.checkpoints.pretrained import from_pretrained
from bitnet_lit.config import QuantConfig
from bitnet_lit.errors import UserError
from tests.data.test_custom import ByteTokenizer
from tests.support import tiny_model


@pytest.fixture
def folder(tmp_path, tokenizer):
    save_model_folder(tmp_path / "model", tiny_model(), QuantConfig(), tokenizer, {"step": 7})
    return tmp_path / "model"


@pytest.mark.parametrize("sizes", [{}, {"tie_word_embeddings": False}, {"num_key_value_heads": 2, "sub_norm": False}])
@pytest.mark.parametrize(
    "quant", [QuantConfig(), QuantConfig(name="b1"), QuantConfig(weight_scale="absmedian")], ids=str
)
def test_what_was_saved_comes_back_bit_for_bit(tmp_path, quant, sizes):
    model = tiny_model(quant.name, **sizes)
    save_model_folder(tmp_path / "m", model, quant, None, {"note": "x"})
    opened = from_pretrained(tmp_path / "m")
    assert opened.quant.describe() == quant.describe() and opened.info == {"note": "x"} and opened.tokenizer is None
    saved, loaded = model.state_dict(), opened.model.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    save_model_folder(tmp_path / "again", opened.model, opened.quant, None, opened.info)
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()


def test_tied_weights_are_saved_once_and_names_are_transformers(folder):
    names = set(load_file(folder / "model.safetensors"))
    assert "lm_head.weight" not in names and "model.layers.0.self_attn.q_proj.weight" in names
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.model",
    ]


@pytest.mark.parametrize(
    ("eos_id", "eos_token_id", "ends"), [(-1, None, [256]), (0, 0, [0, 256]), (256, 256, [256])], ids=str
)
def test_a_tokenizer_without_eos_names_none(tmp_path, eos_id, eos_token_id, ends):
    """`transformers` goes on behind the end of a text where one of the ids is -1."""
    tokenizer = ByteTokenizer()
    tokenizer.eos_id = eos_id
    save_model_folder(tmp_path, tiny_model(vocab_size=257), QuantConfig(), tokenizer)
    assert json.loads((tmp_path / "config.json").read_text())["eos_token_id"] == eos_token_id
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"bos_token_id": 256, "eos_token_id": ends}


def break_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**raw, **changes}))


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")


def truncate(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").write_text("{"), "not a config.json"),
        (lambda f: (f / "config.json").write_text("[]"), "not a config.json"),
        (lambda f: break_config(f, num_key_value_heads=3), "does not divide"),
        (lambda f: break_config(f, hidden_size="x"), "not a config.json"),
        (lambda f: break_config(f, intermediate_size=96), "down_proj|gate_proj|ffn_sub_norm"),
        (drop_tensor, "model.norm.weight is missing"),
        (truncate, "damaged or not a safetensors file"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged or not a safetensors file"),
        (lambda f: (f / "tokenizer.model").write_bytes(b"x"), "not a SentencePiece model"),
        (lambda f: break_config(f, tokenizer_sha256="0" * 64), "not the tokenizer this model was trained with"),
    ],
)
def test_damaged_folders_are_refused_in_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as error:
        from_pretrained(folder)
    assert "\n" not in str(error.value)


def test_a_folder_whose_tokenizer_model_is_gone_says_so(folder, tokenizer):
    """An export has a tokenizer.json for `transformers` beside it, which is another file with another hash."""
    for name, content in tokenizer.transformers_files().items():
        (folder / name).write_text(content)
    from_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    with pytest.raises(UserError, match="^.*: tokenizer.model is missing, and tokenizer.json is not the") as error:
        from_pretrained(folder)
    assert str(error.value).startswith(f"{folder}: ") and "\n" not in str(error.value)


def test_finding_a_model(folder, tmp_path, monkeypatch):
    run = folder.parent
    for checkpoint in (run, folder, folder / "model.safetensors", folder / "config.json", str(run)):
        assert find_model(checkpoint) == folder
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no trained model below"):
        find_model(None)
    for number, age in ((1, 100), (2, 0)):
        save_model_folder(tmp_path / f"outputs/d/{number}/model", tiny_model(), QuantConfig(), None)
        stamp = time.time() - age
        os.utime(tmp_path / f"outputs/d/{number}/model/config.json", (stamp, stamp))
    assert find_model(None).parts[-2] == "2"
    with pytest.raises(UserError, match="no such file or folder"):
        find_model("nowhere")
    (tmp_path / "x.ckpt").write_bytes(b"")
    with pytest.raises(UserError, match="no model there .*give the run folder"):
        find_model("x.ckpt")


def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new_one(tmp_path):
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        from bitnet_lit.config import QuantConfig
        from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
        from tests.support import tiny_model
        models = [tiny_model(seed=seed) for seed in (0, 1)]
        print("ready", flush=True)
        while True:
            for step, model in enumerate(models):
                save_model_folder(Path(sys.argv[1]), model, QuantConfig(), None, {"step": step})
    """)
    expected = [tiny_model(seed=seed).state_dict()["model.norm.weight"] for seed in (0, 1)]
    weights = [tiny_model(seed=seed).state_dict()["model.embed_tokens.weight"] for seed in (0, 1)]
    assert not torch.equal(*weights) and len(expected) == 2
    for attempt in range(4):
        process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "model")], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.3 + 0.037 * attempt)
        process.send_signal(signal.SIGKILL)
        process.wait()
        opened = from_pretrained(tmp_path / "model")
        assert torch.equal(opened.model.model.embed_tokens.weight, weights[opened.info["step"]])
