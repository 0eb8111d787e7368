"""bitnet_lit.load and what it imports."""

import subprocess
import sys

import pytest
import torch

import bitnet_lit
from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.config import QuantConfig
from bitnet_lit.errors import UserError
from tests.support import tiny_model


def test_load_generates_streams_and_gives_logits(tmp_path, tokenizer):
    original = tiny_model("b158")
    save_model_folder(tmp_path / "model", original, QuantConfig(), tokenizer)
    model = bitnet_lit.load(tmp_path)
    assert model.config.hidden_size == 32
    ids = torch.randint(0, 512, (2, 9))
    with torch.no_grad():
        assert torch.equal(model.logits(ids), original(ids))
    text = model.generate("Once upon a time", max_new_tokens=10, seed=1)
    assert text.startswith("Once upon a time")
    assert "Once upon a time" + "".join(model.stream("Once upon a time", max_new_tokens=10, seed=1)) == text
    prompts = ["Once", "Lily"]  # also from an iterator, which can be read once
    assert model.generate_batch(iter(prompts), max_new_tokens=3, seed=1) == [
        model.generate(prompt, max_new_tokens=3, seed=1, index=number) for number, prompt in enumerate(prompts)
    ]


def test_without_a_tokenizer_there_are_logits_but_no_text(tmp_path):
    save_model_folder(tmp_path / "model", tiny_model(), QuantConfig(), None)
    model = bitnet_lit.load(tmp_path)
    assert model.logits(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 512)
    with pytest.raises(UserError, match="has no tokenizer.model"):
        model.generate("x")


def test_a_device_that_is_not_there(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    save_model_folder(tmp_path / "model", tiny_model(), QuantConfig(), None)
    for device in ("cuda", "cuda:0"):
        with pytest.raises(UserError, match=f"device={device}: not available"):
            bitnet_lit.load(tmp_path, device=device)


@pytest.mark.parametrize(
    "wrong",
    [
        {"engine": "gpu"},
        {"head": "int2"},
        {"kv_cache": "float16"},
        {"device": "cuda:99"},
        {"device": "gpu"},
        {"device": "cuda:x"},
        {"device": "cpu:1"},
        {"device": "mps", "engine": "cpu"},
        {"threads": 0},
        {"threads": "2"},
        {"threads": True},
        {"tokenizer": "nowhere"},
        {"path": "nowhere"},
        {"path": ""},
    ],
    ids=str,
)
def test_a_wrong_argument_is_one_line(tmp_path, tokenizer, wrong):
    save_model_folder(tmp_path / "model", tiny_model(), QuantConfig(), tokenizer)
    with pytest.raises(UserError) as error:
        bitnet_lit.load(**{"path": tmp_path / "model", **wrong})
    key = next(iter(wrong))
    assert ("checkpoint" if key == "path" else key) in str(error.value) and "\n" not in str(error.value)


def test_logits_of_what_are_no_ids(tmp_path):
    save_model_folder(tmp_path / "model", tiny_model(), QuantConfig(), None)
    model = bitnet_lit.load(tmp_path / "model")
    wrong = [[1, 2], torch.zeros(3, dtype=torch.long), torch.zeros(1, 3), torch.tensor([[512]]), torch.tensor([[-1]])]
    for ids in [*wrong, torch.zeros(1, 65, dtype=torch.long), torch.zeros(1, 0, dtype=torch.long)]:
        with pytest.raises(UserError, match="^ids: "):
            model.logits(ids)
    assert model.logits(torch.zeros(2, 64, dtype=torch.int32)).shape == (2, 64, 512)


def test_running_a_model_imports_no_training_code():
    script = (
        "import sys, bitnet_lit.inference.print_texts, bitnet_lit.inference.language_model;"
        "print([name for name in ('lightning', 'pytorch_lightning', 'wandb', 'hydra', 'omegaconf', 'transformers')"
        " if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_importing_the_package_imports_nothing_heavy():
    script = "import sys, bitnet_lit; print([name for name in ('torch', 'numpy', 'hydra') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
