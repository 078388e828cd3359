# One virtual environment, one stamp: everything below runs from .venv, which is brought up to date whenever
# pyproject.toml or constraints.txt changes. `demo` alone would need less ([cli,embedded]), but a second environment
# would cost more than it saves.

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV  := .venv
PY    := $(VENV)/bin/python
STAMP := $(VENV)/.stamp

# pip, Ray and pytest want a home and a UTF-8 locale; an empty environment has neither.
ifeq ($(strip $(HOME)),)
export HOME := $(CURDIR)/.koan/home
endif
export PYTHONUTF8 := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0

# Handed on to the command: make test ARGS='tests/unit -k retry -x'
ARGS ?=

# Fast tests first; then everything else that is a folder of tests, and the quick half of tests/chaos, which has a target
# of its own.
FAST  := $(wildcard tests/unit tests/contract tests/model)
REST  := $(filter-out tests/chaos tests/__pycache__ $(FAST),$(patsubst %/,%,$(wildcard tests/*/)))
CHAOS := $(wildcard tests/chaos)
CODE  := $(wildcard koan_ray tests benchmarks examples)
FLOOR := 85

.PHONY: help
help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' Makefile | while IFS='|' read -r name text; do printf '%-16s %s\n' "$$name" "$$text"; done
	@echo "  Arguments are handed on: make test ARGS='tests/unit -k retry -x'"

$(STAMP): pyproject.toml constraints.txt
	@set -eu; mkdir -p "$$HOME"; \
	fits() { "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }; \
	if ! { [ -x $(PY) ] && fits $(PY); }; then \
	    found=; for py in python3.11 python3; do if fits $$py; then found=$$py; break; fi; done; \
	    if [ -z "$$found" ]; then \
	        echo "koan-ray needs Python 3.11 or newer: no python3.11 on PATH, and python3 is absent or older." >&2; exit 1; \
	    fi; \
	    echo "creating $(VENV) with $$found"; \
	    if ! $$found -m venv --clear $(VENV); then \
	        echo "$$found cannot create a virtual environment; on Debian: apt-get install python3.11-venv" >&2; exit 1; \
	    fi; \
	fi; \
	echo "installing koan-ray and its tools into $(VENV)"; \
	$(PY) -m pip install --quiet -c constraints.txt -e '.[all,dev]'
	@touch $@

.PHONY: demo
demo: $(STAMP) ## watch jobs run, fail, retry and finish
	@$(VENV)/bin/koan-ray demo $(ARGS)

# Without ARGS: the whole suite, with a floor under the coverage of both halves together. With ARGS: one run of what
# they select, without the floor, which a selection cannot reach.
.PHONY: test
test: $(STAMP) ## unit and contract tests, then integration and e2e, with coverage, then quick faults
ifeq ($(strip $(ARGS)),)
	$(PY) -m pytest $(FAST) --cov=koan_ray --cov-report=$(if $(REST),,term-missing --cov-fail-under=$(FLOOR))
ifneq ($(REST),)
	$(PY) -m pytest $(REST) --cov=koan_ray --cov-append --cov-report=term-missing --cov-fail-under=$(FLOOR)
endif
ifneq ($(CHAOS),)
	$(PY) -m pytest $(CHAOS) -m quick
endif
else
	$(PY) -m pytest $(if $(findstring tests,$(ARGS)),,$(FAST) $(REST)) --cov=koan_ray --cov-report=term $(ARGS)
endif

.PHONY: check
check: $(STAMP) ## lint, format, types, layering
	$(VENV)/bin/ruff check $(CODE)
	$(VENV)/bin/ruff format --check $(CODE)
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

# KOAN_RAY_SOAK_S: seconds that everything is killed at random, at the end.
.PHONY: chaos
chaos: export KOAN_RAY_SOAK_S ?= 60
chaos: $(STAMP) ## kill, pause and cut off things while jobs run
	$(PY) -m pytest tests/chaos $(ARGS)

# KOAN_RAY_HOSTILE_S: seconds that the search goes on; KOAN_RAY_HOSTILE_SEED repeats one.
.PHONY: hostile
hostile: export KOAN_RAY_HOSTILE_S ?= 600
hostile: $(STAMP) ## run drawn jobs and values of bad manners beside ordinary ones
	$(PY) -m pytest tests/hostile -m search -s $(ARGS)

.PHONY: bench
bench: $(STAMP) ## measure, on this machine
	$(PY) -m benchmarks $(ARGS)

.PHONY: clean
clean: ## remove the environment, caches and build output
	rm -rf $(VENV) build dist .coverage .koan .hypothesis .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +
