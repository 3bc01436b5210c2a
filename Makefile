# make demo   attend over the 65,536 pixels of a photograph; pictures in demo/
# make test   everything that is tested without a GPU, documentation included (with one, the GPU too): the Numba kernels
#             in Numba's simulator, those in CUDA C++ by an emulator (which needs g++)
# make kernels  every CUDA C++ kernel for every architecture, with its registers and spills
# make lint   ruff and mypy
# make bench  this machine's backends against dense attention (PyTorch's); figures in build/bench.json
# make gpu-report  on a machine with a GPU: suite, compute-sanitizer and speed into docs/measurements/
# make docs   the site, in docs/_build/html
# Each creates .venv if needed and installs what it uses.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint tests/constraints.txt

# The extra for this machine's GPU: CUDA 13 needs driver 580 or newer; without a GPU, none.
DRIVER := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1 | cut -d. -f1)
GPU := $(if $(DRIVER),$(shell test $(DRIVER) -ge 580 && echo ,cuda13 || echo ,cuda12))

.PHONY: demo test kernels lint bench docs gpu-report clean

demo: $(VENV)/.explain
	$(BIN)/llsa explain --out demo

# Two processes, each with one thread in torch and BLAS: more would wait for each other.
test: export OMP_NUM_THREADS := 1
test: $(VENV)/.test
	$(BIN)/pytest -n 2
	NUMBA_ENABLE_CUDASIM=1 $(BIN)/pytest -n 2
	$(if $(shell command -v g++ 2>/dev/null),LLSA_CUDA_EMULATOR=1 $(BIN)/pytest -n 2,@echo "the CUDA C++ kernels were not emulated: there is no g++")

kernels: $(VENV)/.test
	LLSA_ALL_KERNELS=1 $(BIN)/pytest -rP -k test_all_specialisations_compile tests/test_cuda_kernels.py

bench: $(VENV)/.bench
	$(BIN)/llsa bench --out build/bench.json

# PART=suite, jax, sanitizer, errors, repeats, speed, overhead, ranks or steps runs one part, BACKEND=numba_cuda or
# cupy_raw one backend, and merges it into docs/measurements/<card>.json.
gpu-report: $(VENV)/.test
	$(BIN)/python tests/gpu_report.py $(if $(PART),--part $(PART)) $(if $(BACKEND),--backend $(BACKEND))

docs: $(VENV)/.test
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

# mypy does not follow the mapping of gpu/ and adapters/ into the package, so it gets a folder of links.
lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	rm -rf build/mypy && mkdir -p build/mypy/llsa_np
	ln -s $(CURDIR)/llsa_np/* build/mypy/llsa_np/
	ln -s $(CURDIR)/gpu build/mypy/llsa_np/gpu
	ln -s $(CURDIR)/adapters build/mypy/llsa_np/adapters
	MYPYPATH=build/mypy $(BIN)/mypy -p llsa_np

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.explain: EXTRAS := explain$(GPU)
$(VENV)/.bench: EXTRAS := explain,torch$(GPU)
# The test extra brings CUDA 13's Numba, so only a machine whose driver takes it gets the GPU extra beside it.
$(VENV)/.test: EXTRAS := test,explain,docs,examples,torch,jax$(filter %cuda13,$(GPU))
$(VENV)/.dev: EXTRAS := dev,test,explain,docs
$(VENV)/.explain $(VENV)/.bench $(VENV)/.test $(VENV)/.dev: pyproject.toml tests/constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[$(EXTRAS)]'
	touch $@

clean:
	rm -rf $(VENV) build demo explain docs/_build *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
