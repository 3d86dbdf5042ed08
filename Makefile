PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/demo.stamp ## Install what the demo needs, and run it
	$(BIN)/polyak demo

test: $(VENV)/dev.stamp ## Check format, lint, types and imports, then run the tests and all examples
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2

format: $(VENV)/dev.stamp ## Lay out the code, and repair what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and what the tools left
	rm -rf $(VENV) dist .hypothesis .import_linter_cache .pytest_cache .ruff_cache

# Installs again only when what is asked for changed.
$(VENV)/%.stamp: pyproject.toml constraints.txt hatch_build.py $(wildcard src/polyak/kernels/*.[ch])
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --build-constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

$(VENV)/demo.stamp: EXTRAS := cli
$(VENV)/dev.stamp: EXTRAS := dev
