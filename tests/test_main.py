"""The console script: what it lists, that a command is started as `python -m` starts it, and what it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest

import bitnet_lit
from bitnet_lit import __main__ as script
from bitnet_lit import entry_point


def typed(monkeypatch, *arguments):
    """What `bitnet-lit <arguments>` does in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["bitnet-lit", *arguments])
    try:
        script.main()
    except SystemExit as end:
        return end.code
    return 0


def test_the_commands_are_the_modules_that_can_be_run():
    modules = Path(bitnet_lit.__file__).parent.glob("*.py")
    runnable = {path.stem for path in modules if "\ndef main()" in path.read_text(encoding="utf-8")}
    assert runnable - {"__main__"} == set(script.COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]], ids=str)
def test_help_has_a_line_for_each_command(monkeypatch, capsys, arguments):
    assert typed(monkeypatch, *arguments) == 0
    lines = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert lines == [[name, what] for name, what in script.COMMANDS.items()]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("trian", "unknown command 'trian': did you mean 'train'?"),
        ("eval", "unknown command 'eval': did you mean 'evaluate'?"),
        ("seed=3", "unknown command 'seed=3': take one of prepare, train, "),
        ("-m", "unknown command '-m': take one of prepare, train, "),
    ],
)
def test_an_unknown_command_is_one_line_and_status_2(monkeypatch, capsys, command, message):
    assert typed(monkeypatch, command) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


@pytest.mark.parametrize("command", script.COMMANDS)
def test_a_command_gets_its_arguments_and_is_the_main_module(monkeypatch, command):
    """Lightning starts the other ranks with `python -m <name of the main module's spec> <sys.argv[1:]>`."""
    started = []

    def leave(work):
        started.append((sys.modules["__main__"].__spec__.name, sys.argv[1:], Path(sys.argv[0]).name))

    monkeypatch.setattr(entry_point, "leave", leave)
    assert typed(monkeypatch, command, "seed=3", "prompt=a b") == 0
    assert started == [(f"bitnet_lit.{command}", ["seed=3", "prompt=a b"], f"{command}.py")]


def test_modules_beside_the_data_are_found_as_python_m_finds_them(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["/somewhere/bin", *sys.path])  # a console script has its own folder there
    monkeypatch.setattr(entry_point, "leave", lambda work: None)
    assert typed(monkeypatch, "train") == 0
    assert sys.path[0] == str(tmp_path)


@pytest.mark.parametrize("command", ["bitnet_lit infer", "bitnet_lit.report"])
def test_a_current_folder_that_was_removed_is_one_line(tmp_path, command):
    script = f'mkdir gone && cd gone && rmdir ../gone && exec "$0" -m {command}'
    result = subprocess.run(["sh", "-c", script, sys.executable], cwd=tmp_path, capture_output=True, text=True)
    remedy = "change to a folder that is there (cd)"
    assert result.returncode == 2
    assert result.stderr == f"error: the current folder: cannot be read (No such file or directory): {remedy}\n"


def test_help_and_version_import_nothing_heavy(tmp_path):
    code = (
        "import sys; sys.argv = ['bitnet-lit', '{}']; from bitnet_lit.__main__ import main; main();"
        "print(sorted({{'torch', 'hydra', 'omegaconf', 'lightning', 'numpy', 'wandb'}} & sys.modules.keys()))"
    )
    for argument, first in (("--help", "Train, study and ship"), ("--version", f"bitnet-lit {bitnet_lit.__version__}")):
        command = [sys.executable, "-c", code.format(argument)]
        printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        assert printed.startswith(first) and printed.endswith("\n[]\n")


def test_windows_is_told_that_it_is_not_supported(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert "not on Windows: use WSL" in str(typed(monkeypatch, "--help"))
