"""Model folders that an earlier version wrote (tests/artifacts/earlier/) open, compute the same, and are exported."""

import json
from pathlib import Path

import pytest
import torch

import bitnet_lit
from bitnet_lit.artifacts.locate import open_source
from tests.artifacts.exporting import export_to
from tests.support import assert_close_but_for_borders

EARLIER = Path(__file__).parent / "earlier"


@pytest.mark.parametrize("name", ["latent", "packed", "b1"])
def test_a_folder_of_an_earlier_version_computes_the_same(tmp_path, name):
    expected = torch.tensor(json.loads((EARLIER / "logits.json").read_text())[name])
    logits = bitnet_lit.load(EARLIER / name).logits(torch.arange(1, 17)[None])[0, -1]
    assert_close_but_for_borders(logits, expected)
    texts = {
        engine: bitnet_lit.load(EARLIER / name, engine=engine, threads=1).generate("Once", max_new_tokens=8, seed=1)
        for engine in ("cpu", "torch")
    }
    assert all(text.startswith("Once") and len(text) > 4 for text in texts.values())
    source = open_source(EARLIER / name)
    assert source.info["data_dir"] == "/home/somebody/data/tales" and source.packed == (name == "packed")
    if name != "packed":
        export_to(tmp_path / "again", EARLIER / name, format="packed", verify=False)
        assert open_source(tmp_path / "again").info["data"] == "tales"
