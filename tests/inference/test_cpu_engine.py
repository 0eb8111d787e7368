"""The native engine: integers equal to the reference, logits and text equal to the PyTorch engine's, fallback."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import bitnet_lit
from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.checkpoints.locate import open_stored
from bitnet_lit.checkpoints.pretrained import build_pretrained
from bitnet_lit.config import QuantConfig
from bitnet_lit.errors import UserError
from bitnet_lit.inference.engines.cpu import native
from bitnet_lit.inference.engines.cpu.engine import CpuEngine, NativeModel
from bitnet_lit.inference.engines.cpu.weights import Arena, pack, quantize_head
from bitnet_lit.native.build import NoCompilerError, compiler
from tests.support import tiny_model

try:
    compiler()
    NO_COMPILER = None
except NoCompilerError as error:  # sources that do not compile are a failure
    NO_COMPILER = str(error)
needs_compiler = pytest.mark.skipif(NO_COMPILER is not None, reason=str(NO_COMPILER))


@needs_compiler
@settings(max_examples=150, deadline=None)
@given(
    rows=st.one_of(st.integers(1, 21), st.integers(500, 550)),  # many rows of many tokens go another way
    inputs=st.sampled_from([1, 3, 63, 64, 65, 128, 255, 256, 257, 300, 512, 700, 1536, 7000]),
    tokens=st.integers(1, 80),
    binary=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_integers_equal_the_reference(rows, inputs, tokens, binary, seed):
    rng = np.random.default_rng(seed)
    codes = rng.choice(np.array([-1, 1] if binary else [-1, 0, 1], dtype=np.int8), size=(rows, inputs))
    x = rng.integers(-127, 128, size=(tokens, inputs)).astype(np.int8)
    x = np.where(rng.random((tokens, 1)) < 0.2, 127 * np.sign(x), x)  # extremes
    x[-1] = 127 * codes[0]  # the largest sum that there is
    out = np.empty((tokens, rows), dtype=np.int32)
    packed = pack(codes, Arena())
    native.library().bitnet_multiply(packed.ctypes.data, rows, inputs, x.ctypes.data, tokens, out.ctypes.data)
    assert np.array_equal(out, x.astype(np.int64) @ codes.T.astype(np.int64))


SIZES = [
    {},
    {"hidden_size": 96, "intermediate_size": 160, "num_key_value_heads": 2, "hidden_act": "relu2"},
    {"sub_norm": False, "tie_word_embeddings": False, "num_key_value_heads": 1},
    {"hidden_size": 48, "num_attention_heads": 3, "head_dim": 18, "intermediate_size": 100, "rope_theta": 5e5},
    {"qk_norm": True, "num_key_value_heads": 2, "residual_scales": True, "x0_scales": True},
    {"x0_scales": True, "value_embeddings": True, "sub_norm": False},
]


def saved(folder, quant="b158", **sizes):
    model = tiny_model(quant, **sizes)
    for name, parameter in model.named_parameters():
        if name.endswith(("norm.weight", "_scale")):
            nn.init.uniform_(parameter, 0.5, 1.5)  # at 1 it could be left out, or be another norm's
        elif ".value_embed." in name:
            nn.init.normal_(parameter)
    save_model_folder(folder, model, QuantConfig(name=quant), None)
    return open_stored(folder)


def step_all(model, ids, caches=None):
    """Logits of every position of ids (B, T), all in one step."""
    caches = caches or [model.new_cache() for _ in ids]
    tokens = [token for row in ids.tolist() for token in row]
    spread = [cache for cache in caches for _ in range(ids.shape[1])]
    return torch.from_numpy(model.step(tokens, spread, range(len(tokens)))).reshape(*ids.shape, -1)


@needs_compiler
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("quant", ["b158", "b1", "none"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_logits_equal_the_networks(tmp_path, quant, sizes, threads):
    stored = saved(tmp_path / "model", quant, **sizes)
    model = NativeModel(stored, head="float", kv_cache="float", threads=threads)
    ids = torch.randint(0, 512, (2, 33), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = build_pretrained(stored).model(ids)
    found = step_all(model, ids)
    # Float sums run in another order; where a last bit moves an int8 code, its 1/127 goes through the later layers.
    assert float((found - expected).abs().mean() / expected.std()) < 0.02
    first = (found - expected)[:, 0].abs().max() / expected.std()
    assert float(first) < 0.1
    # One position at a time, or a batch of one: the very same sums.
    cache = model.new_cache()
    single = [model.step([token], [cache], [0])[0] for token in ids[1].tolist()]
    assert np.array_equal(np.stack(single), found[1].numpy())


@needs_compiler
def test_the_past_can_be_cut_and_grows_to_the_context(tmp_path):
    stored = saved(tmp_path / "model", max_position_embeddings=700)
    engine = CpuEngine(NativeModel(stored, head="float", threads=2))
    ids = torch.randint(0, 512, (700,), generator=torch.Generator().manual_seed(0)).tolist()
    cache = engine.new_cache()
    whole = engine.forward([ids], [cache])  # more than one step takes at once
    cache.truncate(0)
    for start in range(0, 700, 70):
        last = engine.forward([ids[start : start + 70]], [cache])
    assert cache.length == 700 and np.array_equal(whole, last)
    with pytest.raises(UserError, match="a text of 701 tokens: the model's context is 700"):
        engine.forward([[1]], [cache])


@needs_compiler
def test_what_is_rounded_keeps_the_loss_and_the_text(trained_run, shards, tokenizer):
    """On a trained model: loss within 0.1 %; with an integer head 200 greedy tokens are the same."""
    from bitnet_lit.data.shards import open_shards
    from bitnet_lit.model import next_token_loss

    stored = open_stored(trained_run / "model")
    split = open_shards(shards).validation(128)
    ids = torch.from_numpy(split.gather(np.arange(4)))
    losses, texts = {}, {}
    combinations = [(head, "float") for head in ("float", "int8", "int4")] + [("float", "half"), ("float", "int8")]
    for head, kv_cache in combinations:
        model = NativeModel(stored, head, kv_cache, threads=2)
        rounded = head, kv_cache
        losses[rounded] = float(next_token_loss(step_all(model, ids[:, :-1]), ids[:, 1:]))
        cache, text = model.new_cache(), [tokenizer.bos_id]
        for _ in range(200):
            text.append(int(model.step(text[-1:], [cache], [0])[0].argmax()))
        texts[rounded] = text
    assert losses["float", "float"] < 4
    for rounded, loss in losses.items():
        assert loss == pytest.approx(losses["float", "float"], rel=1e-3), rounded
    assert texts["int8", "float"] == texts["int4", "float"] == texts["float", "float"]


@needs_compiler
def test_head_rows_are_rounded_by_half_a_step_at_most():
    weight = torch.randn(50, 70, generator=torch.Generator().manual_seed(0)).numpy()
    weight[7] = 0

    def of_rows(quads):  # groups, quads, rows, inputs (lm_head_quantize.h) to rows of codes
        return quads.transpose(0, 2, 1, 3).reshape(64, 128).astype(np.int32)

    for bits in (8, 4):
        stored, rows, fine = quantize_head(weight, bits, Arena())
        if bits == 8:
            codes = of_rows(stored.view(np.int8).reshape(4, 32, 16, 4))
            assert np.array_equal(rows["zero_term"].reshape(64), 2048 * codes.sum(1))
        else:
            halves = stored.reshape(4, 16, 1, 16, 4) >> np.array([0, 4], dtype=np.uint8).reshape(2, 1, 1) & 15
            codes = of_rows(halves.reshape(4, 32, 16, 4)) - 8
            codes[50:], codes[:, 70:] = codes[50:] + 8, codes[:, 70:] + 8  # what does not exist is stored as 0
        scales = rows["scale"].reshape(64, 1)
        assert not codes[:50, 70:].any() and not codes[50:].any() and not codes[7].any() and not scales[50:].any()
        assert np.all(np.abs(codes[:50, :70] * scales[:50] - weight) <= scales[:50] * 0.5001)
    assert np.all(np.abs(fine[:, :70] * (scales[:50] * 7 / 127) - weight) <= scales[:50] * 0.5001 * 7 / 127)


@needs_compiler
def test_load_takes_the_engine_where_it_can(tmp_path, tokenizer):
    save_model_folder(tmp_path / "b158", tiny_model(), QuantConfig(), tokenizer)
    save_model_folder(tmp_path / "dense", tiny_model("none"), QuantConfig(name="none"), tokenizer)
    model = bitnet_lit.load(tmp_path / "b158", threads=2)
    assert model.engine.name.startswith("native") and model.engine.name.endswith("2 threads")
    assert bitnet_lit.load(tmp_path / "b158", engine="torch").engine.name == "PyTorch"
    assert bitnet_lit.load(tmp_path / "dense").engine.name.startswith("native")
    qwen = tiny_model("none", sub_norm=False, qkv_bias=True)
    save_model_folder(tmp_path / "qwen", qwen, QuantConfig(name="none"), tokenizer)
    with pytest.warns(UserWarning, match="PyTorch runs it, .*model.qkv_bias=true"):
        assert bitnet_lit.load(tmp_path / "qwen").engine.name == "PyTorch"
    with pytest.raises(UserError, match=r"model.qkv_bias=true: .* has no biases: take engine=torch"):
        bitnet_lit.load(tmp_path / "qwen", engine="cpu")
    for name in ("cpu", "torch"):
        engine = bitnet_lit.load(tmp_path / "b158", engine=name).engine
        for tokens, says in (([512], "token 512"), ([3, -1], "token -1"), ([], "no token"), ([1] * 65, "65 tokens")):
            with pytest.raises(UserError, match=says):
                engine.forward([tokens], [engine.new_cache()])


def test_without_a_compiler_the_model_runs_on_pytorch(tmp_path, tokenizer):
    save_model_folder(tmp_path / "model", tiny_model(), QuantConfig(), tokenizer)
    command = [sys.executable, "-m", "bitnet_lit.infer", f"checkpoint={tmp_path}", "max_new_tokens=3", "seed=1"]
    environment = {**os.environ, "PATH": str(tmp_path), "CXX": "", "BITNET_LIT_CACHE": str(tmp_path / "cache")}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 0 and result.stdout.startswith("Once upon a time")
    assert result.stderr.count("\n") == 1 and "no C++ compiler" in result.stderr
    result = subprocess.run([*command, "engine=cpu"], capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert result.returncode == 2 and "take engine=torch" in result.stderr


@needs_compiler
@pytest.mark.slow
def test_two_processes_compile_at_once(tmp_path):
    script = "from bitnet_lit.inference.engines.cpu import native; print(native.library().bitnet_simd().decode())"
    environment = {**os.environ, "BITNET_LIT_CACHE": str(tmp_path / "cache")}
    both = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=200)[0].strip() for process in both]
    assert said[0] == said[1] != ""
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".so"]


@needs_compiler
def test_texts_of_a_batch_and_of_a_fork_are_those_of_each_alone(tmp_path, tokenizer):
    save_model_folder(tmp_path / "model", tiny_model(max_position_embeddings=300), QuantConfig(), tokenizer)
    for kv_cache in ("half", "float", "int8"):
        model = bitnet_lit.load(tmp_path / "model", threads=2, kv_cache=kv_cache)
        prompts = ["Lily", "", "Lily", "Once upon a time, there was a boy", "Lily"]
        options = {"max_new_tokens": 280, "temperature": 1.0, "seed": 3}  # beyond the cache's first room
        alone = [model.generate(prompt, index=i, **options) for i, prompt in enumerate(prompts)]
        assert model.generate_batch(prompts, **options) == alone
        assert len(set(alone)) == 5


@needs_compiler
@pytest.mark.parametrize("quant", ["b158", "none"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_rounded_caches_are_close_to_the_float_one(tmp_path, quant, sizes):
    stored = saved(tmp_path / "model", quant, **sizes)
    ids = torch.randint(0, 512, (2, 40), generator=torch.Generator().manual_seed(0))
    exact, half, int8 = (step_all(NativeModel(stored, "float", cache, 2), ids) for cache in ("float", "half", "int8"))
    # Keys and values are rounded by 2**-12 of themselves or 1/254 of their largest at most; an int8 code of a later
    # layer that this moves goes through the rest of the network.
    assert 0 < float((half - exact).abs().mean() / exact.std()) < (0.02 if quant == "b158" else 1e-3)
    assert 0 < float((int8 - exact).abs().mean() / exact.std()) < 0.05


@needs_compiler
def test_what_the_caches_read(tmp_path):
    stored = saved(tmp_path / "model", hidden_size=128, num_attention_heads=2)
    weights = NativeModel(stored).bytes_per_token(0)
    read = {
        cache: NativeModel(stored, kv_cache=cache).bytes_per_token(64) - weights for cache in ("float", "half", "int8")
    }
    elements = 64 * 2 * stored.config.num_hidden_layers * 128
    scales = 64 * 2 * stored.config.num_hidden_layers * 2  # of each key and value of two heads
    assert read == {"float": 4 * elements, "half": 2 * elements, "int8": elements + 4 * scales}


@needs_compiler
def test_the_likeliest_token_is_exact(tmp_path):
    """Rows of the head that differ by less than their rounding: the int8 head still finds the largest logit."""
    model = tiny_model(vocab_size=3001, tie_word_embeddings=False)
    rows = model.lm_head.weight.data
    rows[:] = rows[torch.arange(3001) % 300] + 1e-4 * torch.randn(
        rows.shape, generator=torch.Generator().manual_seed(0)
    )
    save_model_folder(tmp_path, model, QuantConfig(), None)
    stored = open_stored(tmp_path)
    ids = torch.randint(0, 3001, (4, 40), generator=torch.Generator().manual_seed(0))
    exact, int8, int4 = (step_all(NativeModel(stored, head, threads=2), ids) for head in ("float", "int8", "int4"))
    # Half a step is 1/254 or 1/14 of a row's largest, which is two to three times its spread; activations add little.
    for rounded, error in ((int8, 0.01), (int4, 0.15)):
        assert torch.equal(exact.argmax(-1), rounded.argmax(-1)) and not torch.equal(exact, rounded)
        assert float((rounded - exact).abs().mean() / exact.std()) < error
    # Of the 4-bit head the likely tokens are as good as those of the 8-bit one.
    best = exact.topk(100).indices
    assert float((int4 - exact).gather(-1, best).abs().mean() / exact.std()) < 0.01


@needs_compiler
@pytest.mark.parametrize("head", ["int8", "int4"])
def test_the_likeliest_token_is_exact_where_a_row_without_a_token_is_likelier(tmp_path, tokenizer, head):
    """Rows beyond the tokenizer's pieces are never drawn, so they do not decide which logits are computed exactly."""
    pieces = tokenizer.vocab_size
    model = tiny_model(vocab_size=pieces + 40, tie_word_embeddings=False, sub_norm=False)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(model.lm_head.weight.shape, generator=generator)
    model.lm_head.weight.data = torch.randn(1, noise.shape[1], generator=generator) + 0.003 * noise
    model.lm_head.weight.data[pieces:] *= 3
    save_model_folder(tmp_path, model, QuantConfig(), tokenizer)
    ids = torch.randint(0, pieces, (4, 40), generator=generator)
    exact, rounded = (step_all(NativeModel(open_stored(tmp_path), each, threads=2), ids) for each in ("float", head))
    assert (exact.argmax(-1) >= pieces).any() and (exact.argmax(-1) < pieces).any()
    assert torch.equal(exact[..., :pieces].argmax(-1), rounded[..., :pieces].argmax(-1))


