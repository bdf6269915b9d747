# `make demo` and `make test` set up everything they need; what they cannot set up they name.

PYTHON ?= python3
VENV := .venv/bin/python
INSTALLED := .venv/.installed
APT := apt-get install -y make git ca-certificates python3-venv libcurl4

.DEFAULT_GOAL := help
.PHONY: help demo test lint bench simulate faults soak fuzz clean system

help: ## show this
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile

demo: $(INSTALLED) ## the story, on a real MongoDB and a real nats-server
	$(VENV) .venv/bin/drsm-agent demo

test: lint ## lint, then all tests, on real servers
	$(VENV) -m pytest -n 2 --dist loadfile --max-worker-restart 0 --ignore tests/fault --ignore tests/mixed
	$(VENV) -m pytest -n 6 --dist loadfile --max-worker-restart 0 tests/mixed
	$(VENV) -m pytest tests/fault

lint: $(INSTALLED) ## style, types and import contracts
	$(VENV) -m ruff check .
	$(VENV) -m ruff format --check .
	$(VENV) -m mypy
	$(VENV) .venv/bin/lint-imports

bench: $(INSTALLED) ## how fast it is, beside MongoDB and NATS alone; five minutes
	$(VENV) -m tests.bench

simulate: $(INSTALLED) ## many simulated worlds, each with its own misfortunes: make simulate SEEDS=100000
	$(VENV) -m tests.simulation --seeds $(or $(SEEDS),1000)

faults: $(INSTALLED) ## every fault in turn, on real servers and processes; five minutes
	FAULTS=all $(VENV) -m pytest tests/fault

soak: $(INSTALLED) ## a random fault every 20 s: make soak MINUTES=15
	$(VENV) -m tests.fault.soak --minutes $(or $(MINUTES),15)

fuzz: $(INSTALLED) ## bytes that nobody would think of, into the decoding: make fuzz SECONDS=600
	$(VENV) -m tests.fuzz --seconds $(or $(SECONDS),60)

clean: ## remove the virtual environment and all caches
	rm -rf .venv .fuzz .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An environment knows its folder: after that was moved or copied, it has to be told the new one.
ifneq ($(shell cat .venv/.folder 2>/dev/null),$(CURDIR))
.PHONY: $(INSTALLED)
endif

$(INSTALLED): pyproject.toml | system
	@echo "Installing into .venv (about 150 MB the first time) ..."
	@"$(PYTHON)" -m venv .venv
	@$(VENV) -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@pwd -P > .venv/.folder
	@touch $@

# What pip cannot install: Python itself, its venv module, and the library that mongod loads.
system:
	@command -v "$(PYTHON)" >/dev/null || { \
	    echo "$(PYTHON) is missing. Run: $(APT)" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "Python 3.11 or newer is needed, $(PYTHON) is $$("$(PYTHON)" -V). Name another one: make PYTHON=python3.11" >&2; \
	    exit 1; }
	@missing=; \
	"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || missing="$$missing python3-venv"; \
	"$(PYTHON)" -c 'import ctypes; ctypes.CDLL("libcurl.so.4")' 2>/dev/null || missing="$$missing libcurl4"; \
	test -z "$$missing" || { echo "Missing:$$missing. Run: $(APT)" >&2; exit 1; }
