# Two cores and one thread a process: two threads are slower on small nets.
export OMP_NUM_THREADS ?= 1

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test check lint types authorization identity blackbox whitebox transformer lineage bench pages clean

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

TESTS := -n 2 --dist loadfile --cov --cov-report=term --cov-report=json:.coverage.json

test: lint types  ## lint, types, tests, doctests, but for what takes minutes
	$(BIN)/python -m pytest $(TESTS) -m "not slow and not transformer"

check: lint types  ## the same with the slow tests and the floors of coverage: what CI runs
	$(BIN)/python -m pytest $(TESTS) -m "not transformer"
	$(BIN)/python tests/coverage_floor.py .coverage.json

authorization: $(STAMP)  ## every lock, with right, wrong and near keys, attacked, into docs/results/
	$(BIN)/python -m sealmark.evaluate.authorization docs/results --workers 2

identity: $(STAMP)  ## every user mark, pooled by coalitions, and every credential, forged, into docs/results/
	$(BIN)/python -m sealmark.evaluate.identity docs/results --workers 2

blackbox: $(STAMP)  ## every black-box mark and fingerprint, attacked, and false claims, into docs/results/
	$(BIN)/python -m sealmark.evaluate.blackbox docs/results

whitebox: $(STAMP)  ## every white-box mark, attacked, rewritten and aligned, into docs/results/
	$(BIN)/python -m sealmark.evaluate.whitebox docs/results

pages: $(STAMP)  ## docs/schemes, docs/attacks.md and docs/patents.md, from the cards
	$(BIN)/python -m sealmark.evaluate.pages docs

lineage: $(STAMP)  ## is one transformer derived from another? into docs/results/
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[transformers]"
	cd examples && ../$(BIN)/python lineage.py --out ../docs/results

transformer: $(STAMP)  ## the real sentence transformer: its test and its figures
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[transformers]"
	$(BIN)/python -m pytest -m transformer tests/examples
	$(BIN)/python examples/minilm.py --out docs/results

bench: $(STAMP)  ## files of 1 GiB beside their limit, marked training steps beside plain ones, into docs/results/
	$(BIN)/python benchmarks/run.py --out docs/results/speed.md
	$(BIN)/python benchmarks/training.py --out docs/results/training-speed.md
	$(BIN)/python benchmarks/tracing.py --out docs/results/tracing.md

clean:  ## remove what make made
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .coverage .coverage.json sealmark-demo
