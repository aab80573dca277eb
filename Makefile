# Every target sets itself up: a fresh clone needs only Python 3.11 or newer and make.
PYTHON ?= python3
VENV := .venv
LATEST := .venv-latest
RUN := $(VENV)/bin/python
# More extras of pyproject.toml, of which cuda and tpu are for accelerators: make setup EXTRAS=cuda
EXTRAS ?=
comma := ,
MORE := $(if $(EXTRAS),$(comma)$(EXTRAS))

.PHONY: help setup demo test test-slow test-latest check format clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(VENV)/installed$(EXTRAS)  ## create .venv and install everything the scripts and tests need

$(VENV)/installed$(EXTRAS): pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV), a minute or more"
	$(RUN) -m pip install --upgrade pip
	$(RUN) -m pip install --constraint constraints.txt --editable '.[experiments,dev$(MORE)]'
	touch $@

demo: setup  ## train on handwritten digits, sample with DDIM and DDPM, show the paper's claim
	$(RUN) experiments/demo.py --out out/demo

test: setup  ## the fast tests, shapes and types checked at run time
	JAX_PLATFORMS=cpu $(RUN) -m pytest -q -n 2 -m "not slow" \
	  --jaxtyping-packages=ddim_jax,beartype.beartype

test-slow: setup  ## the tests that take minutes: full-size networks, kill and resume
	JAX_PLATFORMS=cpu $(RUN) -m pytest -q -m slow \
	  --jaxtyping-packages=ddim_jax,beartype.beartype

test-latest:  ## the fast tests on the newest of everything, without constraints.txt
	test -x $(LATEST)/bin/python || $(PYTHON) -m venv $(LATEST)
	$(LATEST)/bin/python -m pip install --upgrade pip
	$(LATEST)/bin/python -m pip install --upgrade --upgrade-strategy eager \
	  --editable '.[experiments,dev]'
	$(LATEST)/bin/python -m pip list | grep -iE '^(jax|flax|optax|orbax|numpy)'
	JAX_PLATFORMS=cpu $(LATEST)/bin/python -m pytest -q -n 2 -m "not slow" \
	  --jaxtyping-packages=ddim_jax,beartype.beartype

check: setup  ## what CI promises: format, lint, types, fast tests
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/pyright
	$(MAKE) test

format: setup  ## let ruff format and sort
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

clean:  ## remove what the demo and the tests made
	rm -rf out .pytest_cache .ruff_cache .hypothesis
