# make demo    install into .venv and watch OPD collapse and StableOPD hold
# make test    install into .venv and pass the tests
# make test-trl    install TRL too and test what works with it
# make test-vllm   install vLLM for CPUs into .venv-vllm (3 GB) and test the engine and the remote teacher with it
# make lint    style and types
PYTHON ?= python3
VENV ?= .venv
# Installed first and by itself; override it to choose another build, e.g. make demo TORCH=torch==2.11.0
TORCH ?= torch==2.13.0
OUT ?= demo
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Test files are spread over so many processes, each on one thread.
WORKERS ?= 2
VLLM_VENV ?= .venv-vllm
.PHONY: demo test test-trl test-vllm lint install clean

demo: $(INSTALLED)
	$(BIN)/stableopd demo --out $(OUT)

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --durations=30

test-trl: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -e ".[dev,trl]"
	$(BIN)/python -m pytest tests/integrations tests/unit/test_losses_peers.py

test-vllm: $(VLLM_VENV)/.installed
	$(VLLM_VENV)/bin/python -m pytest tests/with_vllm

$(VLLM_VENV)/.installed: pyproject.toml tests/with_vllm/install.sh
	PYTHON=$(PYTHON) tests/with_vllm/install.sh $(VLLM_VENV) "$(TORCH)"
	@touch $@

lint: $(INSTALLED)
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy

install: $(INSTALLED)

$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; say which: make demo PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet -e ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) build dist src/*.egg-info
