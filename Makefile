# Everything is installed into .venv by the first target that needs it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test lint types bench wheel clean

# Compress a real language model, load it back, and show what was gained and lost.
demo: $(VENV)/demo
	$(BIN)/python benchmarks/demo.py

test: $(VENV)/dev
	$(BIN)/python -m pytest -n auto -m "not slow and not gpu"

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev
	$(BIN)/mypy --strict -p seedpack

# Regenerate every number that the README and docs/benchmarks quote (about 40 minutes on 2 cores).
bench: $(VENV)/demo
	$(BIN)/python benchmarks/run_all.py

# Build the wheel, install it in a clean environment and use it from outside the checkout.
wheel: $(VENV)/dev
	.ci/wheel $(BIN)/python

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[gguf]'
	touch $@

$(VENV)/dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(INSTALL) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) .cache build dist *.egg-info
