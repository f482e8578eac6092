# The verbs. `make demo` and `make test` need nothing but Python 3.11 or newer, pip and make.

PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
# Packages are compiled as they are first imported, which is less than all of them; without that, at every import.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test check bench torture serve lock clean

help:  ## show this help
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

demo: $(VENV)/.run  ## a run from detector to NeXus, under Prefect, on this machine
	$(BIN)/nearline demo $(DEMO_OPTIONS)

test: $(VENV)/.dev  ## all tests
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not campaign" $(TEST_OPTIONS)

check: $(VENV)/.dev  ## ruff, types, import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev  ## figures beside limits and peers (redis-server, nats-server if installed), and under build/bench/
	$(BIN)/python -m benchmarks $(BENCH_OPTIONS)

torture: $(VENV)/.dev  ## the long campaigns that `make test` leaves out
	$(BIN)/python -m pytest -m campaign $(TEST_OPTIONS)

serve: $(VENV)/.run  ## the streaming service on this machine
	$(BIN)/nearline serve

lock: $(VENV)/.dev  ## pin anew what requirements/*.in ask for
	$(PIP) install --quiet uv
	cd requirements && for name in run dev; do ../$(BIN)/uv pip compile --quiet --no-emit-index-url --no-header \
		--no-annotate --python-version 3.11 $$name.in -o $$name.txt; done

clean:  ## remove what was built, not the data of anybody
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed; install it, or name it: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(BIN)/python requirements/run.txt pyproject.toml
	@echo "installing what Nearline needs into $(VENV) (once, a minute or two)"
	$(PIP) install --quiet --no-compile -r requirements/run.txt
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run requirements/dev.txt
	$(PIP) install --quiet --no-compile -r requirements/dev.txt
	@touch $@
