"""Where an export may go, what it replaces there, and what is left when it is killed or the disk is full."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from bitnet_lit.checkpoints.formats.format import formats
from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.checkpoints.pretrained import from_pretrained
from bitnet_lit.config import ExportConfig, QuantConfig
from bitnet_lit.errors import DiskError, UserError
from bitnet_lit.exports import write as exporting
from bitnet_lit.exports.write import export
from tests.exports.exporting import files_below
from tests.files.test_atomic import DEAD, killed_at
from tests.support import tiny_model

FORMATS = ["packed", "latent", "llama2c", "gguf"]


@pytest.fixture
def model(tmp_path, tokenizer, monkeypatch):
    """A model in the current folder that every format holds."""
    monkeypatch.chdir(tmp_path)
    sizes = {"sub_norm": False, "vocab_size": tokenizer.vocab_size}
    save_model_folder(tmp_path / "model", tiny_model(**sizes), QuantConfig(), tokenizer)
    return tmp_path / "model"


def export_as(format, out, checkpoint="model", **options):
    options = {"type": "f16", "embeddings": "f16"} | options if format == "gguf" else options
    return export(ExportConfig(checkpoint=str(checkpoint), format=format, out=str(out), verify=False, **options))


@pytest.mark.parametrize("first", ["packed", "llama2c"])
@pytest.mark.parametrize("second", ["packed", "latent", "llama2c"])
def test_only_what_an_export_wrote_is_replaced(model, first, second):
    export_as(first, "out")
    mine = {"README.md": b"mine", ".git/HEAD": b"main", "special_tokens_map.json": b"{}"}
    for name, content in mine.items():
        Path("out", name).parent.mkdir(exist_ok=True)
        Path("out", name).write_bytes(content)
    export_as(second, "out")
    export_as(second, "alone")
    assert files_below(Path("out")) == {**files_below(Path("alone")), **mine}


def test_a_note_lists_what_was_written(model):
    for format in FORMATS:
        report = export_as(format, f"to.{format}")
        out = Path(f"to.{format}")
        files = {path.name: path for path in out.iterdir()} if out.is_dir() else {out.name: out}
        note = json.loads((files.pop("export.json", None) or Path("to.gguf.json")).read_text())
        assert note["files"] == report["files"] and note["files"].keys() == files.keys()
        for name, path in files.items():
            described = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
            assert note["files"][name] == described


def test_an_export_of_an_earlier_version_is_replaced_too(model):
    """Whose note lists no files, and which wrote no tokenizer for `transformers`."""
    export_as("packed", "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        Path("out", name).unlink()
    note = json.loads(Path("out/export.json").read_text())
    del note["files"]
    Path("out/export.json").write_text(json.dumps(note))
    Path("out/README.md").write_text("mine")
    export_as("llama2c", "out")
    assert sorted(os.listdir("out")) == ["README.md", "export.json", "model.bin", "tokenizer.bin", "tokenizer.model"]


def test_training_keeps_what_the_user_put_into_a_model_folder(model, tokenizer):
    for name in ("README.md", "tokenizer.json"):
        (model / name).write_text("{}")
    save_model_folder(model, tiny_model(seed=1), QuantConfig(), tokenizer)
    assert {"README.md", "tokenizer.json"} < set(os.listdir(model))
    save_model_folder(model, tiny_model(seed=2), QuantConfig(), None)
    assert sorted(os.listdir(model)) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]


@pytest.mark.parametrize("format", FORMATS)
def test_what_lies_at_out_is_no_export(model, format):
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    Path("thesis.pdf").write_text("mine")
    Path("folder").mkdir()
    Path("folder/export.json").write_text('{"of": "another program"}')
    Path("here.json").write_text('{"settings": 1}')
    Path("alias").symlink_to("model")
    refused = ["pipe", "loop", "/dev/null", "thesis.pdf", "folder", "model", "model/", "./model", "alias", "."]
    refused += ["model/config.json", "thesis.pdf/below", "x" * 300, "model/../model"]
    before = files_below(Path("."))
    for out in [*refused, *(["here"] if format == "gguf" else [])]:
        with pytest.raises(UserError, match="out=") as error:
            export_as(format, out)
        assert "choose another" in str(error.value) or "give the name" in str(error.value), str(error.value)
        assert "\n" not in str(error.value) and files_below(Path(".")) == before, out
    assert Path("pipe").is_fifo() and Path("/dev/null").is_char_device()


@pytest.mark.parametrize("format", ["packed", "gguf"])
@pytest.mark.parametrize("name", ["a b", "[/b]", "line\nline", "\N{GREEK SMALL LETTER PI}.x", "-x", "sub/x", "model/x"])
def test_any_other_name(model, capsys, format, name):
    export_as(format, name)
    assert Path(name).exists() and name.split("\n")[0] in capsys.readouterr().out
    assert not list(Path(".").rglob("*.tmp"))


def test_the_home_folder_and_the_cache_of_the_hub(model, monkeypatch):
    monkeypatch.setenv("HOME", str(model.parent / "home"))
    export_as("packed", "~/x")
    assert from_pretrained("home/x").packed and not Path("~").exists()
    cached = Path("cache/models--me--story/snapshots/abc")
    cached.parent.mkdir(parents=True)
    model.rename(cached)
    report = export(ExportConfig(checkpoint=str(cached), format="packed", verify=False))
    assert report["out"] == "story-packed" and os.listdir(cached.parent) == ["abc"]


def test_a_dot_in_the_name_of_a_folder_is_part_of_it(model):
    """The exports of two models must not be one folder, of which the second replaces the first."""
    for number in ("1", "2"):
        shutil.copytree(model, f"tales.{number}")
        export(ExportConfig(checkpoint=f"tales.{number}", format="packed", verify=False))
    assert sorted(path.name for path in Path(".").glob("tales*")) == [
        "tales.1",
        "tales.1-packed",
        "tales.2",
        "tales.2-packed",
    ]


def test_links_are_followed(model):
    Path("disk/empty").mkdir(parents=True)
    Path("out").symlink_to("disk/empty")
    Path("out.gguf").symlink_to("disk/real.gguf")
    for _ in range(2):
        export_as("packed", "out/")
        export_as("gguf", "out.gguf")
        assert Path("out").is_symlink() and Path("out.gguf").is_symlink()
        assert from_pretrained("disk/empty").packed and Path("disk/real.gguf").read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize("format", ["packed", "gguf"])
def test_a_kill_at_any_operation_of_an_export(model, tokenizer, monkeypatch, format):
    """Old or new, whole, the user's files in their place; and a GGUF has no other one's note beside it.

    The conversion itself is left out: what is killed is the placing of what was written.
    """
    save_model_folder(Path("other"), tiny_model(seed=1, sub_norm=False), QuantConfig(), tokenizer)
    contents = []
    for checkpoint in ("model", "other"):
        export_as(format, "made", checkpoint)
        contents.append(files_below(Path("made")) if format == "packed" else Path("made").read_bytes())

    def write(self, stored, out):
        content = contents[stored.path.name == "other"]
        for name, data in (content if format == "packed" else {"": content}).items():
            if name != "export.json":
                (out / name).write_bytes(data)
        return []

    monkeypatch.setattr(formats().named(format), "write", write)
    monkeypatch.setattr(exporting, "_sizes", lambda *_: {})
    monkeypatch.setattr(exporting, "print_report", lambda *_: None)
    number, killed = 0, True
    while killed:
        root = Path(str(number))
        out = root / "out"
        export_as(format, out, "model")
        if format == "packed":
            (out / "README.md").write_text("mine")
        killed = killed_at(number, lambda out=out: export_as(format, out, "other"))
        if format == "packed":
            found = {name: data for name, data in files_below(out).items() if name not in ("README.md", "export.json")}
            expected = [{name: data for name, data in c.items() if name != "export.json"} for c in contents]
            assert found in expected, number
        else:
            assert out.read_bytes() in contents
            note = root / "out.json"
            if note.exists():
                noted = json.loads(note.read_text())["files"]["out"]["sha256"]
                assert noted == hashlib.sha256(out.read_bytes()).hexdigest(), number
        export_as(format, out, "other")
        kept = {"README.md"} if format == "packed" else set()
        assert not [name for name in os.listdir(root) if name.endswith(".tmp")], number
        if format == "packed":
            assert files_below(out).keys() == contents[1].keys() | kept and (out / "README.md").read_text() == "mine"
        else:
            assert sorted(os.listdir(root)) == ["out", "out.json"] and out.read_bytes() == contents[1]
        number += 1
    assert number > 20


def test_leftovers_of_killed_exports_go_with_the_next(model):
    half = Path(f".model-packed.{DEAD}.tmp")
    (half / "new").mkdir(parents=True)
    (half / "lock").touch()
    (half / "new" / "model.safetensors").write_text("half")
    Path(f".model-f16.gguf.{DEAD}.tmp").write_text("half")
    Path(f".thesis.{DEAD}.tmp").write_text("mine")
    export(ExportConfig(checkpoint="model", format="latent", verify=False))
    assert sorted(os.listdir(".")) == [f".thesis.{DEAD}.tmp", "model", "model-float32"]


FULL = """
    import resource, signal, sys
    from bitnet_lit.exports.write import export
    from bitnet_lit.config import ExportConfig
    from bitnet_lit.errors import UserError

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails, as on a disk that is full
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
    for format in ("latent", "packed", "llama2c", "gguf"):
        try:
            config = ExportConfig(checkpoint="model", format=format, out=f"to.{format}", type="f16", embeddings="f16")
            export(config)
        except UserError as error:
            print(error.status, error)
"""


def test_a_disk_that_takes_no_more_is_one_line_for_each_format(model):
    before = files_below(Path("."))
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(FULL)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 4, result.stdout
    for line in lines:
        assert line.startswith("1 out=to.") and line.endswith("make room, or choose another out="), line
    assert files_below(Path(".")) == before and sorted(os.listdir(".")) == ["model"]


def test_a_full_disk_keeps_the_earlier_export(model, monkeypatch):
    for format in ("packed", "gguf"):
        export_as(format, f"to.{format}")
    before = files_below(Path("."))

    def fails(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    for format in ("packed", "gguf"):
        with pytest.raises(DiskError, match="the disk is full: make room, or choose another out="):
            export_as(format, f"to.{format}", dtype="bfloat16")
    assert files_below(Path(".")) == before
