PYTHON ?= python3
DATA ?= data
TABLE ?= cpu
BIN := .venv/bin

.PHONY: demo test docs nightly benchmarks browser clean

demo: .venv/.ready
	$(BIN)/lightning-blip demo

test: .venv/.ready browser
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2 --cov --cov-report=term-missing:skip-covered --cov-fail-under=95

# The site, in site/; needs no network.
docs: .venv/.ready
	$(BIN)/mkdocs build --strict

# What takes too long for each change: forty kills, hundreds of random fits.
nightly: .venv/.ready
	$(BIN)/pytest -n 2 -m nightly

# All methods on all streams of a table (cpu, long, games or cuda); DATA is the folder of the data sets. Goes on
# where it was broken off, and makes all anew in another folder OUT.
benchmarks: .venv/.ready
	$(BIN)/python -m benchmarks.suite --data $(DATA) --table $(TABLE) $(addprefix --out ,$(OUT))

# torch first, by its pinned version: nothing that is installed later may bring another build along. Nor may
# torchvision come with BackPACK or timm, since one built for another torch breaks the import of torchmetrics.
.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps backpack-for-pytorch timm
	touch $@

# The report is looked at in a real browser.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
		&& apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
		|| echo "no chromium, and it cannot be installed here: the browser tests of the report are skipped"

clean:
	rm -rf .venv
