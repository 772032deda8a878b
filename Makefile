# make bench   set up .venv and run the main job: python bench/run.py, results under bench-out/
# make test    set up .venv, lint, run the tests (what CI runs)
# make lint    ruff check, ruff format --check and mypy
# make install set up .venv only

PYTHON ?= python3
VENV ?= .venv
OUT ?= bench-out
BIN := $(VENV)/bin
JOBS ?= $(shell nproc | awk '{print ($$1 < 8) ? $$1 : 8}')
# A machine without an NVIDIA driver gets the CPU build of torch: a plain "torch" would pull gigabytes of CUDA.
CPU_TORCH := torch==2.13.0+cpu
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: bench test lint install clean

bench: $(VENV)/installed
	$(BIN)/python bench/run.py --out $(OUT)

test: lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(JOBS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	if [ -e /proc/driver/nvidia/version ]; then \
		$(BIN)/python -m pip install "torch>=2.10"; \
	else \
		$(BIN)/python -m pip install $(CPU_TORCH) || \
		$(BIN)/python -m pip install $(CPU_TORCH) --index-url $(CPU_INDEX); \
	fi
	$(BIN)/python -m pip install "setuptools>=77" wheel ninja "triton>=3.6,<3.7"
	$(BIN)/python -m pip install --no-build-isolation -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info kernels/_C*.so
