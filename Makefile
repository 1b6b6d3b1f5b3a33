# The two commands of the README are `make train` and `make test`. Each sets up all it needs in .venv
# on a machine that has only make and Python 3.10 or later.

PYTHON ?= python3
# The torch to install first. On Linux without a GPU the registry's wheel brings the CUDA libraries along; to have
# the CPU build instead, add PyTorch's own index: make test TORCH="torch --index-url <the CPU index from pytorch.org>"
TORCH ?= torch==2.13.0

LM ?= pylib-256
TEXT ?= pylib
SITE ?= resid_post.4
N ?= 4096
K ?= 32
TOKENS ?= 2_000_000
OUT ?= runs/first

BIN := .venv/bin
READY := .venv/.ready
.PHONY: train test browser bench laws mutants lab export readme notebooks docs-check models setup

train: $(READY)
	$(BIN)/sae-nb train --lm $(LM) --text $(TEXT) --site $(SITE) --n $(N) --k $(K) --tokens $(TOKENS) --out $(OUT) --resume

test: $(READY)
	$(BIN)/python -m pytest tests

# the widgets in a real browser, through Voila and JupyterLab; needs Chromium or Chrome
browser: $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[dev,browser]'
	$(BIN)/python -m pytest tests/test_explorer.py tests/test_explorer_kernel.py tests/test_live.py tests/test_twice.py

setup: $(READY)

$(READY): settings.ini pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python is %d.%d, but sae_nb needs 3.10 or later: name another with make PYTHON=..." % sys.version_info[:2])'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

# our training step beside a dense reference and installed peers: benchmarks/README.md; half an hour on a quiet machine
bench: $(READY)
	$(BIN)/python benchmarks/bench.py

# break the library on purpose, one change at a time, and see whether the tests notice; an hour on two cores
mutants: $(READY)
	$(BIN)/python tools/mutants.py

# the recorded scaling laws, from nothing: about an hour on one quiet core
laws: $(READY)
	$(BIN)/python recipes/laws.py --out runs/laws

lab: $(READY)
	$(BIN)/python -m pip install --quiet jupyterlab
	cd nbs && ../$(BIN)/python -m jupyter lab

# notebooks -> sae_nb/*.py
export: $(READY)
	$(BIN)/nbdev_export

# nbs/index.ipynb -> README.md
readme: $(READY)
	$(BIN)/python tools/book.py readme

# run every notebook in place and store clean outputs; the pictures need Chromium or Chrome
notebooks: $(READY)
	$(BIN)/python -m pip install --quiet --editable '.[dev,figures]'
	$(BIN)/python tools/book.py run

# nbdev's part of the documentation site, without Quarto
docs-check: $(READY)
	$(BIN)/python -c "from nbdev.serve import proc_nbs; proc_nbs(n_workers=0, force=True)"

# re-make the packaged subject models: hours on a CPU
models: $(READY)
	$(BIN)/python recipes/subject_models.py tokenizer --out runs/models
	for w in 64 128 256; do $(BIN)/python recipes/subject_models.py train --width $$w --out runs/models || exit 1; done
	$(BIN)/python recipes/subject_models.py pack --out runs/models
