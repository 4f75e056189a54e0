# make demo   train on real solar cells and print the metrics
# make test   format, lint, types, tests
# make docs   build the documentation in build/site; broken links are errors
# Each makes .venv on first use, in any order.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test slow docs clean

demo: .venv/with-demo
	@mkdir -p runs
	@$(BIN)/python demo/solar_cells.py runs/solar_cells.csv
	$(BIN)/pixelplay train runs/solar_cells.csv --finetune none --metric macro_f1 --out runs/demo --force

test: .venv/with-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 2 --dist worksteal

slow: .venv/with-dev
	$(BIN)/python -m pytest -m slow --override-ini faulthandler_timeout=0

docs: .venv/with-docs
	$(BIN)/python tools/build_docs.py

.venv/with-%: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
		{ echo "PixelPlay needs Python 3.11 to 3.13: make PYTHON=python3.11 ..."; exit 1; }
	@echo "installing into .venv (once; PyTorch alone takes several gigabytes)"
	@$(PYTHON) -m venv .venv
	@$(PIP) --editable '.[$*]'
	@touch $@

clean:
	rm -rf .venv build runs
