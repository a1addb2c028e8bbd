# Everything runs in .venv, which is made on first use and brought up to date when the pins change.
# Settings:  PYTHON=python3.12   which interpreter makes .venv (3.11, 3.12 or 3.13)
#            JOBS=4              parallel processes of the tests

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
LOCK := requirements.lock
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint $(LOCK)
# A stray PYTHONPATH would shadow the pinned packages.
unexport PYTHONPATH

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo demo-small test test-fast lint format train-tiny screenshot clean chromium

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.demo  ## open the demo in the browser, with the embedded checkpoint
	$(BIN)/ms-resampler demo

demo-small: $(VENV)/.demo  ## the same with the small model of real parts
	$(BIN)/ms-resampler demo --small

test: $(VENV)/.dev chromium  ## run every test: fast ones first, then slow ones and the browser
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow and not browser"
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "slow and not browser"
	$(BIN)/python -m pytest -m browser

test-fast: $(VENV)/.dev  ## run the fast tests
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile -m "not slow and not browser"

lint: $(VENV)/.dev  ## check style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev  ## format the code and mend what can be mended
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

train-tiny: $(VENV)/.dev  ## train the embedded checkpoint again
	$(BIN)/ms-resampler train tiny

screenshot: $(VENV)/.dev chromium  ## take the README's picture of the demo again
	$(BIN)/python docs/make_screenshot.py

clean:  ## remove .venv, caches and build output
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp for each set of extras; dev holds everything that demo and small do.
$(VENV)/.demo: $(LOCK) pyproject.toml | $(BIN)/python
	@echo "Installing what the demo needs in $(VENV) (a few minutes the first time) ..."
	$(INSTALL) --editable '.[demo,small]'
	@touch $@

$(VENV)/.dev: $(LOCK) pyproject.toml | $(BIN)/python
	@echo "Installing what development needs in $(VENV) (a few minutes the first time) ..."
	$(INSTALL) --editable '.[dev]'
	@touch $(VENV)/.demo $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "MS-Resampler needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is not: make PYTHON=python3.12 ..." >&2; \
	  exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "$(PYTHON) cannot make virtual environments: install its venv package (python3-venv)" >&2; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)

# The browser tests and the screenshot drive a Chromium that is already on the machine ($$CHROMIUM, or on
# the PATH); it is installed here only where that needs no password.
chromium:
	@for name in "$$CHROMIUM" chromium chromium-browser google-chrome \
	    "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"; do \
	  command -v "$$name" >/dev/null 2>&1 && exit 0; \
	done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null && exit 0; \
	fi; \
	echo "No Chromium found: install chromium or Google Chrome, or set CHROMIUM=/path/to/it." >&2; exit 1
