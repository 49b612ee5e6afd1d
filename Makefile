# `make` lists the targets. Everything runs in .venv; no root needed.
SHELL := bash
.SHELLFLAGS := -o pipefail -c
PYTHON ?= python3
BIN := .venv/bin
# CI adds all others; tests of what is not installed are skipped.
EXTRAS ?= demo,dev
# A machine without a GPU keeps torch's CPU build (see the file); a GPU machine takes CUDA wheels.
CONSTRAINTS := $(shell command -v nvidia-smi >/dev/null 2>&1 || echo "-c constraints-cpu.txt")

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.venv/ready-$(EXTRAS): pyproject.toml constraints-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade 'pip>=24'
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e '.[$(EXTRAS)]'
	touch '$@'

setup: .venv/ready-$(EXTRAS)  ## the environment: .venv with fastidmm, its tests' and the demo's needs

demo: setup  ## photographs in, report out: pretrain, fine-tune, compare with no pretraining
	rm -rf runs/demo
	$(BIN)/fastidmm run --recipe demo --run demo
	@echo 'kNN and probe below random weights: the price of so few epochs (configs/demo.toml)'
	@echo 'then your own: . $(BIN)/activate; fastidmm prepare --dataset folder --from ~/photos --name mine'

test: setup  ## every test that needs no GPU, on two cores
	$(BIN)/python -m pytest -q -m "not gpu" -n 2 --dist worksteal $(ARGS)

test-gpu: setup  ## the tests that need an NVIDIA GPU
	$(BIN)/python -m pytest -q -m gpu $(ARGS)

faults: setup  ## what is promised of kills, signals, faults and mistakes, and what is found (an hour)
	@for file in tests/faults/*.py; do \
		grep -q __main__ $$file || continue; echo "$$file"; $(BIN)/python $$file || exit 1; \
	done
	@for subject in hostile audit live statuses releases golden; do \
		echo "tests of $$subject"; \
		$(BIN)/python -m pytest -q -m "not gpu" -k $$subject tests | tail -n 1 || exit 1; \
	done
	$(BIN)/python tests/mutants.py trainer | tail -n 1

mutants: setup  ## plant mistakes in kernels and trainer: do the tests notice? (half an hour or more)
	$(BIN)/python tests/mutants.py

fix: setup  ## format, and mend what can be mended by itself
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: setup  ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

wheel: setup  ## build the wheel by way of the sdist, install it alone and use it
	$(BIN)/python tests/wheel.py

docs:  ## the pages as a site in .site/html (EXTRAS=docs)
	$(MAKE) setup EXTRAS=docs
	$(BIN)/python docs/pages.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

clean:  ## remove what the other targets made, but for runs/
	rm -rf .venv build dist .mypy_cache .pytest_cache .ruff_cache

.PHONY: help setup demo test test-gpu faults mutants fix check wheel docs clean
