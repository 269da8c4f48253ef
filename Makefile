# The two commands of the README are `make demo` and `make test`. Everything lives in .venv.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEV    := $(VENV)/.installed-dev

# ggml's own matrix products are faster with its LLAMAFILE kernels, which its wheel leaves out by default
export CMAKE_ARGS ?= -DGGML_LLAMAFILE=ON

.PHONY: demo test check test-gpu bench bench-peers clean

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

# Makes an environment for each peer in the cache folder on first use: some GB with PyTorch, minutes to compile llama.cpp.
bench-peers: $(DEV)
	$(BIN)/python -m bench.peers

# Tests on a Vulkan device; Mesa's software one does where there is no GPU. Compiles a libggml for minutes the first time.
# ggml passes software devices over unless it is told which one to take.
test-gpu: $(DEV)
	lib=$$(env -u CMAKE_ARGS $(PYTHON) scripts/vulkan_ggml.py) && if [ -n "$$lib" ]; then \
	PIPO_GGML=$$lib GGML_VK_VISIBLE_DEVICES=$${GGML_VK_VISIBLE_DEVICES-0} PIPO_NEEDS_GPU=1 $(BIN)/python -m pytest tests/gpu; \
	else echo "test-gpu: skipped, see above"; fi

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --no-binary ggml-python -e .
	touch $@

$(DEV): $(STAMP)
	$(BIN)/pip install --quiet --no-binary ggml-python -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
