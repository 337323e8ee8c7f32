# make demo   set up, then the demo: ends in out/demo/report.html
# make test   set up, then all tests but the slow ones
# make check  what contributors run before a commit: formatting, lint, types
# make slow   the tests that take minutes

PYTHON ?= python3
BIN := .venv/bin
DEMO ?= out/demo
PIP := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

demo: .venv/ready
	$(BIN)/interp demo --out $(DEMO)

test: .venv/ready
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2

slow: .venv/ready
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

check: .venv/ready-dev
	./scripts/check

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e '.[test]'
	touch $@

.venv/ready-dev: .venv/ready
	$(PIP) -e '.[dev]'
	touch $@

.PHONY: demo test slow check
