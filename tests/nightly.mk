# What is too slow for every change, or needs a network; included by the Makefile.
.PHONY: test-nightly nightly-tests nightly-calibration test-lowest test-newest test-peers test-llava llava-venv upstream audit

# Each part runs even if one before it fails; make names those that failed.
test-nightly: venv vqa-venv ## what is too slow for every change (tests/README.md), two and a half hours; goes on after a failure
	$(MAKE) --keep-going nightly-tests test-isa nightly-calibration test-lowest test-newest test-peers test-llava

NIGHTLY := runs/nightly
nightly-tests: venv vqa-venv ## of these, the tests
	$(PY) -m probes demo --out $(NIGHTLY)/demo --extras
	DEMO=$(CURDIR)/$(NIGHTLY)/demo FAULTS=20 FAULTS_EACH=5 NUMBA_DISABLE_JIT=0 $(PYTEST) --durations=40 -m 'nightly and not gpu'

nightly-calibration: venv ## of these, a seed of the calibration
	$(PY) -m experiments.toy.calibrate --seeds 0 --out $(NIGHTLY)/calibrate

# With torch of its own range, too: a CUDA build, unless TORCH_INDEX=URL has CPU builds. --no-config: pyproject.toml tells uv
# that torch requires no packages of CUDA, which holds for the lock.
NEWEST_VENV := .venv-newest
test-newest: ## the fast tests with the newest versions that pyproject.toml allows
	$(PYTHON) -m venv --clear $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/python -m pip install -q uv
	$(NEWEST_VENV)/bin/uv --no-config pip install -q --python $(NEWEST_VENV) --upgrade $(if $(TORCH_INDEX),--index $(TORCH_INDEX)) gguf -e '.[cluster,figures,lab,test]'
	$(NEWEST_VENV)/bin/python -m pytest -q -n $(JOBS) --dist loadfile --no-loadscope-reorder

LOWEST_VENV := .venv-lowest
test-lowest: ## the fast tests with the lowest versions that pyproject.toml allows
	$(PYTHON) -m venv --clear $(LOWEST_VENV)
	$(LOWEST_VENV)/bin/python -m pip install -q uv
	$(LOWEST_VENV)/bin/uv --no-config pip install -q --python $(LOWEST_VENV) --resolution lowest-direct -e '.[cluster,figures,test]'
	$(LOWEST_VENV)/bin/python -m pytest -q

test-peers: venv ## transformers' own LLaVA tests on our class (clones them from GitHub, or TRANSFORMERS=file://CLONE)
	TRANSFORMERS=$(TRANSFORMERS) $(PY) tests/peers/run.py

# LLaVA's own package, with the versions of its time: torch 2.0.1 runs on Python 3.11 at most. deepspeed is built with torch.
LLAVA_VENV := .venv-llava
LLAVA_PINS := tests/peers/llava/requirements.txt
llava-venv: $(LLAVA_VENV)/installed ## .venv-llava with LLaVA's own training code, for test-llava (TORCH_INDEX as above)

$(LLAVA_VENV)/installed: $(LLAVA_PINS)
	python3.11 -m venv --clear $(LLAVA_VENV)
	$(LLAVA_VENV)/bin/python -m pip install -q --no-compile $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.0.1
	$(LLAVA_VENV)/bin/python -m pip install -q --no-compile wheel
	$(LLAVA_VENV)/bin/python -m pip install -q --no-compile --no-build-isolation -r $(LLAVA_PINS)
	$(LLAVA_VENV)/bin/python -m pip install -q --no-compile --no-deps llava-torch==1.2.2.post1
	@touch $@

test-llava: venv llava-venv ## LLaVA's own train() and ours on the same batches, step by step (WRITE=yes: renew the results)
	$(PY) tests/peers/llava/run.py $(if $(WRITE),--write)

upstream: ## behaviour of other software that our workarounds stand on: says which no longer holds (needs a network)
	@for file in tests/upstream/*.sh; do bash $$file >/dev/null 2>&1 && echo "holds: $$file" || echo "no longer holds: $$file"; done

AUDIT_VENV := .venv-audit
audit: ## known vulnerabilities of the locked versions (pip-audit; needs the network; AUDIT='-s osv' asks osv.dev)
	$(PYTHON) -m venv $(AUDIT_VENV)
	$(AUDIT_VENV)/bin/python -m pip install -q pip-audit
	echo $(TORCH) | $(AUDIT_VENV)/bin/pip-audit --strict --disable-pip --no-deps -r /dev/stdin $(AUDIT)
	$(AUDIT_VENV)/bin/pip-audit --strict --disable-pip --no-deps -r requirements.lock -r $(VQA_LOCK) $(AUDIT)
