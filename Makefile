# What people type. Everything runs in a virtual environment that is made here.
#   make demo    install, then run the main job on a bundled checkpoint (under two minutes after the install)
#   make test    install, then run the tests, on up to 4 cores (make test-all: with the slow ones)
#   make test-compiled   what compiles for minutes: train 30 steps of every architecture and verify the checkpoint,
#                        DPA-2 stage by stage (half an hour)
#   make lint    formatting, lint, types
#   make bench   speed table; BENCH='--deepmd-python /path/to/python' adds deepmd-kit in the same run
# TORCH chooses the torch build, for example  make test TORCH='torch==2.13.0'

PYTHON ?= python3
TORCH  ?=
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test test-compiled test-all lint bench clean

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mtinfer needs Python >= 3.11, this is %s; use make PYTHON=python3.11" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(BIN)/python -m pip install --quiet '$(TORCH)')
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/01_demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 -m 'not slow and not gpu'

test-compiled: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 -m 'slow and not gpu' tests/train tests/test_parts.py

test-all: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 4

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python -m mtinfer bench $(BENCH)

clean:
	rm -rf $(VENV) demo-output trained build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
