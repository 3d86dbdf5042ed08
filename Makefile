PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Where it is set, each of the many processes of the tests compiles all of polyak again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo check quick test test-engines docs fuzz sanitize dist format clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/demo.stamp ## Install what the demo needs, and run it
	$(BIN)/polyak demo

check: $(VENV)/dev.stamp ## Check format, lint, docstrings, types and imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/flake8 src/polyak
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python
	$(BIN)/lint-imports

quick: check ## Check, then run the fast tests, for use while working
	$(BIN)/pytest -n 2 -m "not slow" $(addprefix --ignore=,$(FRAMEWORKS)) tests src

# Not in `make quick`: to import the frameworks of these tests takes longer than the tests.
FRAMEWORKS := $(filter-out %/test_native.py %/test_plain.py,$(wildcard tests/hosts/test_*.py)) $(wildcard tests/compat/test_con*.py) \
	tests/compat/test_composer_files.py tests/test_peers.py tests/test_guarantees.py src/polyak/hosts

test: check ## Check, then run all tests and all examples
	$(BIN)/pytest -n 2
	PYTHONPATH=tests/stubs $(BIN)/pytest -n 2 --dist=loadscope $(STUBBED)

# Composer imports torchvision. The stub is in these processes alone, so that no other library takes it for torchvision.
STUBBED := tests/hosts/test_composer.py tests/hosts/test_distributed.py tests/compat/test_composer_files.py tests/hosts/test_composer_surface.py \
	tests/hosts/test_golden_trace.py tests/compat/test_convert_timm.py \
	tests/checkpoints/test_libraries.py::test_checkpoints_of_timm_are_averaged_and_loaded_again

ENGINES := $(addprefix tests/hosts/test_,deepspeed.py deepspeed_trainers.py megatron.py torchtitan.py) tests/averaging/test_wrapped.py
test-engines: build/engines.stamp ## Run the tests of DeepSpeed, Megatron, torchtitan and torchao
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/src build/engines/bin/python -m pytest -n 0 $(ENGINES)

# In addition to what the other tests need, without what they ask for: that would be another torch, and CUDA.
build/engines.stamp: $(VENV)/dev.stamp tests/stubs/engines.txt
	$(PYTHON) -m venv build/engines
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))' > "$$(build/engines/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/beside.pth"
	DS_BUILD_OPS=0 build/engines/bin/python -m pip install --quiet --no-deps --no-build-isolation --requirement tests/stubs/engines.txt
	touch $@

docs: $(VENV)/dev.stamp ## Build the site in docs/_build; a warning is an error
	$(BIN)/sphinx-build -W --keep-going -n -q -b html docs docs/_build
	@echo "see docs/_build/index.html"

SECONDS ?= 600
fuzz: $(VENV)/dev.stamp ## Run random models, loops and events for SECONDS=600, with new seeds
	@for kernel in c torch; do \
		OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --processes 2 --kernel $$kernel --seconds $$(($(SECONDS) / 2)) \
			--seed $$(($$(date +%s) * 1000)) || failed=1; \
	done; exit $${failed:-0}

sanitize: $(VENV)/dev.stamp ## Run the memory tests with the C kernel under AddressSanitizer and UBSan
	POLYAK_SANITIZE=1 $(BIN)/python -m polyak.kernels
	$(SANITIZED) $(BIN)/pytest -n 2 $(MEMORY)
	$(SANITIZED) $(BIN)/python -m tests.fuzz --kernel c --count 300 --loop hooked

# Python and torch are built without the sanitizers, so LD_PRELOAD loads them first, and libstdc++, which asan needs early.
SANITIZED = POLYAK_SANITIZE=1 OMP_NUM_THREADS=1 ASAN_OPTIONS=detect_leaks=0 \
	LD_PRELOAD="$$($${CC:-cc} -print-file-name=libasan.so) $$($${CC:-cc} -print-file-name=libstdc++.so)"
MEMORY := tests/tensors/test_memory.py tests/tensors/test_fingerprint.py tests/averaging/test_weights.py tests/kernels/test_kernels.py

dist: build/dist.stamp ## Build the source and the wheels for an index in dist/, and check them
	rm -rf dist build/wheels
	POLYAK_PURE=1 build/venv/bin/python -m build --no-isolation --outdir dist
	tar -xf dist/*.tar.gz -C build --one-top-level=wheels --strip-components=1
	build/venv/bin/python -m build --no-isolation --wheel --outdir build/wheels/dist build/wheels
	$(REPAIR) build/wheels/dist/*.whl
	build/venv/bin/twine check --strict dist/*
	build/venv/bin/python tests/support/distribution.py dist $(VENV)

# On Linux an index takes wheels only with the tag of the oldest glibc that serves.
ifeq ($(shell uname -s),Linux)
REPAIR := PATH=build/venv/bin:$$PATH build/venv/bin/auditwheel repair --wheel-dir dist
else
REPAIR := sh -c 'cp "$$@" dist' --
endif

# The tools alone: neither polyak nor torch.
build/dist.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv build/venv
	build/venv/bin/python -m pip install --quiet --upgrade --constraint constraints.txt pip
	build/venv/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["dist"], sep="\n")' > build/requirements.txt
	build/venv/bin/python -m pip install --quiet --constraint constraints.txt --requirement build/requirements.txt
	touch $@

format: $(VENV)/dev.stamp ## Format the code, and apply ruff's fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## Remove the environment and the tools' caches
	rm -rf $(VENV) build dist docs/_build .hypothesis .import_linter_cache .pytest_cache .ruff_cache

# Installs again only when one of these files has changed.
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
