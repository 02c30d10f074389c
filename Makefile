# `make demo` and `make test` need Python 3.12 or later and make; they build .venv themselves.
SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help env demo test test-pytorch lint clean

VENV ?= .venv
# Processes that share the tests, file by file; what they cost is compiling, which uses one core each.
WORKERS ?= auto
# Which JAX to install: empty for the newest, or a version such as 0.11.2.
JAX_VERSION ?=
# cpu, cuda12 or cuda13; by default what the NVIDIA driver supports (CUDA 13 from driver 580 on), else cpu.
ACCELERATOR ?= $(shell \
	driver=$$({ nvidia-smi --query-gpu=driver_version --format=csv,noheader || cat /proc/driver/nvidia/version; } \
	  2>/dev/null | grep -oE '[0-9]{3}\.[0-9]+' | head -n 1 | cut -d. -f1); \
	if [ -z "$$driver" ]; then echo cpu; elif [ "$$driver" -ge 580 ]; then echo cuda13; else echo cuda12; fi)
DEMO := runs/demo
DEMO_CONFIG := configs/mamba2_hax.py:cpu

python := $(VENV)/bin/python
# Named after what is in it, so that another choice is installed over it.
ready := $(VENV)/.ready-$(ACCELERATOR)$(JAX_VERSION)

help:
	@echo "make demo   train a small joint recall on this machine, plot it, print its test accuracy"
	@echo "make test   run the tests"
	@echo "make test-pytorch  run the tests of the PyTorch baseline in .venv-torch"
	@echo "make lint   check style and types"
	@echo "make env    build $(VENV) (with the wheels for: $(ACCELERATOR)); the others do it when needed"
	@echo "make clean  delete $(VENV), the demo's run and the caches"

env: $(ready)

$(ready): pyproject.toml requirements-cpu.txt
	@for candidate in $(PYTHON) python3.12 python3 python3.13 python3.14; do \
	  if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null; then found=$$candidate; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "error: no Python 3.12 or later found; name one with PYTHON=/path/to/python" >&2; exit 1; fi; \
	echo "building $(VENV) with $$found for $(ACCELERATOR)"; \
	$$found -m venv $(VENV) || { echo "error: on Debian and Ubuntu venv is a package: apt install python3.12-venv" >&2; exit 1; }
	$(python) -m pip install --quiet --editable ".[$(ACCELERATOR),dev]" $(if $(JAX_VERSION),"jax==$(JAX_VERSION)")
	@rm -f $(VENV)/.ready-*
	@touch $@

demo: env
	$(python) experiments/joint_recall.py --config=$(DEMO_CONFIG) --workdir=$(DEMO)
	@$(python) experiments/plot_training.py $(DEMO)

test: env
	$(python) -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder $(TESTS)

# PyTorch has an environment of its own: nothing else needs it. TORCH_VERSION is empty for the newest.
TORCH_VERSION ?=
.venv-torch/.ready: experiments/pytorch_baseline/requirements.txt
	$(or $(PYTHON),python3) -m venv .venv-torch
	.venv-torch/bin/python -m pip install --quiet --requirement $< $(if $(TORCH_VERSION),"torch==$(TORCH_VERSION)")
	@touch $@

test-pytorch: .venv-torch/.ready
	.venv-torch/bin/python -m pytest experiments/pytorch_baseline $(TESTS)

lint: env
	$(python) -m ruff check .
	$(python) -m mypy

clean:
	rm -rf $(VENV) .venv-torch $(DEMO) .pytest_cache .ruff_cache .mypy_cache .hypothesis build *.egg-info
