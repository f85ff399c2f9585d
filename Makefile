# Everything runs in .venv, which is made anew when a file in requirements/ changes.

PYTHON ?= python3
DEMO_ARGS ?=

VENV := .venv
PY := $(VENV)/bin/python
INSTALL := $(PY) -m pip --disable-pip-version-check --no-input install --quiet
# moekit itself is installed once more when pyproject.toml changes: its commands stand there.
READY := $(VENV)/.moekit-installed

define CHECK_PYTHON
@command -v "$(PYTHON)" > /dev/null || { \
	echo "error: no $(PYTHON) here; name a Python 3.11 or newer: make PYTHON=/path/to/python" >&2; \
	exit 1; }
@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo "error: $(PYTHON) is $$("$(PYTHON)" --version 2>&1), moekit needs 3.11 or newer;" \
		"name one: make PYTHON=python3.12" >&2; \
	exit 1; }
endef

.DEFAULT_GOAL := help
.NOTPARALLEL:

ifneq ($(strip $(MAKEFILE_LIST)),Makefile)
# Called as `make -f some/where/Makefile`: start again in the folder of this file.
GOALS := $(or $(MAKECMDGOALS),help)
.PHONY: $(GOALS)
$(GOALS):
	@$(MAKE) --no-print-directory -C "$(dir $(lastword $(MAKEFILE_LIST)))" $@
else

.PHONY: help
help: ## show this list
	@echo "usage: make TARGET [PYTHON=python3.12]"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-6s %s\n", $$1, $$2 }' Makefile

.PHONY: demo
demo: $(READY) ## compare designs with the default settings into runs/demo (DEMO_ARGS="..." adds options)
	$(VENV)/bin/moekit compare --output runs/demo $(DEMO_ARGS)

.PHONY: test
test: lint docs ## lint, build the docs and run the default tests, one process a core
	$(PY) -m pytest --numprocesses auto --maxprocesses 8 --dist worksteal

.PHONY: slow
slow: $(READY) ## run the tests marked slow
	$(PY) -m pytest -m slow

.PHONY: gpu
gpu: $(READY) ## run the tests marked gpu
	$(PY) -m pytest -m gpu

.PHONY: lint
lint: $(READY) ## check style, format and types
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

# The variable silences an advertisement that mkdocs-material prints at every build.
.PHONY: docs
docs: $(READY) ## build the documentation into site/, where a warning is an error
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

.PHONY: env
env: $(READY) ## make .venv with pinned dependencies and moekit in it

.PHONY: lock
lock: ## write requirements/lock.txt anew from pyproject.toml
	$(CHECK_PYTHON)
	@set -eu; \
	folder=$$(mktemp -d); \
	trap 'rm -rf "$$folder"' EXIT; \
	echo "Resolving the newest dependencies in a fresh environment"; \
	$(PYTHON) -m venv "$$folder/venv"; \
	pip="$$folder/venv/bin/python -m pip --disable-pip-version-check --no-input"; \
	$$pip install --quiet -r requirements/torch.txt; \
	$$pip install --quiet -c requirements/torch.txt -e '.[dev,docs]'; \
	{ \
		sed '/^#/!d' requirements/lock.txt; \
		$$pip freeze --all --exclude-editable --exclude pip --exclude torch \
			| grep -Ev '^(cuda|nvidia)' | sed 's/^triton==.*/&; sys_platform == "linux"/'; \
	} > "$$folder/lock.txt"; \
	if grep -v '^#' "$$folder/lock.txt" | grep -Ev '^[A-Za-z0-9._-]+==[0-9A-Za-z.!]+(; sys_platform == "linux")?$$'; then \
		echo "error: the lines above are no plain pins; requirements/lock.txt is unchanged" >&2; \
		exit 1; \
	fi; \
	cp "$$folder/lock.txt" requirements/lock.txt; \
	echo "Wrote requirements/lock.txt"

.PHONY: clean
clean: ## remove .venv, caches and built files (runs/ stays)
	rm -rf $(VENV) site build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find moekit tests docs -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.dependencies-installed: requirements/torch.txt requirements/lock.txt
	$(CHECK_PYTHON)
	@echo "Making $(VENV) with $$("$(PYTHON)" --version)"
	@rm -rf $(VENV)
	@"$(PYTHON)" -m venv $(VENV)
	@echo "Installing $$(grep -v '^#' requirements/torch.txt)"
	@$(INSTALL) -r requirements/torch.txt
	@echo "Installing $$(grep -vc '^#' requirements/lock.txt) other pinned packages"
	@$(INSTALL) -c requirements/torch.txt -r requirements/lock.txt
	@touch $@

$(READY): $(VENV)/.dependencies-installed pyproject.toml
	@echo "Installing moekit"
	@$(INSTALL) --no-deps --no-build-isolation -e .
	@$(PY) -m pip check > /dev/null || { \
		echo "error: requirements/lock.txt lags behind pyproject.toml; run \`make lock\`:" >&2; \
		$(PY) -m pip check >&2; \
		exit 1; }
	@touch $@

endif
