# make bench   set up .venv and run the main job: python bench/run.py, results under bench-out/
# make test    set up .venv, lint, run the tests (what CI runs)
# make lint    ruff check, ruff format --check and mypy
# make install set up .venv only
# make wheel   build dist/*.whl with the CUDA extension for sm_80 to sm_120; needs nvcc
# make lowest  test the lowest declared versions of other packages, in .venv-lowest
# make newest  test the newest versions and, as it is a CUDA build of torch, fake CUDA tensors, in .venv-newest

PYTHON ?= python3
VENV ?= .venv
OUT ?= bench-out
BIN := $(VENV)/bin
JOBS ?= $(shell nproc | awk '{print ($$1 < 8) ? $$1 : 8}')
# A machine without an NVIDIA driver gets the CPU build of torch, since a plain "torch" would pull gigabytes of CUDA,
# and no CUDA extension, since it could not run. The tests build one of their own.
DRIVER := $(wildcard /proc/driver/nvidia/version)
CPU_TORCH := torch==2.13.0+cpu
TRITON := "triton>=3.6,<3.7"
CPU_INDEX := https://download.pytorch.org/whl/cpu
# uv installs faster than pip. It does not read pip's settings, so those of mirrors and constraints are passed to it.
# Where uv fails, pip installs. Neither compiles bytecode: Python does, once, for the modules it imports.
# With PYTHONDONTWRITEBYTECODE, which many containers set, every process would compile torch again.
PIP = $(BIN)/python -m pip
PIP_SETTINGS := $(VENV)/pip-settings
pip-setting = "$${$(1):-$$(sed -n "s/\\\\n/ /g; s/\\\\'/'/g; s/^global\.$(2)=.\(.*\).$$/\1/p" $(PIP_SETTINGS))}"
UV = UV_FIND_LINKS=$(call pip-setting,PIP_FIND_LINKS,find-links) UV_DEFAULT_INDEX=$(call pip-setting,PIP_INDEX_URL,index-url) \
  UV_CONSTRAINT=$(call pip-setting,PIP_CONSTRAINT,constraint) $(BIN)/uv pip install -q --python $(BIN)/python
install = (echo install $(1); $(UV) $(1) || $(PIP) install --no-compile $(1))
install-cpu-torch = $(call install,$(CPU_TORCH)) || $(call install,$(CPU_TORCH) --index-url $(CPU_INDEX))
# Half a minute of one core, which the rest of the installation leaves idle. Otherwise each process of the tests, started
# at the same moment, would compile the same files. It may go on beside the tests: they lose nothing if it fails.
compile-torch = $(BIN)/python -c "import torch._inductor.compile_fx" > /dev/null 2>&1
export PYTHONDONTWRITEBYTECODE :=

.PHONY: bench test tests lint lowest newest install wheel clean

bench: $(VENV)/installed
	$(BIN)/python bench/run.py --out $(OUT)

# mypy takes one core for a minute, so it runs beside the tests. With worksteal, a process takes neighboring
# tests, which share the fixtures of their file.
test: $(VENV)/installed
	$(MAKE) --no-print-directory -j 2 lint tests

tests: $(VENV)/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(JOBS) --dist worksteal

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	-$(PIP) install -q uv
	@$(PIP) config list > $(PIP_SETTINGS)
	@$(if $(DRIVER),$(call install,"torch>=2.10"),$(install-cpu-torch))
	@$(compile-torch) &
	@$(call install,"setuptools>=77" wheel $(TRITON))
	@$(if $(DRIVER),,export PRFL_FAST_CUDA=0;) $(call install,--no-build-isolation -e ".[test]")
	touch $@

wheel: $(VENV)/installed
	PRFL_FAST_CUDA=1 TORCH_CUDA_ARCH_LIST= $(BIN)/python -m pip wheel --no-deps --no-build-isolation -w dist .

VERSIONS := tests/helpers/tested_versions.py
TESTS_NEED := accelerate hypothesis expecttest pytest matplotlib
lowest newest: %: .venv-%/installed
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 .venv-$@/bin/python $(VERSIONS) $@

.venv-lowest/installed: pyproject.toml $(VERSIONS)
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install $(CPU_TORCH) || .venv-lowest/bin/python -m pip install $(CPU_TORCH) --index-url $(CPU_INDEX)
	.venv-lowest/bin/python -m pip install $$($(PYTHON) $(VERSIONS) lowest-pins) "transformers<5" $(TESTS_NEED) $(TRITON)
	touch $@

.venv-newest/installed: pyproject.toml $(VERSIONS)
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install torch $$($(PYTHON) $(VERSIONS) newest-pins) transformers $(TESTS_NEED)
	touch $@

clean:
	rm -rf $(VENV) .venv-lowest .venv-newest build dist *.egg-info kernels/_C*.so
