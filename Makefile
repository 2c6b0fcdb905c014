# Two cores and one thread a process: two threads are slower on small nets.
export OMP_NUM_THREADS ?= 1

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test lint types figures transformer bench clean

help:  ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --group dev --editable .
	@touch $@

setup: $(STAMP)  ## make .venv with everything that is pinned in constraints.txt

demo: $(STAMP)  ## run the main job on the digits and write sealmark-demo/report.html
	$(BIN)/sealmark demo

lint: $(STAMP)  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## mypy --strict
	$(BIN)/mypy

test: lint types  ## lint, types, tests, doctests, coverage
	$(BIN)/python -m pytest --cov --cov-report=term --cov-report=json:.coverage.json -m "not slow and not transformer"
	$(BIN)/python tests/coverage_floor.py .coverage.json

figures: $(STAMP)  ## the figures over three seeds, into docs/results/
	$(BIN)/python -m sealmark.evaluate.figures docs/results

transformer: $(STAMP)  ## the real sentence transformer: its test and its figures
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[transformers]"
	$(BIN)/python -m pytest -m transformer tests/examples
	$(BIN)/python examples/minilm.py --out docs/results

bench: $(STAMP)  ## sealing, opening and issuing 1 GiB, each beside its limit, into docs/results/speed.md
	$(BIN)/python benchmarks/run.py --out docs/results/speed.md

clean:  ## remove what make made
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .coverage .coverage.json sealmark-demo
