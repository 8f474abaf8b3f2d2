# make demo      train, probe and report on a toy world, on two CPU cores; again: only what is missing
# make real      the same with a real language model, SmolLM2-135M, in 45 minutes
# make help      all targets
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Where this is set, as in many containers, each process would compile every module that it imports: --no-compile, below.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv vqa-venv demo real tower calibrate test test-slow test-isa equal bench lint licences lock clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 26

# ---------------------------------------------------------------------------------------------------- set-up
venv: $(VENV)/installed ## .venv with the versions of requirements.lock (TORCH_INDEX=URL: torch from another index)

# $(call install,VENV,LOCK): the packages of LOCK, each file checked against its hash, then torch, then the project.
# torch is not in the lock: the right build depends on the machine (GPUs: the default index, CPUs: TORCH_INDEX or a mirror).
# setuptools is installed first, because source packages (deepspeed) are built with it and without network access.
# --no-compile halves the time: Python compiles what is imported, once, when it is.
TORCH := torch==2.13.0
define install
	$(PYTHON) -m venv $(1)
	sed -n '/^setuptools==/,/[^\]$$/p' $(2) | $(1)/bin/python -m pip install -q --no-compile --no-deps --require-hashes -r /dev/stdin
	$(1)/bin/python -m pip install -q --no-compile --no-deps --no-build-isolation --require-hashes -r $(2)
	$(1)/bin/python -m pip install -q --no-compile --no-warn-conflicts $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	$(1)/bin/python -m pip install -q --no-compile --no-deps --no-build-isolation -e .
	@touch $@
endef

$(VENV)/installed: pyproject.toml requirements.lock
	$(call install,$(VENV),requirements.lock)

# lmms-eval needs an environment of its own: its dependencies conflict with ours.
VQA_VENV := .venv-vqa
VQA_PINS := llava_bidir/vqa/requirements.txt
VQA_LOCK := llava_bidir/vqa/requirements.lock
vqa-venv: $(VQA_VENV)/installed ## .venv-vqa with lmms-eval, for llava-bidir vqa (TORCH_INDEX as above)

$(VQA_VENV)/installed: pyproject.toml $(VQA_PINS) $(VQA_LOCK)
	$(call install,$(VQA_VENV),$(VQA_LOCK))

# ---------------------------------------------------------------------------------------------------- demo
OUT ?= runs/demo
RUN_DEMO = $(PY) -m probes demo $(if $(SCALE),--scale $(SCALE)) $(if $(EXTRAS),--extras)

demo: venv ## a small toy world, into runs/demo (SCALE=1: in full; SEED=1, SEEDS="0 1 2", OUT=DIR)
ifdef SEEDS
	@for seed in $(SEEDS); do echo "seed $$seed"; $(RUN_DEMO) --seed $$seed --out $(OUT)/seed$$seed || exit; done
	@$(PY) -m probes report $(foreach seed,$(SEEDS),$(OUT)/seed$(seed)) --out $(OUT)/report
else
	@$(RUN_DEMO) --out $(OUT) $(if $(SEED),--seed $(SEED))
endif

real: OUT := runs/real
real: venv ## a real language model on the toy world in English, into runs/real (MINUTES=45, CONTROLS=yes, SEED=1, OUT=DIR)
	@$(PY) -m experiments.real.run --out $(OUT) $(if $(SEED),--seed $(SEED)) $(if $(MINUTES),--minutes $(MINUTES)) \
	  $(if $(CONTROLS),--controls --draws 3)

tower: OUT := runs/tower
tower: venv ## what becomes of a trained vision tower, into runs/tower (DATA=DIR with msrc, labelmefacade and flickr8k)
	$(PY) -m experiments.real.tower.tower --out $(OUT) --photos $(DATA)/msrc $(DATA)/labelmefacade \
	  --captions $(DATA)/flickr8k/captions_training.json

calibrate: venv ## worlds with known truth: how often each verdict says yes, into runs/calibrate (SEEDS="0 1 2"; default: ten)
	$(PY) -m experiments.toy.calibrate $(if $(SEEDS),--seeds $(SEEDS))

# ---------------------------------------------------------------------------------------------------- checks
# Tests of a file share what they prepare, so that a file stays with one worker; long files come first (tests/conftest.py).
JOBS ?= 2
PYTEST = $(PY) -m pytest -q --durations=10 -n $(JOBS) --dist loadfile --no-loadscope-reorder
FAST := not slow and not distributed and not gpu and not real and not nightly
SLOW := (slow or distributed or real) and not gpu and not nightly

test: venv ## the fast tests, three to five minutes (JOBS=2 worker processes)
	$(PYTEST)

test-slow: venv ## those of .ci/run that take longer, start several processes or train a real language model
	$(PYTEST) --durations=40 -m '$(SLOW)'

# Other instructions and threads sum in another order: each setting stands for a kind of processor. A CPU without AVX-512
# runs "avx512" with what it has. torch.compile does not follow ATEN_CPU_CAPABILITY.
ISA ?= sse4 avx2 avx512
THREADS ?= 1 2
sse4 := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2
avx2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2
avx512 := ATEN_CPU_CAPABILITY=avx512 ONEDNN_MAX_CPU_ISA=AVX512_CORE MKL_ENABLE_INSTRUCTIONS=AVX512
ISA_SETTINGS := $(foreach isa,$(ISA),$(foreach threads,$(THREADS),isa-$(isa)-$(threads)))

test-isa: $(ISA_SETTINGS) ## the numerical tests as other processors compute (ISA="sse4 avx2 avx512" THREADS="1 2")

isa-%: venv
	@echo "== $* threads"
	$($(word 1,$(subst -, ,$*))) TORCH_COMPILE_DISABLE=1 OMP_WAIT_POLICY=PASSIVE TEST_THREADS=$(word 2,$(subst -, ,$*)) \
	  $(PYTEST) -m 'numerics and $(FAST)'

equal: venv ## what users get from this checkout and another one, OTHER=DIR (git worktree add --detach DIR COMMIT)
	PYTHONPATH=.:tests/helpers $(PY) tests/equal.py $(OTHER) runs/equal

bench: venv ## speed and memory as ratios, measured side by side, into runs/bench.json
	PYTHONPATH=.:tests/helpers $(PY) tests/bench/bench.py --out runs/bench.json

lint: venv ## ruff, the import order (import-linter), spelling (codespell)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports
	git ls-files | xargs $(VENV)/bin/codespell

# ---------------------------------------------------------------------------------------------------- supply chain
licences: venv ## licences of the installed packages; fails on a GPL or an unknown one
	$(VENV)/bin/pip-licenses
	if [ -d $(VQA_VENV) ]; then $(VENV)/bin/pip-licenses --python $(VQA_VENV)/bin/python; fi

UV ?= uv
COMPILE = $(UV) pip compile -q --universal --generate-hashes --no-annotate --no-emit-package torch \
  --custom-compile-command 'make lock'
# without timm, which needs torchvision: of another build than torch it breaks transformers
LOCKED_EXTRAS := browser cluster coco figures lab real test
lock: ## writes both lock files from pyproject.toml, keeping versions that still fit (needs uv)
	$(COMPILE) $(LOCKED_EXTRAS:%=--extra %) pyproject.toml -o requirements.lock
	$(COMPILE) --no-deps $(VQA_PINS) -o $(VQA_LOCK)

clean: ## removes the environments and runs/demo
	rm -rf $(VENV) $(VQA_VENV) $(LLAVA_VENV) $(AUDIT_VENV) $(LOWEST_VENV) $(NEWEST_VENV) runs/demo

include tests/nightly.mk
