"""`evaluate data=my.txt`: figures by their definitions, documents as prepare reads them, what is no text."""

import io
import json
import math
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.cli import compose
from bitnet_lit.config import EvaluateConfig, QuantConfig
from bitnet_lit.config.commands import TextFilesConfig
from bitnet_lit.data.sources.source import Continuation
from bitnet_lit.errors import ModelError, UserError
from bitnet_lit.inference import evaluation
from bitnet_lit.inference.evaluation import evaluate
from bitnet_lit.inference.evaluation_text import TextSums, encode_documents, sliding_windows
from bitnet_lit.inference.language_model import load
from bitnet_lit.inference.scoring import NativeScorer, NetworkScorer
from bitnet_lit.overrides import as_typed
from tests.support import tiny_model

FIRST = "Once upon a time, there was a boy named Jack.\n\nHe had  a red ball. " * 6
SECOND = "Lily said: naïve 日本!"
LENGTH = 32


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A dense model: nothing is rounded that a last bit could move."""
    model = tiny_model("none", max_position_embeddings=LENGTH)
    save_model_folder(tmp_path / "model", model, QuantConfig(name="none"), tokenizer)
    return tmp_path / "model"


@pytest.fixture
def text(tmp_path):
    (tmp_path / "my.txt").write_text(f"{FIRST}\n<|endoftext|>\n{SECOND}\n", encoding="utf-8")
    return tmp_path / "my.txt"


def run(folder, *files, **options):
    options = {"data": TextFilesConfig(files=[str(file) for file in files]), **options}
    return evaluate(EvaluateConfig(checkpoint=str(folder), accelerator="cpu", **options))


def literal_nats(model, tokenizer, document, stride):
    """Each token by itself: the first ones from all before them, then from windows that move on by `stride`."""
    ids = [tokenizer.bos_id, *tokenizer.encode(document, bos=False)]
    nats, hits = 0.0, 0
    for target in range(1, len(ids)):
        end = LENGTH  # the window that predicts this token ends with token number `end`
        while end < target:
            end += stride
        begin = max(0, min(end, len(ids) - 1) - LENGTH)
        with torch.no_grad():
            logits = model(torch.tensor([ids[begin:target]]))[0, -1].double()
        nats -= float(logits.log_softmax(-1)[ids[target]])
        hits += int(logits.argmax()) == ids[target]
    return nats, hits, len(ids) - 1


@pytest.mark.parametrize("stride", [None, 7, LENGTH])
def test_the_figures_are_those_of_their_definitions(folder, text, tokenizer, stride):
    model = tiny_model("none", max_position_embeddings=LENGTH)
    documents = [FIRST.strip(), SECOND]
    parts = [literal_nats(model, tokenizer, document, stride or LENGTH // 2) for document in documents]
    nats, hits, tokens = map(sum, zip(*parts, strict=True))
    num_bytes = sum(len(document.encode()) for document in documents)
    words = sum(len(re.split(r"\s+", document)) for document in documents)
    found = run(folder, text, stride=stride)
    assert (found["tokens"], found["bytes"], found["words"], found["documents"]) == (tokens, num_bytes, words, 2)
    assert found["accuracy"] == pytest.approx(hits / tokens)
    # Sums of a hundred float32 losses of about 6, whose logits are sums in another order.
    assert found["loss"] == pytest.approx(nats / tokens, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-4)
    assert found["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-3)
    assert found["byte_perplexity"] == pytest.approx(math.exp(nats / num_bytes), rel=1e-4)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert (found["sequence_length"], found["stride"], found["data"]) == (LENGTH, stride or 16, str(text))


def test_neither_batches_nor_engines_change_the_figures(folder, text, monkeypatch):
    ran = []
    for scorer in (NativeScorer, NetworkScorer):

        def counted(self, *rest, original=scorer.run):
            ran.append(type(self))
            return original(self, *rest)

        monkeypatch.setattr(scorer, "run", counted)
    found = [run(folder, text, batch_size=size, stride=5) for size in (1, 3, 32)]
    assert len(ran) > 3, "few windows at a time are several calls"
    monkeypatch.setattr(evaluation, "native_scorer", lambda path: load(path, engine="torch").scorer(2))
    found.append(run(folder, text, stride=5))
    for other in found[1:]:
        for name, value in found[0].items():
            assert other[name] == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value), name


@given(st.integers(2, 60), st.integers(1, 12), st.data())
def test_every_token_is_predicted_once_with_enough_before_it(count, length, data):
    stride = data.draw(st.integers(1, length))
    predicted = []
    for begin, end, start in sliding_windows(count, length, stride):
        assert begin >= 0 and end <= count and start >= 1 and end - begin <= length + 1
        for token in range(begin + start, end):
            read = token - begin  # tokens of the window before it
            assert read == token or read > length - stride
            predicted.append(token)
    assert predicted == list(range(1, count))


def test_windows_of_the_docstring():
    text = "B1234567"
    windows = [(text[begin : end - 1], text[begin + start : end]) for begin, end, start in sliding_windows(8, 4, 2)]
    assert windows == [("B123", "1234"), ("2345", "56"), ("3456", "7")]


def test_files_of_every_kind_hold_the_same_documents(folder, text, tmp_path, monkeypatch):
    expected = run(folder, text)
    (tmp_path / "texts").mkdir()
    records = [{"text": FIRST}, {"story": SECOND}]
    (tmp_path / "texts" / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.read_bytes())))
    for given_files in ([tmp_path / "texts"], [tmp_path / "t*s" / "*.jsonl"], ["-"]):
        found = run(folder, *given_files)
        assert {**found, "data": str(text)} == expected
    both = run(folder, text, tmp_path / "texts")
    assert both["documents"] == 4 and both["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_the_text_of_a_record_may_have_another_name(folder, tmp_path):
    (tmp_path / "my.jsonl").write_text(json.dumps({"question": SECOND}))
    with pytest.raises(UserError, match="line 1 has no text under 'story' or 'text'.*column="):
        run(folder, tmp_path / "my.jsonl")
    assert run(folder, tmp_path / "my.jsonl", column="question")["bytes"] == len(SECOND.encode())
    with pytest.raises(UserError, match="column=question: is of text files: give data=<text file>"):
        EvaluateConfig(column="question")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "^data=-: standard input is empty"),
        (b"ab\xffc", "^data=-: not UTF-8 at byte 2: convert it"),
        (b" \n", "^data=-: holds no text but white space"),
    ],
    ids=str,
)
def test_standard_input_that_is_no_text_is_one_line(folder, monkeypatch, content, says):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    with pytest.raises(UserError, match=says) as error:
        run(folder, "-")
    assert "\n" not in str(error.value) and "stdin.txt" not in str(error.value)


def test_a_document_that_comes_in_parts_is_one(tokenizer):
    """A very long file of .txt is read in parts, cut at a space."""
    whole, parts = TextSums(), TextSums()
    text = "Once upon a time there was a ball. It was red."
    (ids,) = encode_documents([text], tokenizer, whole)
    (again,) = encode_documents([text[:16], Continuation(text[16:34]), Continuation(text[34:])], tokenizer, parts)
    assert ids.tolist() == again.tolist() == tokenizer.encode(text) and parts == whole
    assert (whole.documents, whole.words, whole.bytes) == (1, 11, len(text))


def test_files_that_are_passed_over_are_named(folder, text, tmp_path):
    (tmp_path / "texts").mkdir()
    text.rename(tmp_path / "texts" / "my.txt")
    (tmp_path / "texts" / "picture.png").write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"not read: not \.json.*: 1 \(picture.png\)"):
        run(folder, tmp_path / "texts")


@pytest.mark.parametrize(
    ("content", "options", "says"),
    [
        (None, {}, r"^data=.*my.txt: no such file, folder or glob$"),
        (b"", {}, r"^data=.*my.txt: is empty"),
        (b" \n\n ", {}, r"^data=.*my.txt: holds no text but white space: give another file"),
        (b"ab\xffc", {}, r"my.txt: not UTF-8 at byte 2: convert it"),
        ("ab".encode("utf-16"), {}, r"my.txt: UTF-16, not UTF-8: convert it"),
        (b"", {"data": TextFilesConfig(files=[""])}, "^data is empty: give a file, a folder or a glob"),
        (b"a", {"stride": 33}, r"^stride=33: is beyond the window of 32 tokens: give 32 or less"),
        (b"a", {"sequence_length": 33}, r"^sequence_length=33: is beyond the model's context of 32 tokens"),
        (b"a", {"data_dir": "data/demo"}, r"^data=.*my.txt and data_dir=data/demo: give one, text or shards"),
    ],
    ids=str,
)
def test_what_is_no_text_is_one_line(folder, tmp_path, content, options, says):
    if content is not None:
        (tmp_path / "my.txt").write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        run(folder, tmp_path / "my.txt", **options)
    assert "\n" not in str(error.value)


def test_a_model_that_cannot_read_text_is_one_line(tmp_path, text, tokenizer):
    with pytest.raises(UserError, match="stride=8: windows slide over text: give data="):
        EvaluateConfig(stride=8)
    model = tiny_model("none", max_position_embeddings=LENGTH)
    save_model_folder(tmp_path / "bare", model, QuantConfig(name="none"), None)
    with pytest.raises(UserError, match="the model has no tokenizer for text: give data_dir="):
        run(tmp_path / "bare", text)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.fill_(1e38)
    save_model_folder(tmp_path / "broken", model, QuantConfig(name="none"), tokenizer)
    with pytest.raises(ModelError, match="a loss is NaN"):
        run(tmp_path / "broken", text)


def test_files_are_the_value_of_data():
    for typed, files in (
        ("my.txt", ["my.txt"]),
        ("[a.txt,'b, c.txt']", ["a.txt", "b, c.txt"]),
        ("-", ["-"]),
        ("", [""]),
    ):
        assert compose("evaluate", [f"data={typed}"]).data.files == files
    assert as_typed(EvaluateConfig, ["data=a.txt,b.txt"], sweep=True) == ["data={files:['a.txt']},{files:['b.txt']}"]
    assert compose("evaluate", ["data.files=a b.txt"]).data.files == ["a b.txt"]
    with pytest.raises(UserError, match="it is data_dir=<folder of shards>"):
        compose("evaluate", ["data.dir=x"])
