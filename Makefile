PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test fuzz sanitize format clean

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
STUBBED := tests/hosts/test_composer.py tests/hosts/test_distributed.py tests/compat/test_composer_files.py tests/hosts/test_composer_surface.py \
	tests/hosts/test_golden_trace.py tests/compat/test_convert_timm.py

SECONDS ?= 600
fuzz: $(VENV)/dev.stamp ## Run random models, loops and events for SECONDS=600, with new seeds
	@for kernel in c torch; do \
		OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --processes 2 --kernel $$kernel --seconds $$(($(SECONDS) / 2)) \
			--seed $$(($$(date +%s) * 1000)) || failed=1; \
	done; exit $${failed:-0}

sanitize: $(VENV)/dev.stamp ## Run tests of memory with the C kernel under AddressSanitizer and UBSan
	POLYAK_SANITIZE=1 $(BIN)/python -m polyak.kernels
	$(SANITIZED) $(BIN)/pytest -n 2 $(MEMORY)
	$(SANITIZED) $(BIN)/python -m tests.fuzz --kernel c --count 300 --loop hooked

# Python and torch are not built with the sanitizers, so their libraries come first. libstdc++: asan looks for it early.
SANITIZED = POLYAK_SANITIZE=1 OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$($${CC:-cc} -print-file-name=libasan.so) $$($${CC:-cc} -print-file-name=libstdc++.so)"
MEMORY := tests/tensors/test_memory.py tests/tensors/test_fingerprint.py tests/averaging/test_weights.py tests/kernels/test_kernels.py

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
