PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: demo test lint gradient-variance test-lowest clean

demo: $(READY)  ## Train on real data, with and without Bayes
	$(BIN)/python -m pyro_bayes.demo

test: $(READY)  ## Run the tests, which also run the README, the docstrings and the notebooks
	$(BIN)/python -m pytest

lint: $(READY)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

gradient-variance: $(READY)  ## Measure the variance of gradients; writes benchmarks/README.md
	$(BIN)/python benchmarks/gradient_variance.py

test-lowest:  ## Run the tests with the lowest versions that are supported
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

clean:
	rm -rf .venv .venv-lowest

CONSTRAINTS ?= constraints.txt

$(READY): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@
