# From a fresh clone to images and tests; needs Python 3.11 or newer. The first call installs, later ones are quick.

PYTHON ?= python3
VENV ?= .venv
OUT ?= out
WORKERS ?= 2

INSTALL = $(VENV)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

.PHONY: help demo test lint clean

help:
	@echo "make demo   run all tasks on a small built-in model and leave images in $(OUT)/"
	@echo "make test   run the tests"
	@echo "make lint   check style and types"
	@echo "make clean  remove the virtual environment $(VENV)"

demo: $(VENV)/.runtime
	$(VENV)/bin/bagel demo --out "$(OUT)"
	@echo "The images are in $(OUT)/; start with the contact sheet."

# One thread a worker: several pools of threads on the same cores wait for each other.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest --numprocesses $(WORKERS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

clean:
	rm -rf $(VENV)

$(VENV)/.runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	@echo "installing torch and the other packages; this takes some minutes, once"
	$(INSTALL) torch
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime
	$(INSTALL) --editable ".[dev]"
	@touch $@
