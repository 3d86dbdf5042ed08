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
	PYTHONPATH=tests/stubs $(BIN)/pytest -n 2 $(STUBBED)

# Tests of what imports a torchvision run in interpreters of their own: other libraries must not take the stub for the real one.
STUBBED := tests/test_host_composer.py tests/test_hosts_distributed.py tests/test_composer_files.py tests/test_convert_timm.py

format: $(VENV)/dev.stamp ## Lay out the code, and repair what ruff can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and what the tools left
	rm -rf $(VENV) dist .hypothesis .import_linter_cache .pytest_cache .ruff_cache

# Installs again only when what is asked for changed.
$(VENV)/%.stamp: pyproject.toml constraints.txt tests/stubs/requirements.txt hatch_build.py $(wildcard src/polyak/kernels/*.[ch])
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --build-constraint constraints.txt --editable '.[$(EXTRAS)]'
	$(if $(ALONE),$(BIN)/python -m pip install --quiet --no-deps $(ALONE))
	$(if $(EARLY),$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(VENV)/composer-$(EARLY) mosaicml==$(EARLY))
	touch $@

$(VENV)/demo.stamp: EXTRAS := cli
$(VENV)/dev.stamp: EXTRAS := dev
$(VENV)/dev.stamp: ALONE := --requirement tests/stubs/requirements.txt
$(VENV)/dev.stamp: EARLY := 0.12.1
