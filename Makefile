# `make check` and `make test` are what CI runs. Both set up first, which takes a moment when nothing changed.
SHELL := /bin/bash
VENV ?= $(CURDIR)/.venv
export VENV
PY := $(VENV)/bin/python
ARGS ?=
# Files of tests that run at once. More than two want more than two cores.
WORKERS ?= 2

.PHONY: help setup check test format bench lock clean

help:
	@echo "make setup    install what is missing into $(VENV)"
	@echo "make check    ruff, mypy --strict, tests/static"
	@echo "make test     all tests; ARGS='tests/cli -k doctor' picks some, WORKERS=0 runs one by one"
	@echo "make format   let ruff rewrite the sources"
	@echo "make bench    benchmarks/ttft.py"
	@echo "make lock     rewrite requirements/cpu.lock and dev.lock from what is installed"
	@echo "make clean    remove the virtual environment and all caches"

setup:
	@./launch/setup.sh

check: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -m pytest -q tests/static

test: setup
	$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

bench: setup
	$(PY) benchmarks/ttft.py $(ARGS)

lock: setup
	$(PY) requirements/lock.py

clean:
	rm -rf "$(VENV)" "$(VENV).lock" "$(VENV).log" build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
