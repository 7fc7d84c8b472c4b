# Two commands: `make demo` runs the whole round, `make test` proves it. Both set themselves up.

VENV ?= .venv
# The newest interpreter that is at least 3.11; `make PYTHON=… demo` to choose another.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	command -v $$p >/dev/null && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
RUN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test test-all bench lint format proto setup clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

setup: $(VENV)/.ready  ## the virtual environment, pinned by constraints.txt (llama.cpp compiles for some minutes, once)

$(VENV)/.ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "oneround needs Python 3.11 or newer, and found none: install one, or make PYTHON=/path/to/python3"; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version) (the first time takes several minutes: llama.cpp is compiled)"
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install -c constraints.txt -e '.[all,dev]'
	@touch $@

demo: setup  ## a coordinator and three clients on this machine, start to GGUF
	$(RUN)/python benchmarks/demo.py

test: setup  ## the test suite
	$(RUN)/python -m pytest -n 2 --dist loadfile  # most of them wait for other processes

test-all: setup  ## the test suite with the slow proofs
	$(RUN)/python -m pytest -m "" --hypothesis-profile=new

bench: setup  ## how fast publishing and training are, how much a coordinator takes, what one round is worth (some 90 minutes, 20 GB under build/)
	$(RUN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	$(RUN)/python benchmarks/bench_publish.py --work build/bench
	$(RUN)/python benchmarks/bench_coordinator.py --work build/bench
	$(RUN)/python benchmarks/bench_train.py --work build/bench
	$(RUN)/python benchmarks/one_shot_vs_multi_round.py

lint: setup  ## formatting, lint, types, and known vulnerabilities in what is pinned
	$(RUN)/ruff format --check .
	$(RUN)/ruff check .
	$(RUN)/mypy
	$(RUN)/python tests/audit.py

format: setup  ## put the code in shape
	$(RUN)/ruff format .
	$(RUN)/ruff check --fix .

proto: setup  ## regenerate the stubs
	PATH="$(CURDIR)/$(RUN):$$PATH" $(RUN)/python -m grpc_tools.protoc -Iproto --python_out=proto --mypy_out=proto \
		--grpc_python_out=proto --mypy_grpc_out=proto proto/oneround/v1/federation.proto

clean:  ## everything that was made here
	rm -rf $(VENV) demo-output build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
