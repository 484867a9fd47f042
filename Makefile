# Every target makes its own virtual environment; nothing but Python 3.11, pip and make is needed.

PYTHON ?= python3
VENV ?= .venv
# What is installed into it: this checkout, or a built wheel (`make test PACKAGE=dist/lora_plugins-0.1.0-py3-none-any.whl`).
PACKAGE ?= -e .
CONFIG ?= tasks/seg.yaml
BIN = $(abspath $(VENV))/bin

.PHONY: run compare test test-slow lint types docs clean

run: $(VENV)/vision ## Fine-tune the shipped segmentation model on the embedded data.
	$(BIN)/lightning fit --config $(CONFIG)

compare: $(VENV)/vision ## Frozen backbone, LoRA and full fine-tuning side by side.
	OMP_NUM_THREADS=1 $(BIN)/python -P -m lora_plugins.tasks.compare

test: $(VENV)/dev ## The fast tests.
	$(BIN)/pytest

test-slow: $(VENV)/dev ## The long sweeps.
	$(BIN)/pytest -m slow --timeout 7200

lint: $(VENV)/dev docs types ## The linters, and the strict build of the docs.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy reads a copy that lies as an installation does: it finds neither the folders that pyproject.toml maps into the
# package nor, where the checkout is installed for editing, the package itself.
types: $(VENV)/dev ## The type checker.
	$(BIN)/python docs/layout.py build/sources
	cd build/sources && $(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

docs: $(VENV)/dev ## The site, in build/site.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# One file for each set of extras that is installed; made again when the project file changes.
$(VENV)/%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(PACKAGE)[$*]
	touch $@

clean: ## Remove what the targets made.
	rm -rf $(VENV) build dist *.egg-info
