# One command per habit. `make demo` and `make test` set everything up on a fresh machine.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

.PHONY: install demo test check format docs clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first and alone, pinned: a range would fetch a build for another machine.
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt
	touch $@

demo: install
	$(BIN)/redraft demo --out demo

test: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff format --check src tests docs
	$(BIN)/ruff check src tests docs
	$(BIN)/mypy
	$(BIN)/python docs/generate.py --check

format: install
	$(BIN)/ruff format src tests docs
	$(BIN)/ruff check --fix src tests docs

docs: install
	$(BIN)/python docs/generate.py

clean:
	rm -rf demo $(VENV)
