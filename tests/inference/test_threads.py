"""One loaded model and many users of it: threads, streams in turns, forks, interrupts, the end of the interpreter."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import bitnet_lit
from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.config import QuantConfig
from bitnet_lit.errors import UserError
from bitnet_lit.inference.engines.cpu.cores import allowed_threads, physical_cores
from tests.support import tiny_model

ENGINES = ["cpu", "torch"]
OPTIONS = {"max_new_tokens": 12, "temperature": 1.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("threads") / "model"
    save_model_folder(path, tiny_model(), QuantConfig(), tokenizer)
    return path


def loaded(folder, engine, threads=2):
    return bitnet_lit.load(folder, engine=engine, threads=threads if engine == "cpu" else None)


def texts_of(model, caller, count):
    """Texts of `caller`, each way that there is to make them."""
    texts = []
    for number in range(count):
        prompt, options = ("Lily went home " * (number % 5)).strip(), {**OPTIONS, "seed": 1000 * caller + number}
        if number % 3 == 0:
            texts.append(model.generate(prompt, **options))
        elif number % 3 == 1:
            texts.append("".join(model.stream(prompt, **options)))
        else:
            texts += model.generate_batch([prompt, "Once"], **options)
    return texts


@pytest.mark.parametrize(
    ("engine", "threads", "callers", "count"),
    [
        ("cpu", 1, 4, 10),
        ("cpu", 2, 4, 10),
        ("torch", None, 4, 5),
        pytest.param("cpu", 2, 16, 50, marks=pytest.mark.slow),
    ],
)
def test_texts_made_by_many_threads_are_those_made_alone(folder, engine, threads, callers, count):
    model = loaded(folder, engine, threads)
    alone = [texts_of(model, caller, count) for caller in range(callers)]
    with ThreadPoolExecutor(callers) as pool:
        together = list(pool.map(lambda caller: texts_of(model, caller, count), range(callers)))
    assert together == alone
    assert len({text for texts in alone for text in texts}) > callers * count // 2  # they do differ


@pytest.mark.parametrize("engine", ENGINES)
def test_streams_read_in_turns_are_those_read_alone(folder, engine):
    model = loaded(folder, engine)
    alone = ["".join(model.stream("Lily", seed=seed, **OPTIONS)) for seed in range(4)]
    streams = [model.stream("Lily", seed=seed, **OPTIONS) for seed in range(4)]
    turns = [[next(stream, "") for stream in streams] for _ in range(OPTIONS["max_new_tokens"] + 1)]
    assert ["".join(pieces) for pieces in zip(*turns, strict=True)] == alone


def in_a_fork(does):
    """What `does` returns in the child of a fork, as text; a child that hangs is killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        try:
            signal.alarm(60)
            os.write(writer, repr(does()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:
        said = file.read().decode()
    assert os.waitpid(child, 0)[1] == 0, "the child hung"
    return said


@pytest.mark.parametrize("engine", ENGINES)
def test_a_model_works_after_a_fork(folder, engine):
    model = loaded(folder, engine)
    expected = repr(texts_of(model, 0, 3))
    assert in_a_fork(lambda: texts_of(model, 0, 3)) == expected
    # A child of the child, and a text that was begun before the fork and is ended on both sides.
    assert in_a_fork(lambda: in_a_fork(lambda: texts_of(model, 0, 3))) == repr(expected)
    stream = model.stream("Lily", seed=1, **OPTIONS)
    first = next(stream)
    rest = in_a_fork(lambda: "".join(stream))
    assert rest == repr("".join(stream)) and first + eval(rest) == "".join(model.stream("Lily", seed=1, **OPTIONS))


def test_torch_works_in_a_child_whose_parent_divided_loops(tmp_path, tokenizer):
    """OpenMP's threads are the parent's alone; a child that waits for them waits for ever."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "max_position_embeddings": 128}  # loops worth dividing
    save_model_folder(tmp_path / "model", tiny_model(**sizes), QuantConfig(), tokenizer)
    ids = torch.randint(0, 512, (1, 100), generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(2)
    try:
        model = loaded(tmp_path / "model", "torch")
        expected = model.logits(ids).argmax(-1).tolist()
        assert in_a_fork(lambda: model.logits(ids).argmax(-1).tolist()) == repr(expected)
        assert in_a_fork(lambda: loaded(tmp_path / "model", "torch").logits(ids).argmax(-1).tolist()) == repr(expected)
        said = model.generate("Lily went home " * 5, seed=1, **OPTIONS)
        assert in_a_fork(lambda: model.generate("Lily went home " * 5, seed=1, **OPTIONS)) == repr(said)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_fork_while_other_threads_are_at_it(folder, engine):
    model = loaded(folder, engine)
    expected = repr(texts_of(model, 0, 3))
    ended = threading.Event()

    def go_on():
        while not ended.is_set():
            texts_of(model, 1, 3)

    others = [threading.Thread(target=go_on) for _ in range(2)]
    for other in others:
        other.start()
    try:
        for _ in range(3):
            assert in_a_fork(lambda: texts_of(model, 0, 3)) == expected
    finally:
        ended.set()
        for other in others:
            other.join()


MODEL = None


def _text(seed):
    return MODEL.generate("Lily", seed=seed, **OPTIONS)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_pool_of_forked_processes(folder, engine):
    global MODEL
    MODEL = loaded(folder, engine)
    expected = [_text(seed) for seed in range(6)]
    # This pool asks its processes to end. multiprocessing's own sends SIGTERM, which a process may not hear: a handler
    # in Python, inherited from the parent, runs only after the wait for the next task, and that wait has no end.
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        assert list(pool.map(_text, range(6), timeout=120)) == expected


def _threads_and_memory():
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["Threads"]), int(status["VmRSS"].split()[0]) / 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc")
def test_models_that_are_dropped_leave_neither_threads_nor_memory(folder):
    def use():
        model = loaded(folder, "cpu")
        stream = model.stream("Lily", **OPTIONS)
        next(stream)  # is dropped half-way
        model.generate_batch(["", "Once"], **OPTIONS)

    for _ in range(3):
        use()
    gc.collect()
    threads, memory = _threads_and_memory()
    for _ in range(40):
        use()
    gc.collect()
    now_threads, now_memory = _threads_and_memory()
    assert now_threads == threads
    # A model takes 1.5 MiB here: 40 that stayed would be 60. What allocators keep is less than a third of it.
    assert now_memory < memory + 20


def test_an_interrupt_ends_a_text_and_nothing_else(folder):
    model = loaded(folder, "cpu")
    expected = texts_of(model, 0, 3)
    interrupted = 0
    for delay in (0.001, 0.003, 0.01, 0.02, 0.04):
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        # Again each second: Python swallows a KeyboardInterrupt that comes within a __del__.
        signal.setitimer(signal.ITIMER_REAL, delay, 1.0)
        try:
            while True:
                model.generate("Once upon a time", max_new_tokens=60)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert texts_of(model, 0, 3) == expected
    assert interrupted == 5


AT_THE_END = """
import sys, threading, time
import bitnet_lit
model = bitnet_lit.load(sys.argv[1], engine=sys.argv[2], threads=2)
stream = model.stream("Lily", max_new_tokens=30)
next(stream)
def go_on():
    try:
        while True:
            model.generate("Once", max_new_tokens=30)
    except NameError:
        pass  # `cycle` has deleted the model between two texts
threading.Thread(target=go_on, daemon=True).start()
model.generate("Once", max_new_tokens=5)
time.sleep(0.2)
if sys.argv[3] == "cycle":
    model.itself = model
    del model, stream
print("done", flush=True)
"""


@pytest.mark.parametrize("how", ["global", "cycle"])
def test_the_interpreter_ends_while_texts_are_made(folder, how):
    command = [sys.executable, "-c", AT_THE_END, str(folder), "cpu", how]
    for _ in range(3):
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        # Before 3.14 Python ends a daemon thread by pthread_exit when the thread next wants the interpreter. If the
        # thread is in PyTorch's C++ then, glibc ends the process with this line. It was seen once in many runs.
        if result.stderr != "FATAL: exception not rethrown\n":
            break
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


def test_threads_are_as_many_as_processors_at_most(folder):
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with pytest.warns(UserWarning, match=rf"threads=100000: this process may use {usable} processors"):
        model = bitnet_lit.load(folder, engine="cpu", threads=100_000)
    assert model.engine.model.threads == usable
    assert model.generate("Lily", seed=1, **OPTIONS) == loaded(folder, "cpu", 1).generate("Lily", seed=1, **OPTIONS)
    assert 1 <= physical_cores() <= usable and allowed_threads(None) == physical_cores()
    for threads in (0, -1, True, 1.5, "2"):
        with pytest.raises(UserError, match="threads="):
            bitnet_lit.load(folder, engine="cpu", threads=threads)
