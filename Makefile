# Every target makes its own virtual environment; nothing but Python 3.11 or newer, pip and make is needed.

PYTHON ?= python3
VENV ?= .venv
# What is installed into it: this checkout, or a built wheel (`make test PACKAGE=dist/lora_plugins-0.1.0-py3-none-any.whl`).
PACKAGE ?= -e .
# Options of pip, such as `-c .ci/floor.txt`.
PIP_OPTIONS ?=
CONFIG ?= tasks/seg.yaml
BIN = $(abspath $(VENV))/bin

# Environments beside the usual one, in folders of their own.
CORE_VENV ?= .venv-core
FLOOR_VENV ?= .venv-floor
MODULES_VENV ?= .venv-modules
RELEASE_VENV ?= .venv-release
# What runs with nothing but the core.
CORE_TESTS ?= tests/core
# What runs with the oldest versions; Lightning is there as well, for `FLOOR_TESTS=tests/integrations`.
FLOOR_TESTS ?= tests/core

.PHONY: run compare test test-slow core-environment test-core test-floor test-modules coverage lint types docs front notebooks release clean

run: $(VENV)/$(if $(filter tasks/dreambooth.yaml,$(CONFIG)),diffusion,vision) ## Fine-tune a shipped model on embedded data.
	$(if $(filter tasks/cls.yaml tasks/seg.yaml tasks/dreambooth.yaml,$(CONFIG)),OMP_NUM_THREADS=1) $(BIN)/lightning fit --config $(CONFIG)

compare: $(VENV)/vision ## Frozen backbone, LoRA and full fine-tuning side by side.
	OMP_NUM_THREADS=1 $(BIN)/python -P -m lora_plugins.tasks compare

test: $(VENV)/dev ## The fast tests, on all cores.
	$(BIN)/pytest -n auto --dist worksteal

test-slow: $(VENV)/dev ## The long sweeps.
	$(BIN)/pytest -m slow --timeout 7200

core-environment: ## Where nothing but the core and pytest is installed.
	$(MAKE) VENV=$(CORE_VENV) PIP_OPTIONS=pytest-xdist $(CORE_VENV)/testing

test-core: core-environment ## The tests of the core, there.
	$(CORE_VENV)/bin/pytest -n auto --dist worksteal $(CORE_TESTS)

test-floor: ## The same with the oldest versions that are allowed; downloads 3 to 4 GB.
	$(MAKE) VENV=$(FLOOR_VENV) PIP_OPTIONS="-c .ci/floor.txt" $(FLOOR_VENV)/lightning,testing
	$(FLOOR_VENV)/bin/pytest $(FLOOR_TESTS)

test-modules: $(MODULES_VENV)/modules ## Published LightningModules, with the packages that they are in.
	OMP_NUM_THREADS=1 $(MODULES_VENV)/bin/pytest -m modules tests/modules

# One package after the other: each narrows what those before it have chosen, and none is asked to fit all at once.
$(MODULES_VENV)/modules: .ci/modules.txt pyproject.toml
	test -x $(MODULES_VENV)/bin/python || $(PYTHON) -m venv $(MODULES_VENV)
	while read package; do $(MODULES_VENV)/bin/pip install --quiet $$package || exit 1; done < .ci/modules.txt
	$(MODULES_VENV)/bin/pip install --quiet "setuptools>=77" $(PACKAGE)[lightning,testing] pytest-timeout
	touch $@

coverage: $(VENV)/dev ## The fast tests, and which lines and branches they miss, in build/coverage.
	$(BIN)/coverage erase
	$(BIN)/coverage run -m pytest
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage html --quiet
	$(BIN)/coverage report --skip-covered

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

front: $(VENV)/dev ## What the front page shows: the output of a run, and pictures of reports. Needs Chromium.
	PYTHONPATH=. $(BIN)/python docs/front.py

notebooks: $(VENV)/dev ## Run the notebooks of the docs, and keep what they print.
	OMP_NUM_THREADS=1 $(BIN)/python docs/run_notebooks.py

release: $(RELEASE_VENV)/bin/twine ## The files of a release, in dist, checked up to the upload.
	rm -rf dist
	$(RELEASE_VENV)/bin/python -m build --quiet --outdir dist .
	$(RELEASE_VENV)/bin/twine check --strict dist/*

$(RELEASE_VENV)/bin/twine:
	$(PYTHON) -m venv $(RELEASE_VENV)
	$(RELEASE_VENV)/bin/pip install --quiet build towncrier twine

# One file for each set of extras that is installed; made again when the project file changes. Tests of the core build
# packages, for which the setuptools that Python 3.11 brings is too old; newer Pythons bring none.
$(VENV)/%: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet $(PIP_OPTIONS) "setuptools>=77" $(PACKAGE)[$*]
	touch $@

clean: ## Remove what the targets made.
	rm -rf $(VENV) $(CORE_VENV) $(FLOOR_VENV) $(MODULES_VENV) $(RELEASE_VENV) build dist *.egg-info .coverage*
