# Every target sets up what it needs in $(VENV); nothing but Python, a C++ compiler and make is expected.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints/$(shell $(PYTHON) -c 'import sys; print("py311" if sys.version_info < (3, 12) else "py312")').txt
# Two workers: compiling, which is what takes the time, runs on one thread.
PYTEST_WORKERS ?= 2
PYTEST_ARGS ?=

# A stamp carries the checksum of what it was installed from, so that a changed file installs again.
KEY := $(shell cat pyproject.toml setup.py fastgpt_jax/kernels/cpu/native/* $(CONSTRAINTS) | cksum | cut -d' ' -f1)
BASE := $(VENV)/.installed-base-$(KEY)
TEST := $(VENV)/.installed-test-$(KEY)
DEV := $(VENV)/.installed-dev-$(KEY)
PIP_INSTALL = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

.PHONY: help demo test test-all sanitize check format clean

help:
	@echo 'make demo      explain, compile and stream from the embedded model'
	@echo 'make test      the tests without the slow ones'
	@echo 'make test-all  all tests'
	@echo 'make sanitize  the native kernels under AddressSanitizer and UBSan, and as ARM code under qemu-user'
	@echo 'make check     format, lint, types, import contracts'
	@echo 'make format    format and sort imports in place'
	@echo 'PYTHON=, VENV= and CONSTRAINTS= choose the interpreter, the environment and the versions'

demo: $(BASE)
	$(VENV)/bin/fastgpt demo

test: $(TEST)
	$(VENV)/bin/python -m pytest -n $(PYTEST_WORKERS) -m 'not slow' $(PYTEST_ARGS)

test-all: $(TEST)
	$(VENV)/bin/python -m pytest -n $(PYTEST_WORKERS) $(PYTEST_ARGS)

sanitize: $(TEST)
	$(VENV)/bin/python -m pytest -q -n 0 -rs tests/kernels/cpu/test_harness.py

check: $(TEST) $(DEV)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	$(VENV)/bin/lint-imports

format: $(DEV)
	$(VENV)/bin/ruff check --fix --select I .
	$(VENV)/bin/ruff format .

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(BASE): | $(VENV)/bin/python
	$(PIP_INSTALL) -e .
	rm -f $(VENV)/.installed-base-*
	touch $@

$(TEST): | $(VENV)/bin/python
	$(PIP_INSTALL) -e '.[test]'
	rm -f $(VENV)/.installed-test-*
	touch $@

$(DEV): | $(VENV)/bin/python
	$(PIP_INSTALL) -e '.[dev]'
	rm -f $(VENV)/.installed-dev-*
	touch $@
