# The project's commands. `make` alone lists them.

PYTHON ?= python3
DATA ?=

BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: help install demo test soak bundles lint clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' Makefile

install: $(INSTALLED) ## make .venv with the pinned packages, latdiff3d (editable) and its tools; PYTHON=python3.11 picks one

demo: install ## train and sample on synthetic cases, or on your own with DATA=folder
	$(BIN)/latdiff3d demo $(if $(DATA),--data "$(DATA)")

# One process a core, each with one thread: most of the tests' work is too small to share. A file's tests stay together,
# for they share what they train.
test: export OMP_NUM_THREADS = 1
test: install ## run the tests
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist loadfile

soak: install ## kill training 20 times at random moments and compare its weights; SOAK_SEED=7 picks other moments
	$(BIN)/python -m pytest -m soak -s tests/test_kills.py

bundles: install ## export tiny models, verify them where only their packages are; CLEAN_PYTHON=/path/to/python picks one
	$(BIN)/python -m pytest -m soak -s tests/test_clean_environment.py

lint: install ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

clean: ## remove .venv and the tools' caches; runs and data stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build latdiff3d.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# setuptools goes first and builds without isolation: pip's isolated build environments take no notice of -c
# (and, from 26.2 on, none of PIP_CONSTRAINT), so they would fetch an unpinned one.
$(INSTALLED): constraints.txt setup.cfg pyproject.toml
	@command -v "$(PYTHON)" >/dev/null || { \
		echo "$(PYTHON) was not found. latdiff3d needs Python 3.10 or newer: make install PYTHON=/path/to/python3" >&2; \
		exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
		echo "$(PYTHON) is $$("$(PYTHON)" --version 2>&1). latdiff3d needs Python 3.10 or newer: make install PYTHON=python3.11" >&2; \
		exit 1; }
	@"$(BIN)/python" -m pip --version >/dev/null 2>&1 || { \
		echo "Making .venv with $$("$(PYTHON)" --version)"; \
		"$(PYTHON)" -m venv --clear .venv; }
	@echo "Installing latdiff3d and the packages pinned in constraints.txt into .venv."
	@echo "It takes 1 to 10 minutes, most of it torch (up to 3 GB where its wheel brings CUDA); pip is silent meanwhile."
	@$(BIN)/python -m pip install --quiet -c constraints.txt setuptools
	@$(BIN)/python -m pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@
	@echo "Installed: $(BIN)/latdiff3d. Next: make demo"
