"""The lm-evaluation-harness: the backend `bitnet_lit` gives what `hf` gives on the exported folder, on local tasks."""

import json
import re
import signal
from importlib import import_module
from pathlib import Path

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'bitnet-lit[eval]'")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.config import ExportConfig, PrepareConfig, QuantConfig
from bitnet_lit.data.sources import open_source
from bitnet_lit.data.sources.source import ReadCounts
from bitnet_lit.errors import UserError
from bitnet_lit.exports.write import export
from bitnet_lit.inference.lm_eval_backend import BitnetLit
from tests.support import REPOSITORY, tiny_model

COUNT = 12
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    },
    "continuations": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
}


def write_tasks(folder):
    """A YAML file (JSON is YAML) and a file of examples for each task, from demo stories."""
    source = open_source(PrepareConfig(source="demo", num_stories=COUNT, seed=5))
    segments = [segment for shard in source.shards for segment in shard.segments]
    stories = [story for segment in segments for story in segment.stories(ReadCounts())]
    words = [story.split(" ") for story in stories]
    lines = []
    for number, each in enumerate(words):
        others = [words[number - 1][20:24], words[number - 2][20:25]]
        choices = [" ".join(choice) for choice in (each[12:16], *others, ["dog"], ["dog", "and"])]
        lines.append({"context": " ".join(each[:12]), "choices": choices, "gold": 0, "answer": " ".join(each[12:15])})
        lines[-1]["text"] = stories[number]
    lines[0]["context"] = " ".join(words[0] + words[1] + words[2])  # longer than the model's context
    lines[1]["text"] = " ".join(stories)
    lines[2]["context"] += "  "  # the harness moves such spaces into the continuation
    (folder / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "examples.jsonl")}}}
        (folder / f"{name}.yaml").write_text(json.dumps({"task": name, "test_split": "test", **data, **task}))


@pytest.fixture(scope="module")
def found(tmp_path_factory, trained_run):
    """The results of both backends."""
    import datasets

    folder = tmp_path_factory.mktemp("lm_eval")
    write_tasks(folder)
    export(ExportConfig(checkpoint=str(trained_run), format="latent", out=str(folder / "hf"), verify=False))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
        tasks = TaskManager(include_path=str(folder), include_defaults=False)
        options = {"tasks": list(TASKS), "task_manager": tasks, "batch_size": 4, "bootstrap_iters": 0}
        return {
            model: simple_evaluate(model=model, model_args=arguments, device="cpu", **options)
            for model, arguments in (
                ("hf", {"pretrained": str(folder / "hf"), "dtype": "float32"}),
                ("bitnet_lit", {"checkpoint": str(trained_run)}),
            )
        }


@pytest.mark.slow
def test_figures_equal_those_of_hf(found):
    ours, theirs = found["bitnet_lit"]["results"], found["hf"]["results"]
    for task in TASKS:
        for metric, value in theirs[task].items():
            if isinstance(value, float):
                assert ours[task][metric] == pytest.approx(value, rel=1e-3), (task, metric)
    assert 0 < theirs["choices"]["acc,none"] < 1 and theirs["texts"]["bits_per_byte,none"] < 3, (
        "the tasks prove something"
    )


@pytest.mark.slow
def test_answers_equal_those_of_hf(found):
    def answers(model, task):
        samples = found[model]["samples"][task]
        return [sample["resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]

    assert answers("bitnet_lit", "continuations") == answers("hf", "continuations")
    for ours, theirs in zip(answers("bitnet_lit", "choices"), answers("hf", "choices"), strict=True):
        for (one,), (other,) in zip(ours, theirs, strict=True):
            # Where a last bit moves a code, a loss of some nats moves in its third digit.
            assert one[0] == pytest.approx(other[0], rel=5e-3, abs=0.02) and one[1] == other[1]
    for ours, theirs in zip(answers("bitnet_lit", "texts"), answers("hf", "texts"), strict=True):
        assert ours[0][0] == pytest.approx(theirs[0][0], rel=1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model") / "model"
    save_model_folder(folder, tiny_model(), QuantConfig(), tokenizer)
    return str(folder)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"checkpoint": "nowhere"}, "checkpoint=nowhere: no such file or folder"),
        ({"checkpont": "x"}, "model_args checkpont=x: no such option: did you mean checkpoint?"),
        ({"pretrained": "x"}, "model_args pretrained=x: no such option: take one of checkpoint, engine, "),
        ({"engine": "gpu"}, "engine=gpu: must be one of"),
        ({"device": "cuda:7"}, "device=cuda:7: not available on this machine: take device=cpu"),
        ({"dtype": "half"}, "dtype=half: must be one of"),
        ({"batch_size": "many"}, "batch_size=many: must be a number from 1 on, or auto"),
        ({"batch_size": 0}, "batch_size=0: must be"),
        ({"max_length": 65}, "max_length=65: must be 1 to 64, the model's context"),
        ({"max_length": "x"}, "max_length='x': must be a number"),
        ({"max_gen_toks": 0}, "max_gen_toks=0: must"),
    ],
    ids=str,
)
def test_a_wrong_model_argument_is_one_line(folder, arguments, says):
    with pytest.raises(UserError, match="^" + re.escape(says)) as error:
        BitnetLit.create_from_arg_obj({"checkpoint": folder, **arguments}, {"max_batch_size": None})
    assert "\n" not in str(error.value)


