# Everything sets itself up: `make demo` and `make test` work on a machine with only Python >= 3.11 and make.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: demo test test-quick test-all check docs bench gpu chaos format wheel clean help

help: ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "gradaudit needs Python 3.11 or newer; set PYTHON=..."; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version): once, about 2 minutes."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## train, register and audit the demo's models on an embedded MLflow and Prefect
	@$(BIN)/gradaudit demo

# One thread a process: two processes keep two cores busy, and more threads wait for each other.
# A file of tests stays on one process, so that a server or a trained model is made for it once; the longest start first.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test: $(READY) ## run the tests that CI runs: each one, and a sample of the cases of the wide ones
	$(PYTEST) -m "not exhaustive"

test-quick: $(READY) ## run one case of every test that starts no process, in about a minute
	$(PYTEST) -m quick

test-all: $(READY) ## run every test with every case
	$(PYTEST)

check: $(READY) ## lint, types, import contracts and the site of docs/
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@$(MAKE) --no-print-directory docs

docs: $(READY) ## build the site of docs/ into site/; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

format: $(READY) ## let ruff format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(READY) ## run the benchmarks; they print ratios and touch nothing
	@for script in $(filter-out benchmarks/chaos.py,$(wildcard benchmarks/*.py)); do echo "== $$script"; $(BIN)/python $$script || exit 1; done

# A GPU machine may have a torch of its own and no network: the first Python whose torch sees a GPU, else one that has a
# torch at all, else the environment that is set up here. PYTHON=... goes first.
GPU_PYTHONS = $(if $(filter command environment,$(word 1,$(origin PYTHON))),$(PYTHON)) $(BIN)/python $(PYTHON) python3

gpu: ## run on this machine's GPU what no other machine can show, in under 4 minutes (PYTHON=..., ARGS='--only "net *"')
	@for test in 'torch.cuda.is_available()' 'True'; do for python in $(GPU_PYTHONS); do \
	  "$$python" -c "import sys, torch; sys.exit(sys.version_info < (3, 11) or not $$test)" 2>/dev/null && break 2; python=; done; done; \
	[ -n "$$python" ] || { $(MAKE) --no-print-directory $(READY) && python=$(BIN)/python; } || exit 1; \
	PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" "$$python" -m benchmarks.gpu $(ARGS)

chaos: $(READY) ## kill whatever runs while versions are audited, for two hours; then count what was lost
	$(BIN)/python benchmarks/chaos.py

wheel: $(READY) ## build the wheel, install each level into an empty environment, run it from outside the checkout
	@bash .ci/wheel

clean: ## remove what make made
	rm -rf $(VENV) demo_workspace dist site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
