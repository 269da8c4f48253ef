# The two commands of the README are `make demo` and `make test`. Everything lives in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEV    := $(VENV)/.installed-dev

# ggml's own matrix products are faster with its LLAMAFILE kernels, which its wheel leaves out by default
export CMAKE_ARGS ?= -DGGML_LLAMAFILE=ON

.PHONY: demo test check bench vulkan-env test-gpu clean

demo: $(STAMP)
	$(BIN)/pipo pull smollm2
	$(BIN)/pipo run smollm2 "What is the capital of France? Tell me about it." --ram 125MB --temp 0 -n 64

test: $(DEV)
	$(BIN)/pipo pull smollm2
	$(BIN)/python -m pytest

check: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(DEV)
	$(BIN)/python -m bench

# An environment whose libggml computes on Vulkan devices; Mesa's software one does where there is no GPU.
# Compiles for minutes the first time, takes seconds after that.
vulkan-env:
	env -u CMAKE_ARGS $(PYTHON) scripts/vulkan_env.py

# ggml passes software devices over unless it is told which one to take
test-gpu: vulkan-env
	GGML_VK_VISIBLE_DEVICES=$${GGML_VK_VISIBLE_DEVICES-0} PIPO_NEEDS_GPU=1 .venv-vulkan/bin/python -m pytest tests/gpu

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --no-binary ggml-python -e .
	touch $@

$(DEV): $(STAMP)
	$(BIN)/pip install --quiet --no-binary ggml-python -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) .venv-vulkan build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
