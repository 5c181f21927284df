# Each target does its own set-up. On a machine without a GPU, use torch's small build:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
TORCH_INDEX ?=
PIP_INSTALL = -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

VENV = .venv
BIN = $(VENV)/bin
OLDEST = .venv-oldest
STAMP = $(VENV)/.installed
OLDEST_STAMP = $(OLDEST)/.installed

export HF_HUB_OFFLINE = 1

.PHONY: demo test test-slow test-oldest lint format cov docs bench results trainers gpu fuzz clean

demo: $(STAMP)
	$(BIN)/kbitcheck model tiny:llama --quant nf4 --quant int8

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadgroup

test-slow: $(STAMP)
	$(BIN)/python -m pytest -n auto --dist loadgroup -m slow

test-oldest: $(OLDEST_STAMP)
	$(OLDEST)/bin/python -m pytest -n auto --dist loadgroup

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

cov: $(STAMP)
	$(BIN)/coverage erase
	$(BIN)/python -m pytest -n auto --dist loadgroup -m "slow or not slow" --cov --cov-report=
	$(BIN)/coverage report

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(STAMP)
	$(BIN)/python benchmarks/passes.py
	$(BIN)/python benchmarks/bench.py
	$(BIN)/python benchmarks/sizes.py
	$(BIN)/python benchmarks/predict.py

# The tables behind the Results pages: hours; what was interrupted goes on where it stopped.
results: $(STAMP)
	$(BIN)/python benchmarks/renew.py

# Installs each trainer into an environment of its own, once, and runs its command.
trainers: $(STAMP)
	$(BIN)/python benchmarks/trainers.py
	KBITCHECK_NETWORK=1 $(BIN)/python -m pytest -n 0 -m slow tests/cli/test_trainer_environments.py

# Needs a CUDA device; elsewhere the tests are skipped, and the rows say that they were not measured.
gpu: $(STAMP)
	$(BIN)/python -m pytest -n 0 -m gpu tests/gpu
	$(BIN)/python benchmarks/gpu.py

FUZZ ?= 400
FUZZ_SEED ?= $(shell date +%j)

fuzz: $(STAMP)
	$(BIN)/kbitcheck impl reference --fuzz $(FUZZ) --seed $(FUZZ_SEED)

clean:
	rm -rf $(VENV) $(OLDEST) .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* build dist

# torch is installed first, and pinned: as a dependency of another package pip installs the newest, with gigabytes of CUDA.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "kbitcheck needs Python 3.11 or newer: make PYTHON=python3.11")'
	@echo 'Installing torch and the pinned stack into $(VENV): some minutes, without another line.$(if $(TORCH_INDEX),, Without a GPU, TORCH_INDEX=https://download.pytorch.org/whl/cpu saves gigabytes.)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt torch==2.13.0
	$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	touch $@

# The oldest transformers and peft that pyproject.toml allows; everything else as pinned, except packages that they refuse.
$(OLDEST_STAMP): pyproject.toml constraints.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	grep -v -E '^(transformers|peft|huggingface_hub|tokenizers|hf-xet|fsspec|filelock)==' constraints.txt > $(OLDEST)/constraints.txt
	$(OLDEST)/bin/python $(PIP_INSTALL) -c $(OLDEST)/constraints.txt torch==2.13.0
	$(OLDEST)/bin/python $(PIP_INSTALL) -c $(OLDEST)/constraints.txt transformers==4.56.2 peft==0.17.1 -e '.[test]'
	touch $@
