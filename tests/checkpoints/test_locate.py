"""What `checkpoint=` may be, and what a training config hears about its export targets."""

import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from bitnet_lit.checkpoints import locate
from bitnet_lit.checkpoints.formats.llama2c import Llama2c
from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.checkpoints.locate import find_model, open_stored
from bitnet_lit.cli import compose
from bitnet_lit.config import QuantConfig
from bitnet_lit.errors import UserError
from bitnet_lit.inference.language_model import load
from bitnet_lit.training.run import train
from tests.support import REPOSITORY, TINY_RUN, run_command, tiny_model


def test_a_model_of_the_hub_is_found_in_its_cache(tmp_path, tokenizer):
    """As `huggingface_hub` lays it out; with HF_HUB_OFFLINE=1 (conftest) it looks nowhere else."""
    cached = tmp_path / "hub" / "models--me--story"
    save_model_folder(cached / "snapshots" / "abc", tiny_model(), QuantConfig(), tokenizer)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    script = "import bitnet_lit, sys; print(bitnet_lit.load(sys.argv[1]).config.hidden_size)"
    environment = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}

    def opened(name):
        command = [sys.executable, "-c", script, name]
        return subprocess.run(command, capture_output=True, text=True, env={**__import__("os").environ, **environment})

    assert opened("me/story").stdout.strip() == "32"
    assert "the hub says" in opened("me/other").stderr


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """A sweep of two runs, a run that has just begun, and a half-made model, in the current folder."""
    monkeypatch.chdir(tmp_path)
    for name in ("outputs/sweep/0", "outputs/sweep/1"):
        save_model_folder(Path(name, "model"), tiny_model(), QuantConfig(), None)
        Path(name, "checkpoints").mkdir()
        Path(name, "checkpoints/last.ckpt").touch()
    os.utime("outputs/sweep/0/model/config.json", (1, 1))
    Path("outputs/begun/checkpoints").mkdir(parents=True)
    Path("outputs/begun/config.yaml").write_text("seed: 1\nrun_dir: outputs/begun\n")
    Path("outputs/begun/.hydra").mkdir()
    Path("outputs/begun/.hydra/config.yaml").write_text("seed: 1\n")  # Hydra's record is no run
    Path("outputs/half/model").mkdir(parents=True)
    shutil.copy("outputs/sweep/1/model/config.json", "outputs/half/model")
    Path("outputs/half/.model.4711.tmp/new").mkdir(parents=True)
    return tmp_path / "outputs"


PATHS = [
    "outputs/typo",
    "outputs/sweeps",
    "./a/b",
    "../a",
    "/a/b",
    "a/b/c",
    "outputs/sweep/2",
    "nowhere",
    "data/x",
    "me/",
]
PATHS += ["~/x", "me/-x", "me/a b", "sweep\n/x", "me/\N{GREEK SMALL LETTER PI}"]


@pytest.mark.parametrize("typed", PATHS)
def test_a_path_is_not_looked_for_on_the_hub(runs, monkeypatch, typed):
    monkeypatch.setattr(locate, "download_model", lambda name: pytest.fail(f"{name} was asked for"))
    with pytest.raises(UserError, match="no such file or folder: no ") as error:
        find_model(typed)
    assert str(error.value).startswith(f"checkpoint={typed}: ")
    if typed == "outputs/sweeps":
        assert "did you mean outputs/sweep?" in str(error.value)


@pytest.mark.parametrize("typed", ["me/story", "microsoft/bitnet-b1.58-2B-4T"])
def test_a_name_of_the_hub_is(runs, monkeypatch, typed):
    monkeypatch.setattr(locate, "download_model", lambda name: Path("downloaded", name))
    assert find_model(typed) == Path("downloaded", typed)
    Path(typed).parent.mkdir()
    with pytest.raises(UserError, match="no such file or folder"):  # a folder of that name: a path was meant
        find_model(typed)


