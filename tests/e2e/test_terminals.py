"""What a command does with its terminal: none, a full one, one that shows ASCII only, and Ctrl-C at any time."""

import os
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from bitnet_lit import entry_point
from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.config import QuantConfig
from tests.support import needs_dev_full, start_command, tiny_model


def in_shell(command, cwd, **environment):
    return subprocess.run(
        ["bash", "-c", command.replace("python", sys.executable, 1)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        timeout=120,
    )


@needs_dev_full
@pytest.mark.parametrize(("where", "why"), [(">/dev/full", b"No space left"), (">&-", b"Bad file descriptor")])
def test_an_output_that_takes_nothing_is_one_line_and_status_1(tmp_path, where, why):
    result = in_shell(f"python -m bitnet_lit.infer --help {where}", tmp_path)
    assert result.returncode == 1 and result.stderr.startswith(b"error: the output cannot be written: ")
    assert why in result.stderr and result.stderr.count(b"\n") == 1


def test_no_folder_for_temporary_files_is_one_line_and_status_1(tmp_path, monkeypatch, capfd):
    with monkeypatch.context() as patched:  # pytest takes temporary files too
        patched.setattr(tempfile, "tempdir", None)
        patched.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "gone")])
        assert entry_point._status_of(tempfile.mkdtemp) == 1
    error = capfd.readouterr().err
    assert error.startswith("error: No usable temporary directory") and error.count("\n") == 1
    assert error.endswith(": set TMPDIR to a folder that can be written\n")


def test_a_reader_that_has_enough_is_no_error(tmp_path):
    result = in_shell("python -m bitnet_lit.train --help | head -c 1; exit ${PIPESTATUS[0]}", tmp_path)
    assert result.returncode == 0 and result.stderr == b"" and len(result.stdout) == 1


@needs_dev_full
def test_errors_that_nobody_sees_keep_their_status(tmp_path):
    assert in_shell("python -m bitnet_lit.infer nonsense 2>&-", tmp_path).returncode == 2
    assert in_shell("python -m bitnet_lit.infer nonsense 2>/dev/full", tmp_path).returncode == 2


def test_a_terminal_that_shows_ascii_only(tmp_path, tokenizer):
    save_model_folder(tmp_path / "model", tiny_model(), QuantConfig(), tokenizer)
    arguments = ["prompt=Caf\u00e9", "checkpoint=model", "max_new_tokens=2", "engine=torch"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    result = start_command("infer", *arguments, cwd=tmp_path, env=environment)
    assert result.stdout.startswith("Caf?") and result.stderr == ""
    wrong = start_command("infer", "checkpoint=caf\u00e9", cwd=tmp_path, env=environment, check=False)
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: checkpoint=caf\\xe9: ")


ENDS = {signal.SIGINT: "error: interrupted\n", signal.SIGTERM: "error: ended by SIGTERM\n"}


@pytest.mark.parametrize("number", ENDS, ids=lambda number: number.name)
def test_an_import_that_is_interrupted_is_left_at_once(tmp_path, number):
    """Ctrl-C while PyTorch is imported: an exception inside an import may be swallowed, or leave half a module."""
    (tmp_path / "heavy.py").write_text(
        "import os, signal\n"
        f"try:\n    os.kill(os.getpid(), signal.{number.name})\nexcept BaseException:\n    pass\n"
        "print('went on')\n"
    )
    script = "from bitnet_lit.entry_point import leave\nleave(lambda: __import__('heavy'))\n"
    (tmp_path / "script.py").write_text(script)
    result = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (128 + number, "", ENDS[number])


@pytest.mark.parametrize("number", ENDS, ids=lambda number: number.name)
def test_a_signal_that_python_ignores_comes_again(tmp_path, number):
    """Python prints and ignores an exception that leaves `__del__`, and the command would go on."""
    (tmp_path / "script.py").write_text(
        "import os, signal, time\nfrom bitnet_lit.entry_point import leave\n"
        "class Dying:\n    def __del__(self):\n"
        f"        os.kill(os.getpid(), signal.{number.name})\n        time.sleep(30)\n"
        "def work():\n    Dying()\n    print('goes on', flush=True)\n    time.sleep(30)\n"
        "leave(work)\n"
    )
    result = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=20)
    assert (result.returncode, result.stdout, result.stderr) == (128 + number, "goes on\n", ENDS[number])


