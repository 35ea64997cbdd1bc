# make demo: install, build the demo shards, train, evaluate, export, print a table.  make test: install, test.
PYTHON ?= python3
BIN := .venv/bin
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)

.PHONY: demo test lint clean

.venv/installed: setup.py
	$(PYTHON) -m venv .venv
	$(if $(GPU),,$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[$(if $(GPU),gpu,dali),test]'
	touch $@

demo: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python launch/demo.py

test: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf .venv build *.egg-info
