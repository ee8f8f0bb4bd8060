# The environment is .venv in this folder, made by tools/setup_env.py; `make help` lists the targets.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
SOURCES := vllm_adrenaline tests tools benchmarks
# Tests that start no engine run side by side, one more than there are cores, for they often wait. Those that start
# engines would only take the cores from each other.
FAST := $(BIN)/pytest -n $(shell expr $$(nproc) + 1) --maxprocesses 5 --dist loadfile tests/unit tests/schedulers tests/gpu

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-fast test-faults soak fuzz tsan lint cuda-compile wheel docs format clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup:  ## Make .venv with vLLM for CPU, this package and its tools (at once if it is up to date)
	@$(PYTHON) tools/setup_env.py

demo: setup  ## Compare plain vLLM, disaggregation and offloading on a small model, on this machine
	@$(BIN)/adrenaline demo

test: setup lint cuda-compile  ## Check style and types, then run the tests, on real engines
	@$(FAST) -m "not extended"
	@$(BIN)/pytest -m "not extended" tests/engine

test-all: setup lint  ## The same, with what takes longer
	@$(PYTHON) tools/build_cuda.py check --all
	@$(FAST)
	@$(BIN)/pytest tests/engine

test-fast: setup  ## Only what starts no engine
	@$(FAST)

test-faults: setup  ## Kill, stop and starve everything, on real engines; takes long
	@$(BIN)/pytest $(addprefix tests/engine/test_,faults.py fault_moments.py endings.py both_full.py pressure.py up.py \
		hosts.py bystanders.py)

MINUTES ?= 60
soak: setup  ## Mixed traffic, random faults and clients that leave, for MINUTES (60): nothing wrong, nothing grows
	@$(BIN)/python -m tests.soak --minutes $(MINUTES)

DECODER ?= all
fuzz: setup  ## A million inputs for DECODER (all) of what others send or write
	@nice -n 19 $(BIN)/python tools/fuzz.py $(DECODER)

tsan: setup  ## The shared-memory channel with three executors as threads, under ThreadSanitizer
	@$(BIN)/pytest tests/unit/test_native.py -k "channel or threads"

lint: setup  ## Check style, formatting, types and the layers of the package
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

cuda-compile:  ## Compile the CUDA kernels for every architecture, if nvcc is there
	@$(PYTHON) tools/build_cuda.py check

docs: setup  ## Write the tables of docs/ anew, and build the site into build/site
	@$(BIN)/python tools/docs.py
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "built: build/site/index.html"

wheel: setup  ## Build the sdist, and from it the wheel, into dist/
	@$(BIN)/python -m build --outdir dist .

format: setup  ## Format the sources and fix what ruff can fix
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

clean:  ## Remove .venv and everything that was generated
	rm -rf .venv build dist *.egg-info vllm_adrenaline/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find $(SOURCES) -name __pycache__ -type d -prune -exec rm -rf {} +
