# Needs Python >= 3.11, git and make; everything else is installed into .venv from pyproject.toml.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -c constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.PHONY: help quickstart test test-all check bench mutate format clean

help:
	@echo "make quickstart   the whole loop on a generated problem: CPU, a few minutes, ends with runs/quickstart/report.html"
	@echo "make test         every test, on two processes"
	@echo "make test-all     the same, every seeded fault, and a short run of the convergence study"
	@echo "make check        formatting, lint, types, architecture"
	@echo "make bench        a DPO step against TRL: minutes; BENCH_ARGS='--profiles hh tldr --contenders all --rounds 3' for more"
	@echo "make mutate       plant every seeded fault; the tests must notice each"
	@echo "make format       let ruff rewrite the formatting"
	@echo "make clean        remove caches and builds; .venv and runs/ stay"

quickstart: $(VENV)/.runtime
	$(BIN)/preftune quickstart $(ARGS)

test: $(VENV)/.dev
	$(PYTEST) -n 2 $(ARGS)

test-all: test mutate
	$(BIN)/python benchmarks/convergence.py --fast --out runs/convergence

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(PYTEST) tests/architecture

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/step.py $(BENCH_ARGS)

mutate: $(VENV)/.dev
	$(BIN)/python scripts/mutate $(ARGS)

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests benchmarks scripts -name __pycache__ -type d -prune -exec rm -rf {} +

# torch first: with its version settled, nothing later can pull another build of it.
$(VENV)/.runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python >= 3.11 is needed, but $(PYTHON) is %s; name another: make PYTHON=python3.12" % sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) -q -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(PIP) -q -e '.[dev]'
	@touch $@
