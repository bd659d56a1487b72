# Everything here runs in .venv, which `make setup` makes in the checkout (Python 3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help setup demo test chaos fuzz bench docs tools lint format proto train-demo

help: ## show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv with everything in it; done once
	@:

# torch goes first and alone, so that the build that fits this machine is found before anything else
# asks for it. Bytecode is made once, at the end and on all cores: pip would do it on one, and where
# writing it is switched off every process that starts would compile again. Some packages ship files
# for other Pythons, which is no failure.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(v < (3, 11) and f"Homer needs Python 3.11 or newer, and $(PYTHON) is {v[0]}.{v[1]}; name another: make setup PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -m compileall -qq -j 0 .venv/lib || true
	@touch $@

demo: setup ## ask a question about a long document on a local cluster of two CPU workers
	@$(BIN)/python -m cluster.demo

# Real processes on a busy shared machine miss a deadline now and then. Where CI is set, a test that fails
# is run up to twice more, and the summary names it under RERUN; by hand, the first failure counts.
# Two processes run the tests, file by file.
test: setup ## run the tests
	@$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(if $(CI),--reruns 2)

chaos: setup ## 60 faults among questions, then 300 requests of mixed fates; SEED=7 and FAULTS=100 choose
	@$(BIN)/python -m tests.chaos $(if $(SEED),--seed $(SEED)) $(if $(FAULTS),--faults $(FAULTS))
	@$(BIN)/python -m tests.chaos.leaks $(if $(SEED),--seed $(SEED))

fuzz: setup ## 20,000 messages that nobody means to each gRPC service, and schemathesis on the HTTP door
	@FUZZ=$(or $(MESSAGES),20000) $(if $(SEED),SEED=$(SEED)) $(BIN)/python -m pytest -s tests/cluster/fuzz

bench: setup ## measure speed, memory, transfer and answers; prints tables and writes plots to out/
	@$(BIN)/homer bench all

docs: setup ## build the documentation into out/docs; fails where a link leads nowhere
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

tools: setup ## bring kubectl and promtool, with which the tests check deploy/
	@.ci/tools

lint: setup ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## put the code into the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: setup ## generate homer/v1/ from proto/
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=. --pyi_out=. --grpc_python_out=. proto/homer/v1/*.proto

train-demo: setup ## train the demo model from nothing, in under an hour on two cores
	@$(BIN)/python -m homer.demo.train
