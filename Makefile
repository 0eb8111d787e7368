# make help lists the targets. Everything lives in .venv; nothing outside this folder is touched.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PY := $(BIN)/python
C_SOURCES = $(shell find src tests -name '*.c' -o -name '*.cpp' -o -name '*.h')

.DEFAULT_GOAL := help
.PHONY: help install demo test faults fuzz lint format clean

help: ## Show this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(VENV)/.installed ## Create .venv and install the package with the pinned versions

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: install ## Demo corpus, dense twin, b1 and BitNet trained and compared, curves drawn, a story told (minutes)
	rm -rf outputs/demo
	$(PY) -m bitnet_lit.prepare source=demo
	$(PY) -m bitnet_lit.train -m experiment=demo quant=none,b1,b158 hydra.sweep.dir=outputs/demo
	$(PY) -m bitnet_lit.plot runs=outputs/demo out=outputs/demo/curves.png
	$(PY) -m bitnet_lit.evaluate checkpoint=outputs/demo/2
	$(PY) -m bitnet_lit.infer checkpoint=outputs/demo/2 prompt="Once upon a time" temperature=0.5 seed=1

test: install lint ## Lint, types and the whole test suite
	$(BIN)/pytest

faults: install ## Kill a run, prepare and each export at every file operation, fail the disk at each (an hour or two)
	FAULTS=all $(BIN)/pytest tests/faults/test_kills.py

fuzz: install ## Damage files and command lines for an hour, on all cores (FUZZ_SECONDS=..., FUZZ_SEED=... for others)
	FUZZ_SECONDS=$${FUZZ_SECONDS:-3600} $(BIN)/pytest tests/fuzz

lint: install ## ruff (lint and format), clang-format and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(C_SOURCES)
	$(BIN)/mypy

format: install ## Let ruff and clang-format format, and ruff fix
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_SOURCES)

clean: ## Remove .venv, outputs and caches
	rm -rf $(VENV) outputs .pytest_cache .mypy_cache .ruff_cache .hypothesis dist
