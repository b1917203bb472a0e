# You need Python 3.11 or newer, pip and make. Every target first installs the pinned versions into .venv.
# On a machine without a GPU, set PIP_EXTRA_INDEX_URL to PyTorch's CPU index for the small build.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
SOURCES := newsbert_ray tests cluster docs README.md CONTRIBUTING.md
# The tests of a file run in one process, so that they share its Ray session.
PARALLEL := -n auto --maxprocesses 8 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help demo test check quick lint docs wheel check-lowest bench soak clean

help: ## List these targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# .venv/.ready is newer than these files after an installation, so a second call installs nothing.
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "no '$(PYTHON)' found; name a Python: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "newsbert_ray needs Python 3.11 or newer, '$(PYTHON)' is $$($(PYTHON) --version 2>&1); name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing the pinned versions into .venv (some minutes; about 2 GB with PyTorch's CPU build, much more with CUDA)."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## A sweep over beta and depth on a small synthetic corpus, and its report (minutes).
	$(BIN)/newsbert-ray synthesize --news 4000 --out demo/corpus
	$(BIN)/newsbert-ray prepare --source demo/corpus/synthetic_train --source demo/corpus/synthetic_dev --teacher scratch --out demo/shards
	$(BIN)/newsbert-ray sweep search_spaces/demo.yaml --data demo/shards --teacher scratch --out demo/sweep --resume
	$(BIN)/newsbert-ray report demo/sweep --out demo/report

lint: $(READY) ## Ruff and mypy.
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

docs: $(READY) ## Build the documentation into docs/_build/html; a warning is an error.
	$(BIN)/sphinx-build -W --keep-going -q -d docs/_build/doctrees docs docs/_build/html

quick: $(READY) ## The tests that need no Ray and at most three seconds each.
	$(BIN)/pytest $(PARALLEL) -m "not ray and not slow"

check: $(READY) ## Lint, types, documentation and the quick tests, side by side on all cores.
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target lint docs quick

test: check ## Everything in check, and the tests that start Ray or take long.
	$(BIN)/pytest $(PARALLEL) -m "ray or slow"

wheel: $(READY) ## Build a wheel, install it into an empty environment and run a small demo there.
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
	$(BIN)/python -m tests.try_wheel dist/*.whl

check-lowest: $(READY) ## Run the quick tests with the lowest allowed version of each dependency.
	$(BIN)/python -m tests.check_lowest

bench: $(READY) ## All benchmarks in tests/benchmarks, one after the other.
	@set -e; for file in tests/benchmarks/bench_*.py; do name=$$(basename $$file .py); echo "== $$name"; $(BIN)/python -m tests.benchmarks.$$name; done

soak: $(READY) ## Break a local cluster at random during a sweep; check that nothing is lost.
	$(BIN)/python -m tests.benchmarks.soak_cluster --faults 20 --seed 1 --news 5000 --epochs 9 --out soak

clean: ## Remove what demo, benchmarks, docs and tools wrote; keeps .venv.
	rm -rf demo bench soak build dist docs/_build docs/reference .lowest .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find newsbert_ray tests -name __pycache__ -type d -prune -exec rm -rf {} +
