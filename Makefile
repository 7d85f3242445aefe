# Everything runs from .venv, which `make setup` fills from requirements.lock. Needs git, make and Python 3.11 to 3.13.
# Targets call `sdxl-lora` and other programs of .venv; `.venv/bin/sdxl-lora --help` says more.

# What a user may set. Make would run a `$(shell ...)` in a value, and a shell whatever a value brings into a recipe's
# text. So values are taken as they stand, travel through the environment, and recipes quote them: "$$NAME".
SETTINGS := PYTHON PORT NAME REPO PUBLIC FORCE REF DATA ONLY ADAPTER
$(foreach setting,$(SETTINGS),$(eval override $(setting) := $$(value $(setting))))
export $(SETTINGS)

override SHELL := bash
override .SHELLFLAGS := -euo pipefail -c

override BIN := .venv/bin
override INSTALLED := .venv/installed
# dvc.yaml says `python`: the environment's has to come first.
override RUN := PATH="$$PWD/$(BIN):$$PATH"
# On all cores, four at most: a worker takes 2 GB. A file's tests stay together, since they share fixtures.
override PARALLEL := --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-elsewhere check doctor plan ui promote push-to-hub recipe reproduce verify dvc-deps lock rebuild clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

setup: $(INSTALLED)  ## create .venv from requirements.lock (PYTHON=python3.12 selects the interpreter)

demo: setup  ## run the whole pipeline on the embedded model and data set: CPU, no network (FORCE=1 replaces edits)
	@$(BIN)/sdxl-lora recipe $${FORCE:+--force} demo
	@$(RUN) dvc repro
	@$(BIN)/sdxl-lora summary

test: setup  ## run the tests, except those that take minutes
	@TRITON_INTERPRET=1 $(RUN) python -m pytest $(PARALLEL) -m interpreter tests/kernels tests/models/test_fused.py
	@$(RUN) python -m pytest $(PARALLEL) -m "not slow"

test-elsewhere: setup  ## run the tests that compute as other processors would, random, busy: an hour (ONLY="busy machine")
	@$(BIN)/python -m tests.support.elsewhere $${ONLY:+--only="$$ONLY"}

check: setup  ## format, lint, types, direction of imports, known vulnerabilities of dependencies
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(RUN) lint-imports
	@$(BIN)/python .ci/audit.py

doctor: setup  ## check what an expensive run needs, in a minute: software, GPU, disk, models, a step, services
	@$(BIN)/sdxl-lora doctor

plan: setup  ## forecast the GPU memory of params.yaml, and say which cards it fits (no GPU needed)
	@$(BIN)/sdxl-lora plan

ui: setup  ## MLflow at http://127.0.0.1:5000 (PORT=5001 selects another port)
	@$(BIN)/sdxl-lora ui $${PORT:+--port="$$PORT"}

promote: setup  ## register the adapter in MLflow as champion, if it passed all of its gates
	@$(BIN)/sdxl-lora promote

push-to-hub: setup  ## upload the adapter: REPO=owner/name (private unless PUBLIC=1; FORCE=1: even if it fails its gates)
	@$(BIN)/sdxl-lora push $${PUBLIC:+--public} $${FORCE:+--force} -- $${REPO:+"$$REPO"}

recipe: setup  ## select a recipe: NAME=demo; without NAME list them (FORCE=1 replaces edits)
	@$(BIN)/sdxl-lora recipe $${FORCE:+--force} -- $${NAME:+"$$NAME"}

reproduce: setup  ## run REF again and compare: a commit, experiment, MLflow run or adapter file (DATA=pull: recorded data)
	@$(BIN)/sdxl-lora reproduce $${DATA:+--data="$$DATA"} -- $${REF:+"$$REF"}

verify: setup  ## compare an exported file's header with what is here: ADAPTER=path
	@$(BIN)/sdxl-lora verify -- $${ADAPTER:+"$$ADAPTER"}

dvc-deps: setup  ## write the code that each stage imports into dvc.yaml
	@$(BIN)/python -m tests.support.dvc_deps

lock: setup  ## resolve the newest dependencies into requirements.lock, torch and its Triton kept
	@kept=$$(sed -nE 's/^((torch|triton)==[0-9.]+).*/\1/p' requirements.lock); \
	$(BIN)/pip-compile --quiet --upgrade --strip-extras --extra dev --constraint <(echo "$$kept") \
		--no-header --no-emit-index-url --no-emit-find-links --output-file requirements.lock.new pyproject.toml
	@sed -E -e 's/\+cpu$$//' -e 's/^triton==.*/& ; sys_platform == "linux"/' -e '/^ +# +-c /d' \
		requirements.lock.new > requirements.lock
	@rm requirements.lock.new
	@git diff --stat -- requirements.lock

rebuild: setup  ## build the demo's images, base model and evaluator again (npm; ten minutes of a GPU)
	@$(BIN)/python -m pip install --disable-pip-version-check --requirement demo/build/requirements.txt
	@$(RUN) dvc --cd demo/build repro

clean:  ## remove .venv and the tools' caches; data, runs and experiments stay
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(INSTALLED): requirements.lock pyproject.toml
	@$(BIN)/python -m pip --version > /dev/null 2>&1 || { \
		python=""; \
		candidates="$${PYTHON:-python3 python3.13 python3.12 python3.11}"; \
		set -f; \
		for candidate in $$candidates; do \
			candidate="$$(type -P -- "$$candidate")" || continue; \
			fits="$$("$$candidate" -c 'import sys; print((3, 11) <= sys.version_info < (3, 14))' 2> /dev/null)" || continue; \
			if [ "$$fits" = True ]; then python="$$candidate"; break; fi; \
		done; \
		if [ -z "$$python" ]; then \
			echo "make: none of [$$candidates] is Python 3.11, 3.12 or 3.13:" \
				"install one, or name it: make setup PYTHON=/path/to/python3.12" >&2; \
			exit 1; \
		fi; \
		echo "Creating .venv with $$("$$python" --version)"; \
		"$$python" -m venv --clear .venv; \
	}
	@$(BIN)/python -m pip install --disable-pip-version-check --requirement requirements.lock
	@$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@
