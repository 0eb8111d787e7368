"""What is given to others (a model folder, an export, what is shared) names no path of the machine."""

import json
import re
from pathlib import Path

import pytest

from bitnet_lit.checkpoints.formats.model_folder import public_info
from bitnet_lit.checkpoints.formats.model_folder_writer import save_model_folder
from bitnet_lit.checkpoints.formats.packed import Packed
from bitnet_lit.checkpoints.locate import open_stored
from bitnet_lit.config import ExportConfig, QuantConfig
from bitnet_lit.exports.share import model_card
from bitnet_lit.exports.write import export
from tests.support import tiny_model

SECRET = "/home/somebody/secret client"
INFO = {
    "data_dir": f"{SECRET}/tales",
    "recipe": {"started from": f"{SECRET}/dense run/", "note": "from /home/somebody/secret/x to ~/secret/y, half 1/2"},
    "metrics": {"val/loss": 1.25, "odd": None},
    "list": [f"{SECRET}/z", 3],
}


def test_of_a_path_its_last_part_stays():
    assert public_info(INFO) == {
        "data": "tales",
        "recipe": {"started from": "dense run", "note": "from x to y, half 1/2"},
        "metrics": {"val/loss": 1.25, "odd": None},
        "list": ["z", 3],
    }
    assert public_info({"data": "tales", "seed": 1}) == {"data": "tales", "seed": 1}
    for text in ("1/2 of val/loss", "a / b", "https://example.org/a/b", "muon, peak 0.02", "and/or", ""):
        assert public_info({"x": text}) == {"x": text}


def test_no_file_that_is_written_holds_a_path(tmp_path, tokenizer, monkeypatch):
    """Also from a folder of an earlier version, which held some."""
    work = tmp_path / "secret place"
    work.mkdir()
    monkeypatch.chdir(work)
    model = tiny_model(sub_norm=False, vocab_size=tokenizer.vocab_size)
    save_model_folder(work / "model", model, QuantConfig(), tokenizer, INFO)
    written = [*(work / "model").iterdir()]
    config = json.loads((work / "model/config.json").read_text())
    config["bitnet_lit"]["info"] = INFO
    (work / "old").mkdir()
    for path in written:
        (work / "old" / path.name).write_bytes(path.read_bytes())
    (work / "old/config.json").write_text(json.dumps(config))
    for format in ("packed", "latent", "llama2c", "gguf"):
        options = {"type": "f16", "embeddings": "f16", "verify": False}
        config = ExportConfig(checkpoint=str(work / "old"), format=format, out=str(work / format), **options)
        report = export(config)
        written += [*(work / format).iterdir()] if (work / format).is_dir() else [work / format, work / "gguf.json"]
        card = model_card("me/story", open_stored(work / "old"), report, config.chosen_format)
        assert "secret" not in card and "| data | tales |" in card
    assert len(written) > 15
    for path in written:
        assert not re.search(rb"secret|somebody|/home/|/tmp/", path.read_bytes()), path


def test_a_long_text_of_a_foreign_folder_takes_no_time():
    """A search that goes back over the text at each of its characters would take hours here."""
    for text in ("x /" + "a" * 2**20 + "/b", "x " + "/a" * 2**19, "/ " * 2**17):
        assert len(public_info({"x": text})["x"]) <= len(text)
    assert public_info({"x": "x /" + "a/" * 2**19 + "last"}) == {"x": "x last"}


@pytest.mark.parametrize("text", ["a | b", "line\nline", "x" * 5000, "# no heading\n| x |"])
def test_a_card_keeps_its_table_whatever_a_folder_says(tmp_path, tokenizer, text):
    info = {"recipe": {"optimizer": text, text: "muon"}, "metrics": {"val/loss": "no number"}}
    save_model_folder(tmp_path / "model", tiny_model(), QuantConfig(), tokenizer, info)
    sizes = {"parameters": 1, "bytes": 1, "bits_per_weight": 1.0}
    report = {"runs_in_transformers": False, "format": "packed", "sizes": sizes, "parity": {}}
    card = model_card("me/story", open_stored(Path(tmp_path / "model")), report, Packed())
    rows = [line for line in card.splitlines() if line.startswith("| ") and line != "| | |"]
    assert len(rows) == 6 and max(map(len, rows)) < 700
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 3 for row in rows)
