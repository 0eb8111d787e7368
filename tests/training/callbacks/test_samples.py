"""Sample stories: greedy texts of the model in training, whole in samples.txt and on the console."""

from types import SimpleNamespace

import pytest
import torch

from bitnet_lit.cli import compose
from bitnet_lit.config import GenerationConfig, QuantConfig, TrainConfig
from bitnet_lit.inference.engines.torch_engine import TorchEngine
from bitnet_lit.inference.generator import Generator
from bitnet_lit.training.callbacks import samples
from bitnet_lit.training.callbacks.samples import SampleStories
from bitnet_lit.training.module import BitNetModule
from bitnet_lit.training.run import train
from tests.support import TINY_RUN, tiny_model

PROMPTS = ["Once upon a time", "Lily"]


@pytest.mark.parametrize("loss", [1.0, float("nan")])
def test_stories_are_greedy_whole_and_leave_the_model_in_training(tmp_path, tokenizer, capsys, loss):
    model = tiny_model(max_position_embeddings=256)
    module = BitNetModule(model, TrainConfig(), SimpleNamespace(quantization_step=0), tokenizer)
    trainer = SimpleNamespace(
        is_global_zero=True, callback_metrics={"val/loss": torch.tensor(loss)}, global_step=7, loggers=[]
    )
    model.train()
    SampleStories(tmp_path, tokenizer, PROMPTS, max_new_tokens=200).on_validation_end(trainer, module)
    assert model.training
    printed, path = capsys.readouterr().err, tmp_path / "samples.txt"
    if loss != loss:  # a model that computes no numbers writes nothing
        assert printed == "" and not path.exists()
        return
    options = GenerationConfig(max_new_tokens=200, temperature=0)
    stories = Generator(TorchEngine(tiny_model(max_position_embeddings=256)), tokenizer).generate_batch(
        PROMPTS, options
    )
    written = path.read_bytes().decode()
    assert written == "".join(f"--- step 7\n{story}\n\n" for story in stories)
    assert len(stories[0]) > 200 and printed.startswith("step 7: Once upon a time")
    assert printed.count("\n") == stories[0].count("\n") + 1  # the console breaks no line


def test_a_run_with_weights_in_bfloat16_writes_stories(tmp_path, shards):
    """PyTorch generates them here: the native engine has no transforms of inputs."""
    options = ["trainer.precision=bf16-true", "quant=bitnet_v2", "callbacks.progress_bar=false"]
    train(compose("train", [f"run_dir={tmp_path}", f"data.dir={shards}", *TINY_RUN, *options]))
    assert "--- step 8\nOnce upon a time" in (tmp_path / "samples.txt").read_text()


@pytest.mark.parametrize("quant", ["b158", "none"])
def test_the_native_engine_writes_what_pytorch_writes(tmp_path, tokenizer, monkeypatch, quant):
    config = TrainConfig(quant=QuantConfig(name=quant))
    model = tiny_model(quant, max_position_embeddings=128)
    texts = []
    for is_kept in (False, True):
        monkeypatch.setattr(samples, "is_kept", lambda source, is_kept=is_kept: is_kept)
        callback = SampleStories(tmp_path, tokenizer, PROMPTS, max_new_tokens=60)
        engine = callback._engine(model, config.quant)
        if is_kept and isinstance(engine, TorchEngine):
            pytest.skip("no C++ compiler")
        assert isinstance(engine, TorchEngine) is not is_kept
        texts.append(Generator(engine, tokenizer).generate_batch(PROMPTS, callback.options))
    assert texts[0] == texts[1]
