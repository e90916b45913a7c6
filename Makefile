# `make demo` and `make test` do all their own set-up: a machine with Python 3.11 to 3.13, pip and make is enough.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
VERSION := $(shell $(PYTHON) -c 'import sys; print("py%d%d" % sys.version_info[:2])')
LOCK := requirements/$(VERSION).txt
DEMO ?= demo
WORKERS ?= auto

.PHONY: help install test lint parity docs demo clean

help:
	@echo "make demo     phantom neuropil: make it, train briefly, segment, evaluate, report ($(DEMO)/report)"
	@echo "make test     the test command of the README"
	@echo "make lint     ruff and mypy"
	@echo "make parity   every recorded reference output (EMJAX_SHARED, default ../shared)"
	@echo "make docs     the documentation as a site, in site/"

$(VENV)/.installed: pyproject.toml $(wildcard requirements/*.txt)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(if $(wildcard $(LOCK)),-c $(LOCK)) -e ".[dev]"
	touch $@

install: $(VENV)/.installed

test: install
	$(BIN)/python -m pytest -n $(WORKERS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

EMJAX_SHARED ?= ../shared
parity: install
	$(BIN)/python eval/parity.py --oracles $(EMJAX_SHARED)/oracles

docs: install
	$(BIN)/mkdocs build --strict

demo: install
	PATH="$(CURDIR)/$(BIN):$$PATH" sh train/demo.sh $(DEMO)

clean:
	rm -rf $(VENV) $(DEMO) site .cache build
