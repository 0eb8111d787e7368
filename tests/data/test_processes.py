"""Processes that do not run the caller's script: scripts without a guard, from a file, a pipe or the command line."""

import json
import multiprocessing.context
import multiprocessing.spawn
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest

from bitnet_lit.data.processes import without_main_script
from bitnet_lit.data.sources.demo import demo_stories

SCRIPT = """
from bitnet_lit.config import PrepareConfig
from bitnet_lit.data.prepare import prepare
print("started")
print(prepare(PrepareConfig(source="text", out="out", vocab_size=400, num_workers=2))["shards"], "shards")
"""


@pytest.mark.parametrize("way", ["file", "pipe", "command"])
def test_a_script_without_a_guard_prepares_on_several_processes(tmp_path, way):
    (tmp_path / "text").mkdir()
    for number in range(3):
        stories = [{"story": story} for story in demo_stories(60, seed=number)]
        (tmp_path / "text" / f"data{number:02d}.json").write_text(json.dumps(stories))
    (tmp_path / "script.py").write_text(SCRIPT)
    arguments = {"file": ["script.py"], "pipe": ["-"], "command": ["-c", SCRIPT]}[way]
    result = subprocess.run(
        [sys.executable, *arguments],
        input=SCRIPT if way == "pipe" else "",
        cwd=tmp_path,
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "started\n3 shards\n"


@pytest.mark.parametrize("started", [{"__file__": "script.py", "__spec__": None}, {"__spec__": None}])
def test_the_script_is_hidden_in_the_block_alone(monkeypatch, started):
    def told():
        return {key for key in multiprocessing.spawn.get_preparation_data("a process") if key.startswith("init_main")}

    main = types.ModuleType("__main__")
    vars(main).update(started)
    monkeypatch.setitem(sys.modules, "__main__", main)
    before = dict(vars(main))
    assert bool(told()) == ("__file__" in started)
    with pytest.raises(KeyError), without_main_script():
        assert not told()
        raise KeyError
    assert vars(main) == before


def test_threads_that_hide_it_at_once_leave_it_as_it_was(monkeypatch):
    main = types.ModuleType("__main__")
    main.__file__ = "script.py"
    monkeypatch.setitem(sys.modules, "__main__", main)

    def hide(_):
        with without_main_script():
            time.sleep(0.01)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(hide, range(16)))
    assert main.__file__ == "script.py"


def test_processes_that_start_in_a_process_of_joblib_know_their_start_method(monkeypatch):
    """The demo corpus is prepared there, where launcher=joblib runs the first job. loky is the method of joblib."""
    loky = type("Loky", (multiprocessing.context.SpawnContext,), {"_name": "loky"})()
    monkeypatch.setitem(multiprocessing.context._concrete_contexts, "loky", loky)
    monkeypatch.setattr(multiprocessing.context._default_context, "_actual_context", loky)
    with without_main_script():
        assert multiprocessing.spawn.get_preparation_data("worker")["start_method"] == "spawn"
    assert multiprocessing.get_start_method() == "loky"
