# The two commands of the README: `make quickstart` and `make test`.
# Everything is installed into .venv from the package index; nothing else is needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# pip, not uv: some machines serve torch from a local index that only pip is configured for.
PIP := $(BIN)/python -m pip --disable-pip-version-check

export TOKENIZERS_PARALLELISM := false
export HF_HUB_DISABLE_TELEMETRY := 1
# Containers like to set it. The install below compiles nothing, so every process would compile
# what it imports anew (docs/logbook.md).
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install install-dev readers quickstart test wheel lint types unit debug gpu ui format clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 16

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit("RL-Decoder needs Python 3.11 or newer; this is " + sys.version.split()[0] + ". Set PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)

# torch first and by exact version, so that the CPU build is taken where one is offered. Python
# compiles what is imported; compiling all that is installed would take another minute or two.
INSTALL := $(PIP) install -q --no-compile -c constraints.txt

$(VENV)/.installed: constraints.txt pyproject.toml | $(VENV)/bin/python
	$(INSTALL) torch==2.13.0
	$(INSTALL) -e .
	touch $@

$(VENV)/.installed-dev: constraints.txt pyproject.toml | $(VENV)/bin/python
	$(INSTALL) torch==2.13.0
	$(INSTALL) -e '.[dev]'
	touch $(VENV)/.installed $@

install: $(VENV)/.installed  ## Install into .venv
install-dev: $(VENV)/.installed-dev  ## Install with the test tools

# Projects that read our exports. Their requirements clash with the pinned versions here, so they
# come without, into a folder that only the tests of exports look into.
READERS := build/export_readers
readers: $(READERS)/.installed  ## What reads the exports, for their tests
$(READERS)/.installed: tests/export_readers.txt $(VENV)/.installed-dev
	$(PIP) install -q --no-compile --no-deps --upgrade --target $(READERS) -r tests/export_readers.txt
	touch $@

quickstart: install  ## The real pretrained model, end to end, on 2 CPU cores
	$(BIN)/rldecoder run configs/quickstart.yaml

# DATABASE=postgresql+asyncpg://USER@HOST/NAME puts the server on PostgreSQL. It goes by the
# environment: command lines are everybody's to read.
UI_ARGS ?=
DATABASE ?=
ui: export RLDECODER_DATABASE := $(DATABASE)
ui: install  ## Prefect server, work pool, worker and deployments on 127.0.0.1
	$(BIN)/python -m flows.serve_ui $(UI_ARGS)

# The tests look at what `debug` has built, so it is built once.
# It and mypy keep one core busy each, so they run side by side.
test: install-dev readers lint  ## Lint, types, tests, and configs/debug.yaml twice
	$(MAKE) -j 2 types debug
	RLDECODER_DEBUG_STORE="$(CURDIR)/.debug-store" $(MAKE) unit
	rm -rf .debug-store

wheel: install-dev  ## Build wheel and sdist; the debug run and the API tests from the wheel
	$(BIN)/python -m tests.wheel_check

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tests.docs_lint

types:
	$(BIN)/mypy

# One thread each: most tests are too small for two. Three workers for two cores: one is with the
# tests that talk to a Prefect server, which mostly wait for it.
unit: export OMP_NUM_THREADS := 1
unit:
	$(BIN)/python -m pytest -m "not gpu" -q -n 3 --dist loadgroup --no-loadscope-reorder --durations=15

# The second run must do no work at all. One thread, as in `unit`, whose tests compare this store's
# bytes with those of resumed runs: sums over two threads round differently.
debug: export OMP_NUM_THREADS := 1
debug:
	rm -rf .debug-store
	mkdir .debug-store
	$(BIN)/rldecoder run configs/debug.yaml --store .debug-store > .debug-store/stdout.txt
	$(BIN)/rldecoder run configs/debug.yaml --store .debug-store 2>&1 | tee .debug-store/second.log
	grep -q "done.* 0 stages built, 19 reused" .debug-store/second.log

# Peers: `pip install -e '.[bench]'`; without them they are left out, and said to be.
BENCH_SAE := $(BIN)/python -m benchmarks.bench_sae
gpu: install-dev  ## On a machine with a CUDA device: its tests and the GPU rows of the benchmarks
	$(BIN)/python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch " + torch.__version__ + " sees no CUDA device. Install a CUDA build into .venv, or run this where a GPU is")'
	$(BIN)/python -m pytest -m gpu -q
	$(BENCH_SAE) speed --device cuda --steps 30
	$(BENCH_SAE) speed --device cuda --steps 30 --architecture batchtopk
	$(BENCH_SAE) speed --device cuda --steps 10 --d-model 4096 --num-latents 40960
	$(BENCH_SAE) spec --device cuda
	$(BENCH_SAE) quality --device cuda --rates 1e-3,3e-3,6e-3,1e-2
	$(BIN)/python -m benchmarks.bench_rollout --threads 8

format:  ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## Remove the environment and caches (artifacts stay)
	rm -rf $(VENV) .mypy_cache .ruff_cache .debug-store build *.egg-info
