# make demo: install, build the demo shards, train, evaluate, export, print a table.  make test: install, test.
# make faults: the faults that need no GPU, at full size, as a table (two hours).  make soak: 20,000 steps.
PYTHON ?= python3
BIN := .venv/bin
GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1 && echo yes)

.PHONY: demo test faults soak lint clean

.venv/installed: setup.py
	$(PYTHON) -m venv .venv
	$(if $(GPU),,$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[$(if $(GPU),gpu,dali),test]'
	touch $@

demo: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python launch/demo.py

test: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m pytest $(if $(GPU),,-n 2 --dist loadfile)

faults: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/faults/table.py $(FAULTS)

soak: .venv/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python tests/faults/soak.py

lint: .venv/installed
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

clean:
	rm -rf .venv build *.egg-info
