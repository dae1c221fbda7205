PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RUNS   ?= runs/l-shape

.PHONY: quickstart test matrix lowest fuzz trials torture multilayer long lint docs links site browser dist coverage bench peers scale clean

# Installed again whenever the project's metadata changes.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.installed-dev: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,docs]"
	@touch $@ $(VENV)/.installed

quickstart: $(VENV)/.installed
	$(BIN)/tsdyn run examples/l-shape.toml -o $(RUNS)
	$(BIN)/tsdyn show $(RUNS)
	$(BIN)/tsdyn plot $(RUNS) l-shape -o $(RUNS)/l-shape.png
	@echo "archive: $(RUNS)   figure: $(RUNS)/l-shape.png"

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n auto --dist worksteal

# The suite under every Python that this machine has, with the lowest and with the newest versions of what it needs.
matrix: $(VENV)/.installed-dev
	$(BIN)/python -m tests.matrix

# The same on this Python's lowest versions alone; TESTS names files or folders of the suite, all unless given.
lowest: $(VENV)/.installed-dev
	$(BIN)/python -m tests.matrix --dependencies lowest --python $(shell $(PYTHON) -c "import sys; print('%d.%d' % sys.version_info[:2])") $(TESTS)

# Property tests with FUZZ random examples each; failures that it finds become fixed examples of the suite.
FUZZ ?= 500
fuzz: $(VENV)/.installed-dev
	TSDYN_FUZZ=$(FUZZ) $(BIN)/python -m pytest -n auto --dist worksteal -m hypothesis

# Compares the end points of gradient flow by three integrators; takes minutes.
trials: $(VENV)/.installed-dev
	$(BIN)/python -m tests.population.copy_or_average

# Repeats the trials that docs/reliability.md reports; takes more than an hour on one core.
torture: $(VENV)/.installed-dev
	$(BIN)/python -m tests.torture

# Compares the released multilayer experiment with its figures; takes ten minutes on one core.
multilayer: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/studies/multilayer_statistics.py

# What takes too long for the suite (hours), in parts; PARTS names some of them.  The table tests/long.md keeps the results.
long: $(VENV)/.installed-dev
	$(BIN)/python -m tests.long $(PARTS)

# Types are checked on the installed package: the tree's analysis/ and studies/ are tsdyn.analysis and tsdyn.studies there.
lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typecheck && $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/typecheck .
	cd build/typecheck && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p tsdyn

docs: $(VENV)/.installed-dev
	$(BIN)/python -m sphinx -W --keep-going -q -b html docs docs/_build/html

# Links to other sites; needs the network.
links: $(VENV)/.installed-dev
	$(BIN)/python -m sphinx -q -b linkcheck docs docs/_build/links

# Documentation of every release (tag vX.Y.Z) and of the tree, side by side.
site: $(VENV)/.installed-dev
	$(BIN)/python docs/versions.py docs/_build/site

# Report pages and documentation in headless Chromium: contrast, names, widths, selection.  Needs node and npm.
browser: docs
	$(BIN)/python -m tests.browser

# Wheel and sdist: built twice and compared, contents checked, installed and run from an empty folder.
dist: $(VENV)/.installed-dev
	rm -rf dist && $(BIN)/python -m tests.distribution

# Branches covered by the suite, of all and of the two wings that must not lose anything.
coverage: $(VENV)/.installed-dev
	TSDYN_COVERAGE=1 $(BIN)/python -m pytest -n auto --dist worksteal --cov --cov-branch --cov-report=
	$(BIN)/python -m coverage report
	$(BIN)/python -m coverage report --include='tsdyn/archive/*,tsdyn/running/*' --fail-under=95

bench: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.engine
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.recording
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.durability
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.commits
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.sweeps
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.deep
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.benchmarks.population
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/benchmarks --no-typechecks -o addopts= --benchmark-only --benchmark-columns=min,median

# The same work by tsdyn, jax and the packages for derivatives, in turns, in an environment of its own; CELLS names some.
peers:
	$(PYTHON) -m venv build/peers
	build/peers/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e . jax backpack-for-pytorch opacus curvlinops-for-pytorch
	OMP_NUM_THREADS=1 build/peers/bin/python -m tests.benchmarks.peers --json build/peers/peers.json $(CELLS)

# Archives of 20 GB, 10,000 runs, 50 killed workers; takes minutes, and 22 GB in the temporary directory until the end.
scale: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.scale

clean:
	rm -rf $(VENV) build dist docs/_build docs/generated docs/reference/generated docs/gallery/generated .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
