# `make demo` and `make test` do everything from nothing, given Python >= 3.12.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $$p && break; done)
EXTRAS ?= dev
BIN = .venv/bin

.PHONY: demo test test-all results lint clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo      train a small model on text, and another to reason by RL; report on both'
	@echo 'make test      the tests that need only a CPU and minutes'
	@echo 'make test-all  those and the long ones (EXTRAS=dev,tpu,hf adds what they need)'
	@echo 'make results   regenerate the index of results, the figures of README and docs/configuration.md'
	@echo 'make lint      ruff'

.venv/.made-$(EXTRAS): setup.cfg pyproject.toml
	@if [ -z "$(PYTHON)" ]; then \
	  echo 'deepseek-jax needs Python >= 3.12, and python3 here is:' \
	    "$$(python3 --version 2>&1 || true)" >&2; \
	  echo 'Install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)' >&2; exit 1; fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12) and \
	  "deepseek-jax needs Python >= 3.12; $(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(EXTRAS)]'
	@touch $@

demo: .venv/.made-$(EXTRAS)
	$(BIN)/python -m experiments.run --experiment=pretrain --scale=cpu --out=runs/demo
	$(BIN)/python -m experiments.run --experiment=r1_zero --scale=demo --out=runs/demo-rl

test: .venv/.made-$(EXTRAS)
	$(BIN)/python -m pytest -m 'not long' -q -n auto --dist worksteal

test-all: .venv/.made-$(EXTRAS)
	$(BIN)/python -m pytest -q

results: .venv/.made-$(EXTRAS)
	$(BIN)/python -m experiments.run --experiment=results

lint: .venv/.made-$(EXTRAS)
	$(BIN)/ruff check .

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache build dist *.egg-info
