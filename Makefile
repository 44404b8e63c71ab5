# make demo: train the default model on text that is already here, and sample from it.
# make test: the whole test suite.
# Both need Python 3.11+, pip and make; everything else goes into .venv.
#
#   PYTHON=python3.12        another interpreter
#   JOBS=4                   test processes; one a core unless told otherwise
#   TORCH="torch==2.13.0"    what to give pip for torch (a CPU-only build: add its --index-url)

PYTHON ?= python3
TORCH ?= torch==2.13.0
RUN ?= runs/demo
JOBS ?= auto
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/installed
	$(BIN)/scatterfold train experiment=demo run_dir=$(RUN)
	$(BIN)/scatterfold sample source=$(RUN) prompt="def " max_tokens=300 temperature=0.5 top_p=0.9

test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv build dist *.egg-info

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "scatterfold needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip

.venv/torch: .venv/bin/python
	$(BIN)/python -m pip install --quiet $(TORCH)
	touch $@

.venv/installed: .venv/torch setup.py
	$(BIN)/python -m pip install --quiet -e .
	touch $@

.venv/installed-dev: .venv/torch setup.py
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@ .venv/installed