def test_a_stop_of_a_run_that_python_ignores_comes_again(tmp_path):
    (tmp_path / "script.py").write_text(
        "import os, signal, time\nfrom bitnet_lit.entry_point import leave\n"
        "from bitnet_lit.runs.signals import StopSignals\n"
        "class Dying:\n    def __del__(self):\n        os.kill(os.getpid(), signal.SIGUSR1)\n        time.sleep(30)\n"
        "def work():\n    with StopSignals():\n        Dying()\n        time.sleep(30)\n"
        "leave(work)\n"
    )
    result = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=20)
    assert result.returncode == 128 + signal.SIGUSR1 and result.stdout == ""
    assert result.stderr.startswith("error: SIGUSR1 before the first step") and result.stderr.count("\n") == 1


@pytest.mark.parametrize("number", ENDS, ids=lambda number: number.name)
def test_a_signal_does_not_wait_for_a_call_into_cpp(tmp_path, number):
    """A call in Python stands for it; the command ends while it goes on."""
    (tmp_path / "script.py").write_text(
        "import os, signal, time\nfrom bitnet_lit.entry_point import leave\n"
        "from bitnet_lit.interruptible import interruptible\n"
        "def call():\n"
        f"    os.kill(os.getpid(), signal.{number.name})\n    time.sleep(600)\n"
        "leave(lambda: interruptible(call))\n"
    )
    result = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (128 + number, "", ENDS[number])


def test_a_command_hears_ctrl_c_before_it_imports_anything_heavy():
    heavy = "{'torch', 'hydra', 'omegaconf', 'numpy', 'rich'}"
    commands = ("train", "prepare", "evaluate", "infer", "export", "report", "plot", "bench")
    imports = "; ".join(f"import bitnet_lit.{command}" for command in commands)
    code = f"import sys; {imports}; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout == "[]\n"


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="no /proc to read processor time from")
@pytest.mark.parametrize(
    ("number", "seconds"), [(signal.SIGINT, 0.4), (signal.SIGINT, 1.0), (signal.SIGTERM, 0.4), (signal.SIGTERM, 1.0)]
)
def test_a_signal_while_it_starts(tmp_path, number, seconds):
    """Python catches Ctrl-C by itself as soon as it runs; the command's own handlers are there a moment later."""
    arguments = ["source=demo", "num_stories=1000000", "num_workers=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bitnet_lit.prepare", *arguments], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    # As processor time, which a busy machine does not stretch.
    ticks = os.sysconf("SC_CLK_TCK")
    while process.poll() is None:
        with open(f"/proc/{process.pid}/stat") as file:
            used = sum(map(int, file.read().rpartition(")")[2].split()[11:13])) / ticks
        if used >= seconds:
            break
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and errors == ENDS[number]


def test_a_forked_child_ends_by_the_signal_itself(tmp_path):
    """As a pool or a loader ends its workers: a line of each of them would say nothing."""
    script = (
        "import os, signal, time\nfrom bitnet_lit.entry_point import leave\n"
        "def work():\n"
        "    reading, writing = os.pipe()\n"
        "    if not (child := os.fork()):\n"
        "        os.write(writing, b'.')\n"  # Python forgets a signal that comes during the fork
        "        while True:\n            time.sleep(0.02)\n"
        "    os.read(reading, 1)\n"
        "    os.kill(child, signal.SIGTERM)\n"
        "    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        "leave(work)\n"
    )
    (tmp_path / "script.py").write_text(script)
    result = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{-signal.SIGTERM}\n", "")
