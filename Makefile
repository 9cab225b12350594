# Two commands do everything: `make demo` and `make test`. Both make .venv and install into it first, if need be.

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
SOURCE ?=
BUNDLE ?= demo/synthetic/run/bundle
PORT ?= 8000
PYTEST_ARGS ?=
PROCESSES ?= 2
QUICK := not slow and not chaos and not browser and not gpu

.PHONY: help install demo serve test test-unit test-ray slow chaos lint clean
# Tests of Ray take the machine for themselves.
.NOTPARALLEL:

help:
	@echo "make demo [SOURCE=DIR]    the whole road on synthetic patches, or on a Kaggle-layout folder"
	@echo "make serve [BUNDLE=DIR]   keep the endpoint up on 127.0.0.1:$(PORT), without authentication"
	@echo "make test                 test-unit, in $(PROCESSES) processes at a time, then test-ray, which holds those of serve too"
	@echo "make slow | make chaos    the long tiers"
	@echo "make lint                 ruff and mypy"

install: $(VENV)/.installed

# Made again only when what it is made from changes.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/python -m ray_jobs.demo $(if $(SOURCE),--source "$(SOURCE)")

serve: install
	$(BIN)/sentinode serve --bundle "$(BUNDLE)" --port $(PORT) --set auth=none

test: test-unit test-ray

test-unit: install
	$(BIN)/python -m pytest -n $(PROCESSES) -m "$(QUICK) and not ray and not serve" $(PYTEST_ARGS)

test-ray: install
	$(BIN)/python -m pytest -m "$(QUICK) and (ray or serve)" $(PYTEST_ARGS)

slow: install
	$(BIN)/python -m pytest -m "slow" $(PYTEST_ARGS)

chaos: install
	$(BIN)/python -m pytest -m "chaos and not slow" $(PYTEST_ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache
