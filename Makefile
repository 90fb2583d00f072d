# Every target sets up what it needs on a machine that has only Python 3.11 or newer and make. They share the
# virtual environment in .venv, which is built anew whenever pyproject.toml has changed.
#
#   make demo     the whole story on this machine: replicate, kill, promote, go on
#   make test     all tests              make test ARGS='-k promote'
#   make crash    kills, power losses, bad networks and bad disks, for two minutes each    make crash SECONDS=600
#   make check    ruff, mypy --strict, import-linter; generated code is what the .proto files say
#   make sim      a minute of simulated histories, from a fresh seed    make sim SEEDS=100000    make sim SEED=n
#   make mutants  breaks the product in known ways, and sees that somebody notices    make mutants ARGS='--only NAME'
#   make fuzz     looks for bytes that a decoder does not take    make fuzz SECONDS=600
#   make bench    the table of docs/benchmarks.md, measured here
#   make bench-peers   the table and plot of docs/peers.md: PostgreSQL, Redis and etcd, where installed, beside us
#   make proto    generates proto/understudy/v1/*_pb2* anew
#   make clean    removes everything that the others made

PYTHON ?= $(firstword $(foreach python,python3 python3.14 python3.13 python3.12 python3.11,$(shell \
	$(python) -c 'import sys; print("$(python)" if sys.version_info >= (3, 11) else "")' 2>/dev/null)))
ARGS ?=
SECONDS ?= 600

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
FUZZER := $(VENV)/fuzzer
GENERATED := $(VENV)/generated

PROTO := proto/understudy/v1
PROTOS := $(wildcard $(PROTO)/*.proto)
SERVICES := $(shell grep -l '^service ' $(PROTOS))

.PHONY: demo test sim mutants crash check fuzz bench bench-peers proto clean generated

demo: $(READY)
	$(BIN)/understudy demo $(ARGS)

test: $(READY)
	$(BIN)/pytest -n 2 --dist worksteal $(ARGS)

# What is tried completely instead of for some time takes half an hour at most.
crash: SECONDS = 120
crash: $(READY)
	CRASH_SECONDS=$(SECONDS) $(BIN)/pytest -v --timeout $$(($(SECONDS) + 1800)) tests/crash $(ARGS)

sim: $(READY)
	PYTHONPATH=.types:tests $(BIN)/python tests/sim/run.py $(if $(SEED),--seed $(SEED)) $(if $(SEEDS),--seeds $(SEEDS)) $(ARGS)

mutants: $(READY)
	PYTHONPATH=.types:tests $(BIN)/python tests/mutants/run.py $(ARGS)

check: $(READY) generated
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	PYTHONPATH=.types $(BIN)/lint-imports --no-logo
	@diff -rq -x '*.proto' -x __init__.py -x py.typed -x __pycache__ $(PROTO) $(GENERATED)/understudy/v1 \
		|| { echo 'make proto brings the generated code up to date with the .proto files'; exit 1; }

fuzz: $(FUZZER)
	$(BIN)/python tests/fuzz/run.py --seconds $(SECONDS) $(ARGS)

bench: $(READY)
	$(BIN)/python bench/run.py $(ARGS)

bench-peers: $(READY)
	PYTHONPATH=bench $(BIN)/python -P -m peers $(ARGS)

proto: generated
	rm -f $(PROTO)/*_pb2.py $(PROTO)/*_pb2.pyi $(PROTO)/*_pb2_grpc.py $(PROTO)/*_pb2_grpc.pyi
	cp $(GENERATED)/understudy/v1/* $(PROTO)/

# Beside the real place, so that a mistake in a .proto file leaves the last good code where it is.
generated: $(READY)
	@rm -rf $(GENERATED)
	@mkdir $(GENERATED)
	@PATH="$(CURDIR)/$(BIN):$$PATH" python -m grpc_tools.protoc --proto_path=proto \
		--python_out=$(GENERATED) --mypy_out=quiet:$(GENERATED) $(PROTOS)
	@PATH="$(CURDIR)/$(BIN):$$PATH" python -m grpc_tools.protoc --proto_path=proto \
		--grpc_python_out=$(GENERATED) --mypy_grpc_out=quiet:$(GENERATED) $(SERVICES)

$(READY): pyproject.toml
	@test -n "$(PYTHON)" || { echo 'Python 3.11 or newer is needed: make PYTHON=/path/to/python3 ...'; exit 1; }
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

# Apart from the rest: it has a copy of LLVM's fuzzer in it, for few platforms, and no test needs it.
$(FUZZER): $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[dev,fuzz]'
	@touch $@

clean:
	rm -rf $(VENV) build dist understudy.egg-info
	rm -rf .fuzz .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
