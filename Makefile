# The project's commands. `make run` and `make test` each work first, on a fresh machine with Python 3.11, make, gcc, git.

# Debian's interpreter is built with PGO and LTO; a plain build of the same version is 20 to 33 % slower on this work.
PYTHON ?= $(firstword $(wildcard /usr/bin/python3.11) $(shell command -v python3.11) $(shell command -v python3))
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
SEEDS  ?= 1000
BARE   ?=
WORKERS ?= 2

.PHONY: run test check format proto lock sim sim-mutants bench system-packages clean help

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(STAMP): requirements.lock pyproject.toml
	@scripts/make_venv "$(PYTHON)" "$(VENV)"
	@touch $@

run: $(STAMP)  ## start three nodes, load real files, kill one, read everything back
	@$(BIN)/agi-dht demo

test: $(STAMP) system-packages  ## the whole default test suite
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

check: $(STAMP)  ## formatting, lint, types, import layers, generated code
	@$(BIN)/ruff format --check src tests bench
	@$(BIN)/ruff check src tests bench
	@$(BIN)/mypy --strict
	@$(BIN)/lint-imports
	@scripts/make_proto --check "$(BIN)"

format: $(STAMP)
	@$(BIN)/ruff format src tests bench
	@$(BIN)/ruff check --fix src tests bench

proto: $(STAMP)  ## regenerate the gRPC code from dht.proto
	@scripts/make_proto --write "$(BIN)"

lock: $(STAMP)  ## resolve the dependencies anew into requirements.lock (needs `uv`)
	@uv pip compile pyproject.toml --extra redis --group dev --universal --python-version 3.11 \
	  --generate-hashes --no-emit-index-url --no-emit-find-links --no-header --upgrade -o requirements.lock -q

sim: $(STAMP)  ## simulate SEEDS=n whole clusters under faults (SEED=k replays one)
	@$(BIN)/python -m agi.core.dht.testing.run $(if $(SEED),--seed $(SEED),--seeds $(SEEDS))

sim-mutants: $(STAMP)  ## show that the simulation catches every planted bug
	@$(BIN)/python -m tests.core.dht.simulation.mutants

bench: $(STAMP)  ## throughput and latency; BARE=path adds a reference program in the same run
	@$(BIN)/python -m bench.compare $(if $(BARE),--bare $(BARE)) $(BENCH_ARGS)

system-packages:
	@scripts/system_packages

clean:  ## remove the environment and every cache
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage*
