# make help lists the targets. Everything lives in .venv; nothing outside this folder is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
C_SOURCES = $(shell find src tests -name '*.c' -o -name '*.cpp' -o -name '*.h')

.DEFAULT_GOAL := help
.PHONY: help install demo test faults fuzz lint format clean

help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## Make .venv, install the package with the versions of constraints.txt, compile its C++

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m bitnet_lit.native
	@touch $@

demo: install ## Train a dense, a binary and a 1.58-bit model on the demo corpus, compare them, tell a story (about 75 s)
	rm -rf outputs/demo
	$(BIN)/python -m bitnet_lit.prepare source=demo
	$(BIN)/python -m bitnet_lit.train -m experiment=demo quant=none,b1,b158 hydra.sweep.dir=outputs/demo
	$(BIN)/python -m bitnet_lit.plot runs=outputs/demo out=outputs/demo/curves.png
	$(BIN)/python -m bitnet_lit.evaluate checkpoint=outputs/demo/quant=b158
	$(BIN)/python -m bitnet_lit.infer checkpoint=outputs/demo/quant=b158 prompt="Once upon a time" temperature=0.5 seed=1

test: install lint ## Run make lint and the whole test suite, as CI does
	$(BIN)/pytest

faults: install ## Kill commands, and fail the disk, at every one of their file operations (an hour or two)
	FAULTS=all $(BIN)/pytest tests/faults/test_kills.py

fuzz: install ## Damage files and command lines for an hour, on all cores (FUZZ_SECONDS=60 FUZZ_SEED=7 for others)
	FUZZ_SECONDS=$${FUZZ_SECONDS:-3600} $(BIN)/pytest tests/fuzz

lint: install ## Check style and types: ruff, clang-format, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(C_SOURCES)
	$(BIN)/mypy

format: install ## Let ruff and clang-format mend what they can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_SOURCES)

clean: ## Remove .venv, outputs and caches
	rm -rf $(VENV) outputs .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
