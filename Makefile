PYTHON ?= python3
DATA ?= data
TABLE ?= cpu
BIN := .venv/bin

.PHONY: demo test docs nightly nightly-oldest mutants benchmarks browser clean

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

# The suite with the oldest supported Lightning, in its own environment.
nightly-oldest: .venv-oldest/.ready
	.venv-oldest/bin/pytest -n 2

# Changes frozen/, optim/ and consolidation.py piece by piece, and prints the changes that no test notices.
# FILES narrows it to the files whose names contain one of these words.
mutants: .venv/.ready
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants $(FILES)

# All methods on all streams of a table (cpu, long, games or cuda); DATA is the folder of the data sets. Goes on
# where it was broken off, and makes all anew in another folder OUT.
benchmarks: .venv/.ready
	$(BIN)/python -m benchmarks.suite --data $(DATA) --table $(TABLE) $(addprefix --out ,$(OUT))

# torch first, by its pinned version: nothing that is installed later may bring another build along. Nor may
# torchvision come with BackPACK or timm, since one built for another torch breaks the import of torchmetrics.
define install
$(1)/bin/python -m pip install --quiet --constraint $(2) torch
$(1)/bin/python -m pip install --quiet --constraint $(2) --editable ".[dev]"
$(1)/bin/python -m pip install --quiet --constraint $(2) --no-deps backpack-for-pytorch timm
touch $(1)/.ready
endef

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(call install,.venv,constraints.txt)

# The pins of constraints-oldest.txt replace those of the same names in constraints.txt.
.venv-oldest/.ready: pyproject.toml constraints.txt constraints-oldest.txt
	$(PYTHON) -m venv .venv-oldest
	awk -F'==' 'NR == FNR {oldest[$$1]} NR == FNR || !($$1 in oldest)' constraints-oldest.txt constraints.txt \
		> .venv-oldest/constraints.txt
	$(call install,.venv-oldest,.venv-oldest/constraints.txt)

# The report is looked at in a real browser.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq \
		&& apt-get install -y -qq --no-install-recommends chromium >/dev/null; } \
		|| echo "no chromium, and it cannot be installed here: the browser tests of the report are skipped"

clean:
	rm -rf .venv .venv-oldest
