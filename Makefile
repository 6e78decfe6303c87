# The commands people type. Each does all its own set-up; none needs more than Python 3.11+ and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help setup bench-setup train test test-slow bench bench-compile lint clean

help:  ## This list.
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: $(VENV)/installed  ## Makes .venv and installs requirements.txt into it.

$(VENV)/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit("error: Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	@touch $@

bench-setup: $(VENV)/installed-bench  ## Adds PyTorch and timm, for the benchmarks alone.

$(VENV)/installed-bench: requirements-bench.txt $(VENV)/installed
	$(BIN)/python -m pip install --quiet --requirement requirements.txt --requirement requirements-bench.txt
	@touch $@

train: setup  ## Trains on the embedded digits into runs/digits.
	$(BIN)/python main.py --config=configs/digits.py --workdir=runs/digits

test: setup lint  ## Lints, then runs the whole suite.
	$(BIN)/python -m pytest -n 2 --dist=worksteal

test-slow: setup  ## Runs the tests that take minutes, with programs optimised as users' are.
	XLA_FLAGS= TEST_DEVICES=16 $(BIN)/python -m pytest -n 2 --dist=worksteal -m slow

bench: bench-setup  ## Measures a training step and evaluation beside timm's.
	$(BIN)/python -m experiments.benchmark train_step --model=b0 --group_size=16 --image_size=128 --batch=8
	$(BIN)/python -m experiments.benchmark train_step --model=b0 --group_size=1 --norm=batch --image_size=224 --batch=8
	$(BIN)/python -m experiments.benchmark train_step --model=b4 --group_size=16 --image_size=160 --batch=4
	$(BIN)/python -m experiments.benchmark train_step --mode=evaluate --model=b0 --group_size=16 --image_size=128 --batch=8

bench-compile: bench-setup  ## The same training steps beside timm's under torch.compile, which compiles for minutes.
	$(BIN)/python -m experiments.benchmark train_step --model=b0 --group_size=16 --image_size=128 --batch=8 --against=timm-compile
	$(BIN)/python -m experiments.benchmark train_step --model=b0 --group_size=1 --norm=batch --image_size=224 --batch=8 --against=timm-compile
	$(BIN)/python -m experiments.benchmark train_step --model=b4 --group_size=16 --image_size=160 --batch=4 --against=timm-compile

lint: setup  ## Checks style and format.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:  ## Removes .venv and what the tests and the linter cached; never a run.
	rm -rf $(VENV) .pytest_cache .ruff_cache
