"""Packages that may be missing: one line says what needs them, and what does not need them works without."""

import re
import subprocess
import sys

import pytest

from bitnet_lit.errors import UserError
from bitnet_lit.extras import EXTRAS, installed, needs
from tests.support import REPOSITORY, TINY_RUN


def test_a_missing_package_is_one_line_with_what_needs_it():
    expected = r"format=gguf: needs the package gguf: pip install gguf, or pip install 'bitnet-lit\[export\]'$"
    with pytest.raises(UserError, match=expected), needs("gguf", "format=gguf"):
        raise ModuleNotFoundError("No module named 'gguf'")


def test_a_package_that_is_there_and_cannot_be_imported_is_told_as_that():
    for broken in (
        ModuleNotFoundError("No module named 'numpy'", name="numpy"),
        ImportError("an old ABI", name="gguf"),
    ):
        expected = rf"format=gguf: the package gguf cannot be imported \({broken}\): mend it$"
        with pytest.raises(UserError, match=expected), needs("gguf", "format=gguf"):
            raise broken


def test_every_extra_is_one_of_the_project_and_brings_its_package():
    pyproject = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    section = pyproject[pyproject.index("[project.optional-dependencies]") :]
    for package, extra in EXTRAS.items():
        brought = re.search(rf"^{extra} = \[(.*?)\](?=\s)", section, re.M | re.S)
        assert brought and f'"{package}>=' in brought[1], package


def test_whether_a_package_is_installed():
    assert installed("torch", "hydra") and not installed("torch", "no_such_package")


def test_train_imports_no_wandb_and_does_without_it(tmp_path, shards):
    """A None in sys.modules is what Python takes for a package that cannot be imported."""
    code = (
        "import sys; sys.modules['wandb'] = None\n"
        "from bitnet_lit.train import main\n"
        "typed = sys.argv\n"
        "sys.argv = [*typed, 'hydra.run.dir=plain']; main(); print('trained')\n"
        "sys.argv = [*typed, 'hydra.run.dir=logged', 'logger=wandb']; main()\n"
    )
    arguments = [f"data.dir={shards}", *TINY_RUN, "trainer.max_steps=1", "trainer.val_check_interval=1"]
    command = [sys.executable, "-c", code, *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert "trained" in result.stdout and (tmp_path / "plain" / "model" / "config.json").exists(), result.stderr
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == "error: logger=wandb: needs the package wandb: pip install wandb"