def test_what_a_path_leads_to(runs, monkeypatch):
    assert find_model(None) == Path("outputs/sweep/1/model")  # the newest whole one
    Path("link").symlink_to("outputs/sweep/0")
    for checkpoint in ("outputs/sweep/0", "outputs/sweep/0/", "outputs/sweep/0/model/model.safetensors", "link"):
        assert find_model(checkpoint).resolve() == runs / "sweep/0/model"
    monkeypatch.setenv("HOME", str(runs.parent))
    assert find_model("~/outputs/sweep/0") == runs / "sweep/0/model"


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("", "is empty"),
        ("outputs/sweep", "holds 2 runs with a model: give one of them, such as outputs/sweep/1"),
        ("outputs", "holds 2 runs with a model"),
        ("outputs/begun", "a run writes its first model after its first validation"),
        ("outputs/sweep/0/checkpoints", "give the run folder: outputs/sweep/0"),
        ("outputs/sweep/0/checkpoints/last.ckpt", "give the run folder it lies in"),
        ("outputs/half", "no model there .*: give a run or model folder, or leave it out to begin anew$"),
        ("outputs/sweep/..", "holds 2 runs"),
        ("dangling", "a link to nowhere, which is not there"),
        ("x.gguf", "is written here and not read"),
        ("README", "give the folder with config.json and model.safetensors"),
        ("pickled", "is a pickle, which is not opened"),
        ("x" * 5000, "cannot be read"),
        ("a\0b", "no such file or folder|no path"),
        ("/dev/null", "no model there"),
    ],
)
def test_what_is_no_model_says_what_to_give(runs, typed, says):
    Path("dangling").symlink_to("nowhere")
    Path("x.gguf").touch()
    Path("README").touch()
    Path("pickled").mkdir()
    Path("pickled/pytorch_model.bin").touch()
    with pytest.raises(UserError, match=says) as error:
        find_model(typed, "init_from")
    assert "\n" not in str(error.value) and str(error.value).startswith("init_from=")


def test_a_single_run_below_a_folder_is_named(runs):
    shutil.rmtree("outputs/sweep/0")
    with pytest.raises(UserError, match=r": give the run in it: outputs/sweep/1$"):
        find_model("outputs")


def test_what_leaving_the_key_out_does_is_that_of_the_key(runs):
    for key, says in (("checkpoint", ", or leave it out for the newest run"), ("distill.teacher", "")):
        with pytest.raises(UserError, match=f": give a run or model folder{says}$"):
            find_model("outputs/half", key)


def test_no_model_at_all_names_the_runs_that_have_begun(runs):
    shutil.rmtree("outputs/sweep")
    Path("outputs/begun/.hydra").mkdir(exist_ok=True)
    Path("outputs/begun/.hydra/config.yaml").write_text("seed: 1\nrun_dir: x\n")
    with pytest.raises(UserError, match=r"no trained model below .*runs without a model yet: outputs/begun\)"):
        find_model(None)


def test_permission_errors_of_the_system_are_one_line(runs, monkeypatch):
    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(locate, "has_model", refused)
    with pytest.raises(UserError, match=r"checkpoint=outputs/sweep/0: cannot be read \(Permission denied\)"):
        find_model("outputs/sweep/0")


def test_a_hub_that_does_not_answer_is_not_waited_for(tmp_path):
    """A server that takes connections and says nothing, as a network that swallows packets does."""
    script = (
        "import sys, time; from bitnet_lit.checkpoints import hub_download; hub_download.HUB_SECONDS = 1\n"
        "start = time.monotonic()\n"
        "try: hub_download.download_model('me/story')\n"
        "except Exception as error: print(type(error).__name__, time.monotonic() - start < 60, error)"
    )
    with socket.create_server(("127.0.0.1", 0)) as server:
        environment = {key: value for key, value in os.environ.items() if "proxy" not in key.lower()}
        environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.getsockname()[1]}", "HF_HUB_OFFLINE": "0"}
        environment |= {"HF_HUB_CACHE": str(tmp_path)}
        result = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=100
        )
    assert result.stdout.startswith("UserError True checkpoint=me/story: no such file or folder here"), result


