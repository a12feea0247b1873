# `make demo` shows what quantization does to a network, and that all engines here agree on the result;
# `make test` proves that they do on any.
# PYTHON=python3.12 chooses the interpreter of a new .venv.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint clean

demo: .venv/.installed
	$(BIN)/intact lenet --data digits -o demo
	$(BIN)/intact certify demo/program.safetensors --data digits
	@echo "Open $(CURDIR)/demo/report.html in a browser."

test: lint
	$(BIN)/python -m pytest -n 2

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf .venv demo dist .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e .
	touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) -e '.[dev]'
	touch $@
