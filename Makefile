# make demo      the paper's effects on a toy world, on two CPU cores; again: only what is missing
# make help      all targets
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PIP_CONSTRAINT = $(CURDIR)/constraints.txt

.DEFAULT_GOAL := help
.PHONY: help venv vqa-venv demo demo-alone test test-all test-lowest bench lint licences audit lock clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

# ---------------------------------------------------------------------------------------------------- set-up
venv: $(VENV)/installed ## .venv with everything that constraints.txt pins (TORCH_INDEX=URL: torch from another index)

# $(call install,VENV,LOCK,PINS): what LOCK names, each file only if its hash stands there, then torch, then the project.
# Torch goes by its pin alone: which build is right depends on the machine (for GPUs from the default index, for CPUs from
# TORCH_INDEX and some mirrors), and no lock knows them all. With it comes what it needs for a GPU; the rest of what it
# needs is in the lock. Setuptools goes first: what is built here (deepspeed) is built with it, and with nothing fetched.
define install
	$(PYTHON) -m venv $(1)
	sed -n '/^setuptools==/,/[^\]$$/p' $(2) | $(1)/bin/python -m pip install -q --no-deps --require-hashes -r /dev/stdin
	$(1)/bin/python -m pip install -q --no-deps --no-build-isolation --require-hashes -r $(2)
	$(1)/bin/python -m pip install -q --no-warn-conflicts -c $(3) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(1)/bin/python -m pip install -q --no-deps --no-build-isolation -e .
	@touch $@
endef

$(VENV)/installed: pyproject.toml constraints.txt requirements.lock
	$(call install,$(VENV),requirements.lock,constraints.txt)

# Its own environment, since lmms-eval and what it brings do not go together with ours.
VQA_VENV := .venv-vqa
VQA_PINS := llava_bidir/vqa/requirements.txt
VQA_LOCK := llava_bidir/vqa/requirements.lock
vqa-venv: $(VQA_VENV)/installed ## .venv-vqa with lmms-eval, for llava-bidir vqa (TORCH_INDEX as above)

$(VQA_VENV)/installed: pyproject.toml $(VQA_PINS) $(VQA_LOCK)
	$(call install,$(VQA_VENV),$(VQA_LOCK),$(VQA_PINS))

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
test: venv ## the fast tests, about three minutes
	$(PY) -m pytest -q

test-all: venv ## all tests but those that need a GPU
	$(PY) -m pytest -q -m 'not gpu'

bench: venv ## speed and memory as ratios, measured side by side, into runs/bench.json and runs/training.json
	$(PY) tests/bench/bench.py --out runs/bench.json
	$(PY) tests/bench/training.py --out runs/training.json

lint: venv ## ruff
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# ---------------------------------------------------------------------------------------------------- supply chain
licences: venv ## every installed package with its licence; fails for one that tests/licences.py does not allow
	$(PY) tests/licences.py

# --strict: a package that could not be looked up is a failure, and not passed over.
AUDIT_VENV := .venv-audit
audit: ## the pins against the known vulnerabilities, with pip-audit; needs the network (AUDIT='-s osv' asks osv.dev)
	$(PYTHON) -m venv $(AUDIT_VENV)
	PIP_CONSTRAINT= $(AUDIT_VENV)/bin/python -m pip install -q pip-audit
	$(AUDIT_VENV)/bin/pip-audit --strict --disable-pip --no-deps -r constraints.txt -r $(VQA_PINS) $(AUDIT)

UV ?= uv
COMPILE = $(UV) pip compile -q --universal --generate-hashes --no-annotate --no-emit-package torch \
  --custom-compile-command 'make lock'
lock: ## requirements.lock of constraints.txt, and the one for .venv-vqa; needs uv
	$(COMPILE) --all-extras -c constraints.txt pyproject.toml -o requirements.lock
	$(COMPILE) --no-deps $(VQA_PINS) -o $(VQA_LOCK)

LOWEST_VENV := .venv-lowest
test-lowest: ## the fast tests with the lowest versions that pyproject.toml allows; needs uv
	$(UV) venv -q --clear --python $(PYTHON) $(LOWEST_VENV)
	$(UV) pip install -q --no-config --python $(LOWEST_VENV) --resolution lowest-direct -e '.[cluster,test]'
	$(LOWEST_VENV)/bin/python -m pytest -q

clean: ## removes the environments and runs/demo
	rm -rf $(VENV) $(VQA_VENV) $(AUDIT_VENV) $(LOWEST_VENV) runs/demo