def test_a_model_that_is_replaced_while_it_is_read_stays_one(tmp_path):
    """Half of it is read, then a run exports its next best model: the rest is of the first, too."""
    models = [tiny_model(seed=seed) for seed in (0, 1)]
    save_model_folder(tmp_path / "model", models[0], QuantConfig(), None)
    stored = open_stored(tmp_path / "model")
    names = list(stored.tensors)
    read = {names[0]: stored.tensor(names[0])}
    save_model_folder(tmp_path / "model", models[1], QuantConfig(), None)
    read |= {name: stored.tensor(name) for name in names[1:]}
    assert all(torch.equal(read[name], models[0].state_dict()[name]) for name in names)
    raw = stored.reader.raw("model.embed_tokens.weight")
    assert (raw == models[0].model.embed_tokens.weight.detach().numpy()).all()


def test_llama2cs_file_tells_a_story_with_a_given_tokenizer(tmp_path, tokenizer):
    model = tiny_model("none", sub_norm=False, vocab_size=tokenizer.vocab_size)
    save_model_folder(tmp_path / "plain", model, QuantConfig(name="none"), None)
    Llama2c().write(open_stored(tmp_path / "plain"), tmp_path)
    arguments = [f"checkpoint={tmp_path / 'model.bin'}", "max_new_tokens=5", "temperature=0"]
    without = run_command("infer", *arguments, cwd=tmp_path, check=False)
    assert without.returncode == 2 and "give tokenizer=" in without.stderr
    given = run_command("infer", *arguments, f"tokenizer={tokenizer.path}", cwd=tmp_path)
    assert given.stdout.startswith("Once upon a time")
    shutil.copy(tokenizer.path, tmp_path / "tokenizer.model")
    assert run_command("infer", *arguments, cwd=tmp_path).stdout == given.stdout
    ids = torch.tensor([[1, 5, 9]])
    # the same numbers in another order of rows; float32 sums differ in the last bits
    torch.testing.assert_close(load(tmp_path / "model.bin").logits(ids), load(tmp_path / "plain").logits(ids))


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (
            ["model.hidden_act=relu2", "model.hidden_size=256", "model.intermediate_size=512"],
            "train with model.hidden_act=silu",
        ),
        (
            ["model=llama2c_15m", "model.intermediate_size=768"],
            "hidden_size=288.*take type=f16 .target gguf_f16., or train with 256",
        ),
    ],
)
def test_a_model_that_cannot_be_exported_is_refused_before_anything_is_read(tmp_path, overrides, remedy):
    with pytest.raises(UserError, match=remedy):
        train(compose("train", [f"run_dir={tmp_path}", "data.dir=nowhere", "export.targets=[gguf_tq2_0]", *overrides]))
    with pytest.raises(UserError, match="must be one of latent, packed"):
        compose("train", ["run_dir=x", "export.targets=[floppy]"])


def test_the_advice_for_a_model_that_is_there(tmp_path):
    save_model_folder(tmp_path / "model", tiny_model(sub_norm=False), QuantConfig(), None)
    told = run_command("export", "--advise", "checkpoint=.", cwd=tmp_path).stdout
    assert "gguf_tq2_0" in told and "take type=f16" in told
    refused = run_command("export", "--advise", "checkpoint=.", "model=15m", cwd=tmp_path, check=False)
    assert refused.returncode == 2 and re.search(r"unknown key 'model': .*export --cfg job", refused.stderr)


def test_the_advice_names_every_target_and_remedy(tmp_path):
    told = run_command("export", "--advise", "model=llama2c_15m", "model.sub_norm=false", cwd=tmp_path).stdout
    for target in ("latent", "packed", "gguf_tq2_0", "gguf_tq1_0", "gguf_f16", "llama2c"):
        assert target in told
    assert "take type=f16" in told and told.count("yes") >= 3
    assert not list(tmp_path.iterdir())  # no run folder


