PYTHON ?= python3
VENV ?= .venv
FLOORS_VENV ?= .venv-floors

BIN := $(VENV)/bin
PIP_INSTALL := -m pip install --quiet --disable-pip-version-check
SOAK_TIMEOUT ?= 7200
# Many tests wait for servers and daemons: more processes than cores. WORKERS=0 runs them in one, as --pdb needs it.
WORKERS ?= 3

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint format docs screenshots soak floors bench clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST)

venv: $(VENV)/.installed ## the virtual environment all other targets use

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) --editable '.[webserver,test,lint]'
	touch $@ $(VENV)/.demo-installed

# What the shop needs, and no more: whoever only wants to see it need not wait for the servers of the tests.
$(VENV)/.demo-installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP_INSTALL) --editable '.[webserver,lookup,postgresql]'
	touch $@

demo: $(VENV)/.demo-installed ## the shop: user interface, daemon and traffic until Ctrl-C; FOR=60 stops by itself and checks the books
	@$(BIN)/python -m demo $(if $(FOR),--for $(FOR)) $(ARGS)

test: venv ## everything but the soak tests, with coverage
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadgroup --cov $(if $(ARGS),--cov-fail-under=0) $(ARGS)

lint: venv ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv ## let ruff fix what it can
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

docs: $(VENV)/.docs-installed ## the documentation as a site, in site/; warnings are errors
	@# Not --quiet: what that does not show, --strict does not count.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --clean $(ARGS)

$(VENV)/.docs-installed: $(VENV)/.installed
	$(BIN)/python $(PIP_INSTALL) --editable '.[docs]'
	touch $@

screenshots: venv ## the pictures of the documentation, docs/images, from a run of the browser tests
	DJP_REQUIRE_BROWSER=1 DJP_SCREENSHOTS=build/screenshots $(BIN)/python -m pytest tests/browser $(ARGS)
	mkdir -p docs/images
	cp build/screenshots/images/*.png docs/images/

soak: venv floors ## the long tests, and the lowest versions of the dependencies
	$(BIN)/python -m pytest -m soak --timeout=$(SOAK_TIMEOUT) $(ARGS)

floors: $(FLOORS_VENV)/.installed ## the unit tests on the lowest version of every dependency
	$(FLOORS_VENV)/bin/python -m pytest -m 'not soak and not servers and not daemon and not crash' $(ARGS)

$(FLOORS_VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv --clear $(FLOORS_VENV)
	$(FLOORS_VENV)/bin/python $(PIP_INSTALL) uv
	$(FLOORS_VENV)/bin/uv pip install --quiet --python $(FLOORS_VENV)/bin/python \
		--resolution lowest-direct --editable '.[test]'
	touch $@

bench: $(VENV)/.bench-installed ## side by side with peers, one table
	$(BIN)/python -m benchmarks $(ARGS)

$(VENV)/.bench-installed: $(VENV)/.installed
	$(BIN)/python $(PIP_INSTALL) --editable '.[bench]'
	touch $@

clean: ## remove all that the targets made
	rm -rf .demo $(VENV) $(FLOORS_VENV) dist build site .coverage .coverage.* htmlcov \
		.hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
