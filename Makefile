# make demo | test | test-all. Each sets up its own .venv first; a second call finds it ready and installs nothing.
#   PYTHON=python3.12    another interpreter (>= 3.11)
#   PIP_ARGS=...         more arguments for pip, such as an index with CPU-only wheels of torch
#   JOBS=2               test processes

PYTHON ?= python3
PIP_ARGS ?=
JOBS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt
# One thread a test process: small tensors gain nothing from more, and the processes would fight for the cores.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal

.PHONY: demo setup lint test test-slow test-all clean

demo: $(VENV)/.core
	@$(BIN)/tidar demo

setup: $(VENV)/.dev

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint
	$(PYTEST) -m "not slow"

test-slow: setup
	$(PYTEST) -m slow --timeout 1800

test-all: test
	@$(MAKE) --no-print-directory test-slow

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache

# A stamp appears only after an installation that succeeded, so an interrupted one is taken up again.
$(VENV)/.core: pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory venv
	$(PIP) -e .
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	@$(MAKE) --no-print-directory venv
	$(PIP) -e '.[dev]'
	@touch $(VENV)/.core $@

.PHONY: venv
venv:
	@command -v $(PYTHON) >/dev/null || { echo 'Python is missing: sudo apt install python3 python3-venv' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "$$($(PYTHON) -V) is too old, 3.11 or newer is needed: sudo apt install python3.11 python3.11-venv && make PYTHON=python3.11 (or any newer one your release has)" >&2; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "Python's venv module is missing: sudo apt install $$($(PYTHON) -c 'import sys; print("python3.%d-venv" % sys.version_info[1])')" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
