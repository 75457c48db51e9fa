# Everything below sets itself up in .venv and writes inside this folder only (and pip's cache).
PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
READY := .venv/.ready
OLDEST := .venv-oldest/bin
OLDEST_READY := .venv-oldest/.ready
CACHE := $(CURDIR)/.cache
THREADS := $(shell nproc 2>/dev/null || echo 1)

export FASTVAE_CACHE_DIR := $(CACHE)/fastvae
export HF_HOME := $(CACHE)/huggingface
export MPLCONFIGDIR := $(CACHE)/matplotlib
export TORCHINDUCTOR_CACHE_DIR := $(CACHE)/inductor
export TRITON_CACHE_DIR := $(CACHE)/triton
export TMPDIR := $(CACHE)/tmp
export UV_CACHE_DIR ?= $(CACHE)/uv

# One process, on the GPU if there is one. Every value is given, so that nothing is warned of.
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no \
	--dynamo_backend no --num_cpu_threads_per_process $(THREADS)

.PHONY: train test test-oldest test-slow lint bench bench-gpu bench-peers family speedrun clean

train: $(READY)  ## train on the embedded digits; ARGS="--preset mnist-mlp --download" for others
	$(LAUNCH) launch/train.py $(ARGS)

PYTEST_FAST := -m pytest -q -n auto --dist loadfile --no-loadscope-reorder -m "not slow"

test: $(READY)  ## the tests, without the slow ones
	OMP_NUM_THREADS=1 $(BIN)/python $(PYTEST_FAST) $(ARGS)

test-oldest: $(OLDEST_READY)  ## the same with the oldest dependencies allowed
	OMP_NUM_THREADS=1 $(OLDEST)/python $(PYTEST_FAST) $(ARGS)

test-slow: $(READY)  ## the slow tests alone
	$(BIN)/python -m pytest -q -m slow $(ARGS)

lint: $(READY)  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)  ## throughput of each operator and of a training step
	$(BIN)/python -m pytest -q bench $(ARGS)

bench-gpu: $(READY)  ## parity and every benchmark on a GPU, into bench/results/
	$(BIN)/python bench/gpu.py $(ARGS)

bench-peers: $(READY)  ## training beside pythae and others on a CPU, into docs/speed.md, and how threads wait: two hours
	$(BIN)/python bench/peers.py $(ARGS)
	$(BIN)/python bench/threads.py

family: $(READY)  ## every system trained and evaluated, docs/family.md written: hours
	$(BIN)/python bench/family.py $(ARGS)

speedrun: $(READY)  ## time to 86.76 nats on MNIST over five seeds; ARGS="--download", or "--quick"
	$(BIN)/python launch/speedrun.py $(ARGS)

define new_environment # whose Python is to be in the folder $(1)
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	{ echo "fastvae needs Python 3.10 or newer; name one: make PYTHON=python3.12 ..."; exit 1; }
@mkdir -p $(TMPDIR)
test -x $(1)/python || $(PYTHON) -m venv $(patsubst %/bin,%,$(1))
endef

$(READY): pyproject.toml
	$(call new_environment,$(BIN))
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

$(OLDEST_READY): pyproject.toml
	$(call new_environment,$(OLDEST))
	$(OLDEST)/python -m pip install --quiet --disable-pip-version-check uv
	$(OLDEST)/uv pip install --quiet --python $(OLDEST)/python --resolution lowest-direct \
		--only-binary :all: -e '.[dev]'
	@touch $@

clean:  ## remove the environment and all caches; runs/ stays
	rm -rf .venv .venv-oldest .cache build *.egg-info
