PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: demo test lint docs notebooks bench gradient-variance uci test-architectures \
	test-lowest clean

demo: $(READY)  ## Train on real data, with and without Bayes
	$(BIN)/python -m pyro_bayes.demo

test: $(READY)  ## Run the tests, which also run the README, the docstrings and the notebooks
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

lint: $(READY)  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/docs-ready  ## Build the documentation, in docs/_build/html, and check it
	$(BIN)/python -m sphinx -W --keep-going --quiet -b html docs docs/_build/html
	$(BIN)/python docs/check.py docs/_build/html

bench: .venv-bench/ready  ## Time us and others; writes benchmarks/README.md
	.venv-bench/bin/python benchmarks/speed.py

gradient-variance: $(READY)  ## Measure the variance of gradients; writes benchmarks/README.md
	$(BIN)/python benchmarks/gradient_variance.py

uci: $(READY)  ## Score on the UCI datasets: make uci DATA=folder PUBLISHED=file.csv
	$(BIN)/python -m benchmarks.uci $(if $(DATA),--data '$(DATA)') \
		$(if $(PUBLISHED),--published '$(PUBLISHED)')

notebooks: $(READY)  ## Execute the notebooks, and make their index in the README
	$(BIN)/python notebooks/execute.py $(NAMES)

test-architectures:  ## Compare estimators with draws on networks that people use
	$(PYTHON) -m venv --clear .venv-architectures
	.venv-architectures/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --editable '.[demo,zuko]' pytest \
		--requirement tests/architectures/packages.txt
	.venv-architectures/bin/python -m pytest -q -s tests/architectures

test-lowest:  ## Run the tests with the lowest versions that are supported
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt

clean:
	rm -rf .venv .venv-architectures .venv-bench .venv-lowest docs/_build

CONSTRAINTS ?= constraints.txt

$(READY): pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint $(CONSTRAINTS) --editable '.[dev]'
	touch $@

$(VENV)/docs-ready: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--constraint $(CONSTRAINTS) --editable '.[docs]'
	touch $@

.venv-bench/ready: pyproject.toml $(CONSTRAINTS) benchmarks/peers.txt
	$(PYTHON) -m venv --clear .venv-bench
	.venv-bench/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint $(CONSTRAINTS) --editable '.[demo,zuko]' --requirement benchmarks/peers.txt
	touch $@