def asked(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def test_what_cannot_be_asked_is_one_line(folder):
    model = BitnetLit(folder, engine="torch", device="cpu", batch_size="auto")
    for options, says in (
        ({"max_gen_toks": 64}, "max_gen_toks=64: leaves no room for a prompt, the model reads 64 tokens"),
        ({"max_gen_toks": 4, "num_beams": 2}, "gen_kwargs num_beams: not known here: take temperature, top_k"),
    ):
        with pytest.raises(UserError, match=says):
            model.generate_until([asked("generate_until", "Once", options)])
    with pytest.raises(UserError, match=r"a continuation of \d+ tokens: the model reads 64 at most"):
        model.loglikelihood([asked("loglikelihood", "Once", " upon a time" * 40)])


@pytest.mark.parametrize("engine", ["cpu", "torch"])
def test_what_was_answered_before_an_interruption_is_kept(folder, engine, monkeypatch, capsys):
    """For --use_cache; and the progress bar goes on with each answer."""
    model = BitnetLit(folder, engine=engine, device="cpu")
    requests = {
        "loglikelihood": [asked("loglikelihood", "Once", f" {word}") for word in ("upon", "a", "time", "day")],
        "loglikelihood_rolling": [asked("loglikelihood_rolling", "Once upon a time " * n) for n in (1, 9, 30, 2)],
    }
    for kind, asked_for in requests.items():
        whole = getattr(model, kind)(asked_for, disable_tqdm=True)
        kept = []
        model.cache_hook.add_partial = lambda attr, arguments, answer, kept=kept: kept.append((arguments, answer))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            run = model._scorer.run

            def interrupted(rows, windows, run=run):
                found = run(rows, windows)
                yield from (next(found) for _ in range(len(windows) - 1))
                raise KeyboardInterrupt

            patch.setattr(model._scorer, "run", interrupted)
            getattr(model, kind)(asked_for)
        assert len(kept) == len(asked_for) - 1
        answers = {request.args: answer for request, answer in zip(asked_for, whole, strict=True)}
        assert all(answers[arguments] == pytest.approx(answer, abs=1e-4) for arguments, answer in kept)
        assert f"Running {kind} requests" in capsys.readouterr().err


def test_sampling_follows_the_harness_seed(folder):
    import torch

    model = BitnetLit(folder, engine="torch", device="cpu")
    request = asked("generate_until", "Once", {"max_gen_toks": 8, "do_sample": True, "temperature": 1.0})
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(model.generate_until([request, request]))
    assert texts[0] == texts[1] != texts[2] and texts[0][0] != texts[0][1]


def test_bos_can_be_left_out(folder, tokenizer):
    with_bos, without = BitnetLit(folder, device="cpu"), BitnetLit(folder, device="cpu", add_bos_token=False)
    assert with_bos.tok_encode("Once") == tokenizer.encode("Once") == [tokenizer.bos_id, *without.tok_encode("Once")]
    assert with_bos.prefix_token_id == tokenizer.bos_id and with_bos.eot_token_id == tokenizer.eos_id


def test_the_command_registers_the_model(monkeypatch):
    """And the entry point, for harnesses that look for it, names the same class."""
    import lm_eval.__main__

    from bitnet_lit import lm_eval as command

    called = []
    monkeypatch.setattr(lm_eval.__main__, "cli_evaluate", lambda: called.append(get_model("bitnet_lit")))
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    command.main()  # it is the end of a process, and leaves its handlers
    for number, handler in before.items():
        signal.signal(number, handler)
    assert called == [BitnetLit] and get_model("hf") is not None
    text = Path(REPOSITORY, "pyproject.toml").read_text()
    module, name = re.search(r'\[project.entry-points."lm_eval.models"\]\nbitnet_lit = "([\w.]+):(\w+)"', text).groups()
    assert getattr(import_module(module), name) is BitnetLit
