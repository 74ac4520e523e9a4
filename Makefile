# Two commands on a fresh machine: `make demo` and `make test`. Everything else here serves them.
# `make setup ACCELERATOR=gpu` installs the CUDA set instead; PYTHON names the interpreter that makes .venv.

PYTHON ?= python3
ACCELERATOR ?=
BIN := .venv/bin

# Two cores is the machine that the suite is made for: two threads at most for each process.
export OMP_NUM_THREADS ?= 2

.DEFAULT_GOAL := help
.PHONY: help setup page-tools demo test test-all test-quick test-shuffled coverage lint format bench requirements clean

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup:  ## makes .venv with everything; under a second where nothing changed
	@$(PYTHON) deploy/install.py $(if $(ACCELERATOR),--accelerator $(ACCELERATOR))

demo: setup  ## trains the demo: GRPO on the bundled prompts, on the CPU, in under five minutes
	@$(BIN)/rlhf demo

# The quick part runs two tests at a time (WORKERS=n). What starts engines takes all cores: one test after another. The
# second part runs also where a test of the first failed. ARGS= adds options of pytest; REPORTS=DIR writes JUnit files.
QUICK = $(BIN)/pytest -n $(or $(WORKERS),2) --dist worksteal -m "not integration and not gpu" \
  $(if $(REPORTS),--junitxml=$(REPORTS)/quick.xml)
ENGINES = $(BIN)/pytest $(if $(REPORTS),--junitxml=$(REPORTS)/engines.xml)
BOTH = $(QUICK) $(ARGS); code=$$?; if [ $$code -gt 1 ]; then exit $$code; fi; $(ENGINES)

test: setup  ## the suite: the quick part, then the part that starts engines
	@$(BOTH) -m "(integration or gpu) and not extended" $(ARGS) && exit $$code

test-all: setup  ## the suite, with the tests that prove in full what it proves by a covering choice
	@$(BOTH) -m "integration or gpu" $(ARGS) && exit $$code

test-quick: setup  ## the part of the suite without engines
	@$(QUICK) $(ARGS)

test-shuffled: setup  ## the quick part in another order each time; SEED=n repeats one
	@$(QUICK) -p randomly $(if $(SEED),--randomly-seed=$(SEED)) $(ARGS)

coverage: setup  ## the branches that the quick part covers, by file, with the lines that it does not
	@$(QUICK) -q --cov --cov-branch --cov-report=term-missing:skip-covered $(ARGS)

page-tools: setup
	@$(PYTHON) deploy/install.py --page-tools

lint: page-tools  ## formatting, lint, types, import contracts; of the page's JavaScript too
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy deploy/install.py
	$(BIN)/lint-imports --no-logo
	$(BIN)/node $(BIN)/biome check --error-on-warnings
	$(BIN)/node $(BIN)/tsc

format: page-tools  ## formats the code and fixes what lint can fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/node $(BIN)/biome check --write

bench: setup  ## runs every benchmark (benchmarks/*.py), or one: make bench BENCH=name
	@found=0; for script in benchmarks/$(or $(BENCH),[a-z]*).py; do \
	  if [ -f "$$script" ]; then found=1; echo "== $$script"; $(BIN)/python "$$script" || exit 1; fi; \
	done; if [ $$found = 0 ]; then echo "no benchmark benchmarks/$(or $(BENCH),*).py" >&2; exit 1; fi

requirements: setup  ## recompiles deploy/requirements/{cpu,gpu}.txt from pyproject.toml
	@$(PYTHON) deploy/install.py --requirements

clean:  ## removes the environment and every cache, never the runs
	rm -rf .venv .cache build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
