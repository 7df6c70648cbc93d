# The project's commands. `make test` works first, on a fresh machine with Python 3.11, make, gcc, git.

# Debian's interpreter is built with PGO and LTO; a plain build of the same version is 20 to 33 % slower on this work.
PYTHON ?= $(firstword $(wildcard /usr/bin/python3.11) $(shell command -v python3.11) $(shell command -v python3))
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# More than processors: tests of real processes and of time spend much of it waiting.
WORKERS ?= 3
STORAGE ?= memory,rocksdb

.PHONY: run test bench bench-consensus bench-growth bench-overload bench-peers profile sim sim-mutants sim-scale chaos check format proto lock system-packages clean help

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 18

$(STAMP): requirements.lock pyproject.toml
	@scripts/make_venv "$(PYTHON)" "$(VENV)"
	@touch $@

run: $(STAMP)  ## the main job on three node processes: store real files, kill a node, read all back
	@$(BIN)/agi-dht demo

test: $(STAMP) system-packages  ## the whole default test suite; COVERAGE=1 measures it and fails below 90 % of lines
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(if $(COVERAGE),-m "not seeds" --cov --cov-report=term:skip-covered)
	$(if $(COVERAGE),@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m seeds)

sim: $(STAMP)  ## the cluster simulation: SEEDS=n, or one seed: SEED=k [FORMATION=1] [TRACE=file]
	@$(BIN)/python -m agi.core.dht.testing.run $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),1000)) \
	  $(if $(FORMATION),--formation) $(if $(TRACE),--trace $(TRACE))

sim-mutants: $(STAMP)  ## planted bugs, each of which the simulation must catch: SEEDS=n to try on each
	@$(BIN)/python -m tests.core.dht.simulation.mutants --seeds $(or $(SEEDS),200)

sim-scale: $(STAMP)  ## failure detection and the ring at 10 to 5000 members: SIZES, PRESET, JOBS, RESULT=file, PLOTS=folder
	@$(BIN)/python -m agi.core.dht.testing.scale $(if $(SIZES),--sizes $(SIZES)) $(if $(PRESET),--preset $(PRESET)) \
	  $(if $(JOBS),--jobs $(JOBS)) $(if $(RESULT),--result $(RESULT)) $(if $(PLOTS),--plots $(PLOTS))

chaos: $(STAMP) system-packages  ## real nodes under real faults, histories checked: NODES=3,5, CHAOS_SECONDS=180, SEED=k, REPORT=folder
	@$(BIN)/python -m agi.core.dht.testing.chaos --seconds $(or $(CHAOS_SECONDS),180) $(if $(NODES),--nodes $(NODES)) \
	  --report $(or $(REPORT),dist/chaos) $(if $(SEED),--seed $(SEED)) $(if $(WITHOUT),--without $(WITHOUT)) \
	  $(if $(NO_NETWORK),--no-network)

bench: $(STAMP)  ## speed, memory and RocksDB; BARE=program to hold it against, ROUNDS, SECONDS, STORAGE, JSON=file
	@$(BIN)/python bench/limit.py $(if $(BARE),--bare $(BARE)) --rounds $(or $(ROUNDS),7) \
	  --seconds $(or $(SECONDS),3) --storage $(STORAGE) $(if $(JSON),--json $(JSON))

bench-consensus: $(STAMP) system-packages  ## compare-and-set, counters, locks beside puts; a node cut off: ROUNDS, SECONDS, JSON
	@$(BIN)/python bench/consensus.py --rounds $(or $(ROUNDS),5) --seconds $(or $(SECONDS),2) $(if $(JSON),--json $(JSON))

bench-overload: $(STAMP)  ## three times the load that it can carry, then half: SECONDS, JSON
	@$(BIN)/python bench/overload.py --seconds $(or $(SECONDS),15) $(if $(JSON),--json $(JSON))

profile: $(STAMP)  ## where an operation's microseconds go, by py-spy: STORAGE, SECONDS, DOCS=docs/performance.md, JSON
	@$(BIN)/py-spy --version >/dev/null 2>&1 || $(BIN)/pip install -q --disable-pip-version-check "py-spy>=0.4"
	@$(BIN)/python bench/where.py --storage $(STORAGE) $(if $(SECONDS),--seconds $(SECONDS)) $(if $(DOCS),--docs $(DOCS)) \
	  $(if $(JSON),--json $(JSON))

bench-growth: $(STAMP)  ## cost as work grows: DIMENSIONS=nodes,keys, KEYS_MAX=10000000, QUICK=1, JSON=file, DOCS=docs/growth.md
	@$(BIN)/python -m bench.growth $(if $(QUICK),--quick) $(if $(DIMENSIONS),--dimensions $(DIMENSIONS)) \
	  $(if $(KEYS_MAX),--keys-max $(KEYS_MAX)) $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(SECONDS),--seconds $(SECONDS)) \
	  $(if $(FOLDER),--folder $(FOLDER)) $(if $(JSON),--json $(JSON)) $(if $(DOCS),--docs $(DOCS)) \
	  $(if $(READ),--read $(READ))

bench-peers: $(STAMP)  ## side by side with Redis, etcd, NATS, ...: QUICK=1, PEERS=a,b, ROUNDS, SECONDS, BARE=program, JSON, DOCS=file
	@scripts/bench_peers "$(VENV)"
	@$(BIN)/python -m bench.peers $(if $(QUICK),--quick) $(if $(PEERS),--peers $(PEERS)) $(if $(ROUNDS),--rounds $(ROUNDS)) \
	  $(if $(SECONDS),--seconds $(SECONDS)) $(if $(BARE),--bare $(BARE)) $(if $(JSON),--json $(JSON)) \
	  $(if $(DOCS),--docs $(DOCS)) $(if $(FROM),--from $(FROM))

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

system-packages:
	@scripts/system_packages

clean:  ## remove the environment and every cache
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage*
