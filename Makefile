# newsbert_ray needs only Python 3.11+, pip and make; every target builds .venv from the pinned versions first.
# On a machine without a GPU, PIP_EXTRA_INDEX_URL set to PyTorch's CPU index picks its small build.
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

# A second call installs nothing: the stamp is newer than the two files that say what to install.
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "no '$(PYTHON)' here; name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "newsbert_ray needs Python 3.11 or newer, '$(PYTHON)' is $$($(PYTHON) --version 2>&1); name a newer one: make PYTHON=python3.12" >&2; exit 1; }
	@echo "Installing the pinned versions into .venv: about 2 GB with PyTorch's CPU build, several times that with the CUDA one; some minutes, only this once."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY) ## The main job on a small embedded corpus: a sweep over beta and depth, its table and figure (minutes).
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

bench: $(READY) ## Every benchmark of tests/benchmarks, one after the other.
	@set -e; for file in tests/benchmarks/bench_*.py; do name=$$(basename $$file .py); echo "== $$name"; $(BIN)/python -m tests.benchmarks.$$name; done

soak: $(READY) ## Break a cluster of this machine at random under a sweep, and count what was lost.
	$(BIN)/python -m tests.benchmarks.soak_cluster --faults 20 --seed 1 --news 5000 --epochs 6 --out soak

clean: ## Remove what the demo, the benchmarks and the tools wrote; .venv stays.
	rm -rf demo bench soak build dist docs/_build docs/reference .lowest .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find newsbert_ray tests -name __pycache__ -type d -prune -exec rm -rf {} +
