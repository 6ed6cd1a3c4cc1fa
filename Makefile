# make demo      set up, then prompts with pictures through reasoning to pictures, on the embedded model
# make test      set up, then all tests          make test ARGS="tests/kernels -x"
# make install   set up: .venv, dependencies, this package, the compiled extension where a compiler is
# make ablation  Re-Align's ablation on the embedded world: some hours on two cores; it goes on where it was stopped
# make bench     time the ops on the CPU against plain torch and libraries
# make lint      check style
# make clean     remove what was built, .venv included
#
# PYTHON  a Python 3.11 or 3.12 (found if not given)
# TORCH   what pip installs where .venv has no torch in the supported range; may carry pip options, such as an index
#         with CPU builds

VENV := .venv
IN_RANGE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for python in python3.11 python3.12 python3 python; do \
	$$python -c '$(IN_RANGE)' 2>/dev/null && echo $$python && break; done)
TORCH ?= torch==2.13.0
ARGS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
STAMP := $(VENV)/.installed
LINT_STAMP := $(VENV)/.installed-dev
BENCH_STAMP := $(VENV)/.installed-bench
HAS_TORCH := import sys; from importlib.metadata import version; \
	sys.exit(not (2, 11) <= tuple(map(int, version("torch").split(".")[:2])) <= (2, 13))
BUILD_TOOLS := "setuptools>=70" wheel "pybind11>=2.13"
SOURCES := pyproject.toml setup.py MANIFEST.in $(wildcard csrc/*)

.PHONY: install test demo ablation bench lint clean
.DEFAULT_GOAL := install

install: $(STAMP)

test: $(STAMP)
	$(BIN)/python -m pytest $(ARGS)

demo: $(STAMP)
	$(BIN)/realign demo --out demo $(ARGS)

ablation: $(STAMP)
	$(BIN)/python -m train.ablation --out runs/ablation $(ARGS)

bench: $(BENCH_STAMP)
	$(BIN)/python -m bench $(ARGS)

lint: $(LINT_STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) build dist *.egg-info realign_kernels/_C*.so

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; install one, or name it: make PYTHON=/path" >&2; exit 1; }
	@"$(PYTHON)" -c '$(IN_RANGE)' || { echo "error: $(PYTHON) is not Python 3.11 or 3.12" >&2; exit 1; }
	@"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); \
		echo "error: $(PYTHON) cannot make a virtual environment; on Debian, install python3-venv" >&2; exit 1; }

$(STAMP): $(SOURCES) | $(BIN)/python
	@$(PIP) --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip
	$(PIP) install $(BUILD_TOOLS)
	$(BIN)/python -c '$(HAS_TORCH)' 2>/dev/null || $(PIP) install $(TORCH)
	$(PIP) install --no-build-isolation -e ".[test]"
	@$(BIN)/python -c "from realign_kernels import native; print('realign is installed;', native.describe())"
	@touch $@

$(BENCH_STAMP): $(STAMP)
	$(PIP) install --no-build-isolation -e ".[bench]"
	@touch $@

$(LINT_STAMP): $(STAMP)
	$(PIP) install --no-build-isolation -e ".[dev]"
	@touch $@
