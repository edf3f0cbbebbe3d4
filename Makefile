# make demo    install into .venv and watch OPD collapse and StableOPD hold
# make test    install into .venv and pass the tests
# make test-trl    install TRL too and test what works with it
# make lint    style and types
PYTHON ?= python3
VENV ?= .venv
# Installed first and by itself; override it to choose another build, e.g. make demo TORCH=torch==2.11.0
TORCH ?= torch==2.13.0
OUT ?= demo
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-trl lint install clean

demo: $(INSTALLED)
	$(BIN)/stableopd demo --out $(OUT)

test: $(INSTALLED)
	$(BIN)/python -m pytest

test-trl: $(INSTALLED)
	$(BIN)/python -m pip install --quiet -e ".[dev,trl]"
	$(BIN)/python -m pytest tests/integrations tests/unit/test_losses_peers.py

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
