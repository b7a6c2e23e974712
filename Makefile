# make demo: install, then analyze a CNN on handwritten digits      make test: the test suite
# make smoke: the tests of one minute                               make test-lowest: with the lowest versions
# make lint: ruff and the type checker                              make bench: benchmarks, raw results as JSON
# make docs: the documentation site                                 make test-wheel: README and commands from the built wheel
usable  = $(firstword $(foreach name,$(1),$(shell $(name) -c 'import sys, ensurepip; \
	print("$(name)" if sys.version_info >= (3, 11) else "")' 2>/dev/null)))
PYTHON ?= $(call usable,python3 python3.11 python3.12 python3.13 python3.14)
VENV   := .venv
BIN    := $(VENV)/bin
OUT    ?= runs/demo
SMOKE  := $(patsubst %,tests/test_%.py,house refusals data gram spectra machines train replay)
NO_PYTHON := No Python 3.11 or newer was found: install one, or name yours as in: make demo PYTHON=/path/to/python3.12

.PHONY: demo test smoke test-lowest test-wheel lint bench dist docs clean

$(VENV)/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "$(NO_PYTHON)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/ntkit analyze --model cnn --data digits --out $(OUT) --overwrite

test: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

smoke: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal $(SMOKE)

.venv-lowest/installed: PYTHON = $(call usable,python3.11 python3.12 python3.13 python3)
.venv-lowest/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "$(NO_PYTHON)"; exit 1; }
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	$(PYTHON) -c 'import re, tomllib; p = tomllib.load(open("pyproject.toml", "rb"))["project"]; x = p["optional-dependencies"]; \
	print(*(r.replace(">=", "==") for r in p["dependencies"] + x["hf"] + x["lightning"] + x["scale"] + x["tensorboard"]), sep="\n"); \
	print(*(r for r in x["dev"] if not re.match("torch=|ntkit|ruff|pyrefly", r)), sep="\n")' > .venv-lowest/requirements.txt
	.venv-lowest/bin/python -m pip install --quiet --disable-pip-version-check -r .venv-lowest/requirements.txt -e .
	touch $@

test-lowest: .venv-lowest/installed
	.venv-lowest/bin/python -m pytest -n 2 --dist worksteal

dist: $(VENV)/installed
	rm -rf dist
	$(BIN)/python -m build --outdir dist .

test-wheel: dist
	rm -rf .venv-wheel
	$(PYTHON) -m venv .venv-wheel
	.venv-wheel/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	.venv-wheel/bin/python -I tests/check_wheel.py

lint: $(VENV)/installed
	$(BIN)/ruff check src tests benchmarks examples studies
	$(BIN)/ruff format --check src tests benchmarks examples studies
	$(BIN)/pyrefly check

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks.run

docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	PYTHONPATH=docs/extensions $(BIN)/python -m zensical build --strict --clean

clean:
	rm -rf $(VENV) .venv-lowest .venv-wheel build dist runs site
