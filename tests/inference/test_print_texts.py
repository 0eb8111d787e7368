"""What infer writes to stdout: prompts from a file or typed, samples of one prompt, in order and separated."""

import io
import os
import re
import signal
import tracemalloc
import warnings

import pytest

import bitnet_lit
from bitnet_lit import entry_point
from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.cli import compose
from bitnet_lit.config import QuantConfig
from bitnet_lit.errors import UserError
from bitnet_lit.inference.generator import Generator
from bitnet_lit.inference.print_texts import infer
from tests.support import tiny_model

OPTIONS = ("max_new_tokens=12", "seed=4")


@pytest.fixture
def folder(tmp_path, tokenizer):
    save_model_folder(tmp_path / "model", tiny_model(), QuantConfig(), tokenizer)
    return tmp_path


def told(folder, capsys, *arguments):
    """The texts that the command returns and those it wrote, which must be the same."""
    texts = infer(compose("infer", [f"checkpoint={folder}/model", *OPTIONS, *arguments]))
    assert capsys.readouterr().out == "\n---\n".join(texts) + "\n"
    return texts


def test_a_file_of_prompts_more_than_one_batch_holds(folder, capsys):
    prompts = [f"Lily has {number} cats" for number in range(19)]
    (folder / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
    texts = told(folder, capsys, f"prompts={folder}/prompts.txt")
    assert [text.startswith(prompt) for text, prompt in zip(texts, prompts, strict=True)] == [True] * 19


def test_prompts_from_standard_input_are_those_of_a_file(folder, capsys, monkeypatch):
    (folder / "prompts.txt").write_text("Lily\nÉté\n", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", (folder / "prompts.txt").open(encoding="utf-8"))
    assert told(folder, capsys, "prompts=-") == told(folder, capsys, f"prompts={folder}/prompts.txt")


def test_samples_are_different_and_the_first_is_that_of_one(folder, capsys):
    texts = told(folder, capsys, "num_samples=3")
    assert len(set(texts)) == 3 and told(folder, capsys) == texts[:1]
    (folder / "prompts.txt").write_text("Lily\n\nTom", encoding="utf-8")
    texts = told(folder, capsys, f"prompts={folder}/prompts.txt", "num_samples=2")
    assert [text.startswith("Lily") for text in texts] == [True, True, False, False, False, False]
    assert len(set(texts)) == 6 and all(text.startswith("Tom") for text in texts[4:])


@pytest.mark.parametrize(
    ("content", "says"), [(None, "cannot be read"), (b"", "is empty"), (b"\xff\xfe", "not a text in UTF-8")]
)
def test_files_that_hold_no_prompts(folder, content, says):
    if content is not None:
        (folder / "prompts.txt").write_bytes(content)
    with pytest.raises(UserError, match=says):
        infer(compose("infer", [f"checkpoint={folder}/model", f"prompts={folder}/prompts.txt"]))


def test_only_line_ends_divide_prompts_and_a_byte_order_mark_is_none(folder, capsys):
    lines = ["Once \u2028 upon", "a\x0cform feed", "", "\x85 next", "Tom"]
    (folder / "prompts.txt").write_bytes(
        "\r\n".join(lines[:3]).encode("utf-8-sig") + "\r".join(["", *lines[3:]]).encode()
    )
    texts = told(folder, capsys, f"prompts={folder}/prompts.txt", "max_new_tokens=1")
    assert [text.startswith(line) for text, line in zip(texts, lines, strict=True)] == [True] * 5


def test_a_byte_order_mark_before_typed_prompts(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("\ufeffLily\nTom\n"))
    first, second = infer(compose("infer", [f"checkpoint={folder}/model", "max_new_tokens=2", "interactive=true"]))
    assert first.startswith("Lily") and second.startswith("Tom")


def test_typed_prompts_that_are_no_text_are_one_line(folder, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    with pytest.raises(UserError, match="a typed prompt: no text in utf-8"):
        infer(compose("infer", [f"checkpoint={folder}/model", "interactive=true"]))


def test_typed_prompts_have_as_many_samples_as_others(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Lily\nTom\n"))
    told_before = told(folder, capsys, "prompt=Lily", "num_samples=2")
    texts = infer(compose("infer", [*OPTIONS, f"checkpoint={folder}/model", "interactive=true", "num_samples=2"]))
    assert texts[:2] == told_before and [text[:3] for text in texts[2:]] == ["Tom", "Tom"]
    with pytest.raises(UserError, match="interactive=true and prompts=x: give one"):
        compose("infer", ["interactive=true", "prompts=x"])


class Keyboard(io.StringIO):
    """Stdin of a chat: each line is typed, or is the name of a signal that arrives while the chat waits for a line."""

    def readline(self, size: int | None = -1, /) -> str:
        line = super().readline()
        if line.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[line.strip()])
        return line


@pytest.fixture
def chat(folder, monkeypatch):
    """Chats, with signals while texts are made; returns the exit status and the texts."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(entry_point, "_interruptions", [])
    entry_point._hear_signals()
    stream_batch = Generator.stream_batch

    def stream(self, prompts, *arguments, **keywords):
        if prompts[0].startswith("SIG"):
            name, _, replaced = prompts[0].partition(" ")
            try:
                os.kill(os.getpid(), signal.Signals[name])
            finally:
                if replaced:
                    raise UnboundLocalError("a finally of a library")
        return stream_batch(self, prompts, *arguments, **keywords)

    monkeypatch.setattr(Generator, "stream_batch", stream)

    def run(stdin):
        monkeypatch.setattr("sys.stdin", stdin)
        texts = []
        config = compose("infer", [*OPTIONS, f"checkpoint={folder}/model", "interactive=true"])
        return entry_point._status_of(lambda: texts.extend(infer(config))), texts

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


def test_ctrl_c_ends_a_text_of_a_chat_and_the_next_is_whole(chat):
    status, texts = chat(io.StringIO("SIGINT\nSIGINT replaced\nTom\n"))
    (text,) = texts
    assert status == 0 and text.startswith("Tom")


def test_an_error_after_ctrl_c_is_said(chat, capsys):
    stdin = io.TextIOWrapper(io.BytesIO(b"SIGINT\ncaf\xe9\n"), encoding="utf-8")
    assert chat(stdin)[0] == 2
    assert "a typed prompt: no text in utf-8" in capsys.readouterr().err


def test_sigterm_ends_a_chat_while_a_text_is_made(chat, capsys):
    assert chat(io.StringIO("SIGTERM\nTom\n"))[0] == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "error: ended by SIGTERM\n"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 128 + signal.SIGTERM)])
def test_a_signal_at_the_prompt_ends_a_chat(chat, number, status):
    assert chat(Keyboard(f"{number.name}\nTom\n")) == (status, [])


def test_why_pytorch_runs_a_model_is_one_line(tmp_path, capsys, tokenizer):
    """A warning from Python, a note from the command line; and nothing of it stays behind."""
    quant = QuantConfig(name="b158_row")
    save_model_folder(tmp_path / "model", tiny_model("b158_row"), quant, tokenizer)
    why = rf"{tmp_path}/model: PyTorch runs it, slower than the native engine: .*row.*"
    before = warnings.showwarning
    infer(compose("infer", [*OPTIONS, f"checkpoint={tmp_path}/model"]))
    printed = capsys.readouterr()
    assert re.fullmatch(f"note: {why}\n", printed.err) and warnings.showwarning is before
    with pytest.warns(UserWarning, match=why) as caught:
        model = bitnet_lit.load(tmp_path / "model")
    assert str(model.engine) == model.engine.name == "PyTorch"
    assert repr(model) == f"<LanguageModel {tmp_path}/model: {model.config.name}, quant=b158_row, PyTorch>"
    assert caught[0].filename == __file__  # the line that called load
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bitnet_lit.load(tmp_path / "model", engine="torch")
    with pytest.warns(UserWarning, match="^threads=2, head=int4: no effect, because PyTorch runs the model"):
        bitnet_lit.load(tmp_path / "model", engine="torch", threads=2, head="int4")
    with pytest.raises(UserError, match="engine=cpu: cannot run .*row.*: take engine=torch"):
        bitnet_lit.load(tmp_path / "model", engine="cpu")


def test_more_samples_than_anybody_waits_for_take_no_memory(folder, capsys, monkeypatch):
    def stop_at_the_first(self, prompts, options, index):
        raise KeyboardInterrupt

    monkeypatch.setattr(Generator, "stream_batch", stop_at_the_first)
    tracemalloc.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            infer(compose("infer", [*OPTIONS, f"checkpoint={folder}/model", "num_samples=20000000"]))
        assert tracemalloc.get_traced_memory()[1] < 100e6  # a list of them takes 160 MB
    finally:
        tracemalloc.stop()