CUT_WHILE_IT_RUNS = """
import os, sys
import bitnet_lit
from bitnet_lit.inference.engines.cpu import weights
weights.TABLE_IN_MEMORY = int(sys.argv[3])
model = bitnet_lit.load(sys.argv[1], engine="cpu", head=sys.argv[2], threads=2)
expected = model.generate("Lily", max_new_tokens=40, temperature=1.0, seed=1)
stream = model.stream("Lily", max_new_tokens=40, temperature=1.0, seed=1)
first = next(stream)
os.truncate(os.path.join(sys.argv[1], "model.safetensors"), 4000)
try:
    print("Lily" + first + "".join(stream) == expected)
except bitnet_lit.UserError as error:
    print(error)
"""


@needs_compiler
@pytest.mark.parametrize("head", ["float", "int8"])
@pytest.mark.parametrize("in_memory", [0, 2**30], ids=["file", "memory"])
def test_a_file_that_is_cut_under_a_running_model(tmp_path, tokenizer, head, in_memory):
    """A table in memory has nothing to lose; rows of one in the file are read, and a short read is one line. Were the
    file mapped, SIGBUS would end the process."""
    save_model_folder(tmp_path / "model", tiny_model(), QuantConfig(), tokenizer)
    command = [sys.executable, "-c", CUT_WHILE_IT_RUNS, str(tmp_path / "model"), head, str(in_memory)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
    short = f"{tmp_path / 'model'}: its weights are shorter than when the model was opened: copy it again"
    assert result.stdout == ("True" if in_memory else short) + "\n"
