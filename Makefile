# Everything a user or a contributor runs. `make demo` and `make test` need Python 3.10 or later and nothing else.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# a Python that has fp8kv already, in place of $(VENV): make gpu-test BIN_PYTHON=python3
BIN_PYTHON ?= $(BIN)/python
ROOMS  := fp8kv_cli calibrate runtime kernels recipes
NEEDS_GPU = $(BIN_PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make $@ needs a CUDA GPU, and torch " + torch.__version__ + " finds none here. make test needs none.")'
SOURCES := $(shell find $(ROOMS) -name '*.py' -o -name '*.yaml')

# the repository root holds a folder called `kernels`, which must not shadow the distribution of that name
export PYTHONSAFEPATH := 1

.PHONY: demo test lint format typecheck coverage gpu-test bench tables clean

demo: $(VENV)/.demo
	$(BIN)/fp8kv demo

# the models of the tests are tiny: more than one thread costs more than it gives
test coverage: export OMP_NUM_THREADS := 1

test: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST_ARGS)

coverage: $(VENV)/.test
	$(BIN)/python -m pytest --cov --cov-report=term $(PYTEST_ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

ifeq ($(BIN_PYTHON),$(BIN)/python)
gpu-test bench: $(VENV)/.test
endif

gpu-test:
	@$(NEEDS_GPU)
	$(BIN_PYTHON) -m pytest -m gpu tests/kernels tests/calibrate tests/runtime $(PYTEST_ARGS)

bench: export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))
bench:
	@$(NEEDS_GPU)
	$(BIN_PYTHON) -m benchmarks.kernels.run --out benchmarks/results $(BENCH_ARGS)
	$(BIN_PYTHON) -m benchmarks.runtime.run --out benchmarks/results

tables:
	$(PYTHON) benchmarks/kernels/table.py
	$(PYTHON) benchmarks/runtime/table.py

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage

$(VENV)/.python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/.demo: $(VENV)/.python pyproject.toml $(SOURCES)
	$(BIN)/python -m pip install --quiet .
	touch $@

# a strict editable install links every file where type checkers and import-linter find it, so a new file needs
# a new install
$(VENV)/.test: $(VENV)/.python pyproject.toml $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable ".[test]" --config-settings editable_mode=strict
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(BIN)/python -m pip install --quiet --editable ".[dev]" --config-settings editable_mode=strict
	touch $@
