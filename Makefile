# Needs python3 (3.11 or newer) with its venv module, and make. Everything else goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: example test lint docs fuzz mutants

example: $(INSTALLED)
	$(BIN)/python example.py

# Bytecode is kept, whatever the environment says: the tests start some sixty processes
test: $(INSTALLED)
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Damaged and odd input for MINUTES minutes, from the seed FIRST on
MINUTES ?= 5
FIRST ?= 1000
fuzz: $(INSTALLED)
	cd tests && OMP_NUM_THREADS=1 PYTHONPATH=. ../$(BIN)/python -m fuzz --minutes $(MINUTES) --first $(FIRST)

# MUTANTS small faults of the package, drawn by SEED, for at most LONGEST minutes, on one thread
MUTANTS ?= 200
SEED ?= 1
LONGEST ?= 60
mutants: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint requirements.txt --requirement benchmarks/mutants/requirements.txt
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.mutants --mutants $(MUTANTS) --seed $(SEED) --minutes $(LONGEST)

lint: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

# The pages, in site/: strict, and without the network, when built and when read
docs: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m mkdocs build --strict --quiet

# Again whenever the pins or the package's own dependencies change
$(INSTALLED): requirements.txt requirements-qnn.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "error: Python 3.11 or newer is needed; run make PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-qnn.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@
