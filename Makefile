# Every target sets up .venv by itself, with pip, from pyproject.toml.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test bench gpu lint train clean

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/zipvl demo

test: $(STAMP)
	$(BIN)/python -m pytest -q -m 'not gpu'

bench: $(STAMP)
	$(BIN)/python -m pytest -q benchmarks --benchmark-only

# A GPU machine brings its own torch: this uses its Python, and installs nothing but this package.
gpu:
	$(PYTHON) -m pip install -q --no-deps --no-build-isolation -e .
	$(PYTHON) -m pytest -q tests/gpu
	$(PYTHON) -m pytest -q benchmarks --benchmark-only -s

train: $(STAMP)
	$(BIN)/python -m zipvl_compile.tiny_lvlm.train --out zipvl_compile/tiny_lvlm/checkpoint

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy zipvl_compile

clean:
	rm -rf $(VENV) build dist *.egg-info
