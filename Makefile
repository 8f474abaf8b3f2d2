# make demo      the paper's effects on a toy world, on two CPU cores; again: only what is missing
# make help      all targets
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_CONSTRAINT = $(CURDIR)/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help venv vqa-venv demo demo-alone test test-all bench lint clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

# ---------------------------------------------------------------------------------------------------- set-up
venv: $(VENV)/installed ## .venv with everything that constraints.txt pins (TORCH_INDEX=URL: torch from another index)

# Torch goes first and alone: from TORCH_INDEX, where a CPU-only build may be the right one, and then left as it is.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PY) -m pip install -q -e '.[cluster,test]'
	@touch $@

# Its own environment, since lmms-eval and what it brings do not go together with ours.
VQA_VENV := .venv-vqa
VQA_PINS := llava_bidir/vqa/requirements.txt
vqa-venv: $(VQA_VENV)/installed ## .venv-vqa with lmms-eval, for llava-bidir vqa (TORCH_INDEX as above)

$(VQA_VENV)/installed: pyproject.toml $(VQA_PINS)
	$(PYTHON) -m venv $(VQA_VENV)
	$(VQA_VENV)/bin/python -m pip install -q -c $(VQA_PINS) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(VQA_VENV)/bin/python -m pip install -q --no-deps -r $(VQA_PINS)
	$(VQA_VENV)/bin/python -m pip install -q --no-deps -e .
	@touch $@

# ---------------------------------------------------------------------------------------------------- demo
SEED ?= 0
OUT ?= runs/demo
SCALE ?= 1
include configs/demo/pipeline.mk

demo: venv ## the whole pipeline on the toy world, into runs/demo (SEED=1, OUT=DIR, SCALE=0.1 for a quick look)
	@PYTHONPATH=. $(PY) configs/demo/alone.py $(OUT) $(MAKE) --no-print-directory demo-alone

demo-alone:
	@if $(MAKE) --no-print-directory -q $(REPORT); then echo "$(OUT) is complete; nothing to do."; \
	else $(MAKE) --no-print-directory -j2 $(REPORT); fi
	@cat $(OUT)/logs/report.log

# ---------------------------------------------------------------------------------------------------- checks
test: venv ## the fast tests, about two minutes
	$(PY) -m pytest -q

test-all: venv ## all tests but those that need a GPU
	$(PY) -m pytest -q -m 'not gpu'

bench: venv ## speed and memory as ratios, measured side by side, into runs/bench.json and runs/training.json
	$(PY) tests/bench/bench.py --out runs/bench.json
	$(PY) tests/bench/training.py --out runs/training.json

lint: venv ## ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean: ## removes .venv, .venv-vqa and runs/demo
	rm -rf $(VENV) $(VQA_VENV) runs/demo