def test_the_advice_knows_files_and_schemes_of_the_users_own(tmp_path):
    """--config-dir is a flag of Hydra's, and any command that composes a training config takes it."""
    for name in ("my_project.py", "conf"):
        (tmp_path / name).symlink_to(REPOSITORY / "examples" / "my_project" / name)
    told = run_command(
        "export", "--advise", "--config-dir", "conf", "quant=threshold", "model=15m", cwd=tmp_path
    ).stdout
    assert "15m, threshold" in told and told.count("yes") == 4
    refused = run_command("export", "--advise", "-cd", "conf", "model=mixer", cwd=tmp_path, check=False)
    assert refused.returncode == 2 and "model._target_=my_project.Mixer: formats describe" in refused.stderr


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["modell=15m"], "unknown key 'modell': did you mean 'model'?"),
        (["15m"], "'15m' is no key=value: did you mean model=15m?"),
        (["init_from=outputs/dense"], "the sizes are those of that model: give checkpoint=outputs/dense"),
        (["resume=outputs/dense"], "the sizes are those of that model: give checkpoint=outputs/dense"),
        (["-m", "model=15m,42m"], "--advise is about one model: leave out -m"),
    ],
)
def test_advice_that_would_be_of_another_model_is_refused(tmp_path, typed, message):
    refused = run_command("export", "--advise", *typed, cwd=tmp_path, check=False)
    assert refused.returncode == 2 and message in refused.stderr and refused.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "arguments"), [("infer", ["engine=torch"]), ("infer", ["engine=auto"]), ("export", ["format=packed"])]
)
def test_a_tokenizer_of_another_model_is_refused(tmp_path, tokenizer, command, arguments):
    model = tiny_model(vocab_size=tokenizer.vocab_size - 1)
    save_model_folder(tmp_path / "model", model, QuantConfig(), tokenizer)
    result = run_command(command, "checkpoint=model", *arguments, cwd=tmp_path, check=False)
    assert result.returncode == 2 and f"the tokenizer has {tokenizer.vocab_size} pieces" in result.stderr
    save_model_folder(tmp_path / "none", model, QuantConfig(), None)
    with pytest.raises(UserError, match="they are not of one model"):
        load(tmp_path / "none", tokenizer=tokenizer.path)


def test_packed_codes_cannot_be_trained_further(tmp_path, shards, tokenizer):
    save_model_folder(tmp_path / "model", tiny_model(), QuantConfig(), tokenizer)
    run_command("export", "checkpoint=model", "format=packed", "verify=false", cwd=tmp_path)
    overrides = [f"run_dir={tmp_path / 'run'}", f"init_from={tmp_path / 'model-packed'}", f"data.dir={shards}"]
    with pytest.raises(UserError, match="packed codes cannot be trained"):
        train(compose("train", [*overrides, *TINY_RUN]))


PEAK = """
    import math, resource, sys, threading, time
    import torch, gguf, transformers
    from bitnet_lit.exports import compare, write
    from bitnet_lit.config import ExportConfig

    compare._run_tool = lambda *arguments: "left out"  # they load the whole model, where it is small enough

    def resident():
        return int(next(l for l in open("/proc/self/status") if l.startswith("VmRSS")).split()[1]) / 1024

    # Libraries take memory of their own when they are first used.
    write.export(ExportConfig(checkpoint="tiny", format=sys.argv[1], type="f16"))
    base, peak, done = resident(), 0.0, threading.Event()
    def watch():
        global peak
        while not done.wait(0.005):
            peak = max(peak, resident())
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    report = write.export(ExportConfig(checkpoint="model", format=sys.argv[1], type="tq2_0"))
    done.set()
    watcher.join()
    print(peak - base, max(math.prod(t["shape"]) * 4 for t in report["tensors"]) / 2**20)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")
@pytest.mark.parametrize("format", ["packed", "gguf"])
def test_an_export_needs_the_memory_of_two_tensors(tmp_path, tokenizer, format):
    """245 MB of weights, the largest tensor 131 MB: two of them and 200 MB, comparison included."""
    model = tiny_model(
        "b158",
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=3,
        vocab_size=32000,
        max_position_embeddings=64,
    )
    save_model_folder(tmp_path / "model", model, QuantConfig(), tokenizer)
    save_model_folder(tmp_path / "tiny", tiny_model(), QuantConfig(), tokenizer)
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK), format], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    rise, largest = map(float, result.stdout.split("\n")[-2].split())
    print(f"{rise:.0f} MB of {2 * largest + 200:.0f}")
    assert rise < 2 * largest + 200
