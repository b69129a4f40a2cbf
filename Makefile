# One-line recipes: the logic is in Python, so users, CI and Docker run the same code.
MODEL ?= dit
ARGS ?=
# data.path= in ARGS selects experiments/own.
DATA ?= $(if $(findstring data.path=,$(ARGS)),own,digits)
SEED ?= 0
SEEDS ?= $(SEED)
PYTHON ?= python3
DEVICE ?= cpu
STUDY ?= backbones
BASELINE ?=
HOST ?= localhost
RUN ?= runs/$(DATA)/$(MODEL)-s$(SEED)
RUNS ?= $(sort $(patsubst %/checkpoints/,%,$(dir $(wildcard runs/$(DATA)/*/checkpoints/*.ckpt))))

BIN := .venv/bin
STAMP := .venv/.installed
CONFIG := experiments/$(DATA)/$(MODEL).yaml
MODELS := $(filter-out _%,$(sort $(basename $(notdir $(wildcard experiments/$(DATA)/*.yaml)))))
SETS := $(filter-out studies,$(sort $(patsubst experiments/%/,%,$(dir $(wildcard experiments/*/*.yaml)))))
DOCKER_GPUS := $(if $(filter cuda,$(DEVICE)),--gpus all)
DIFFBENCH := $(BIN)/python -m diffbench

.DEFAULT_GOAL := help
.PHONY: help setup train ablation evaluate sample compare findings bench bench-gpu tensorboard test test-all test-gpu docker-build docker-train lint types format clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | awk -F '\t' '{printf "  make %-12s %s\n", $$1, $$2}'
	@printf '\nVariables (current values): MODEL=%s DATA=%s SEED=%s SEEDS=%s ARGS="%s" PYTHON=%s STUDY=%s RUN=%s\n' '$(MODEL)' '$(DATA)' '$(SEED)' '$(SEEDS)' '$(ARGS)' '$(PYTHON)' '$(STUDY)' '$(RUN)'
	@printf 'MODEL with DATA=%s: %s\n' '$(DATA)' '$(MODELS)'
	@printf 'Example: make train MODEL=diffit SEED=1 ARGS="denoiser.window=2"\n'

setup: $(STAMP)  ## create .venv and install (other targets do this if needed)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python 3.11 or newer is needed: set PYTHON=/path/to/python3.11" >&2; exit 2; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "error: the venv module lacks ensurepip: install python3.11-venv (Debian, Ubuntu)" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

# An unknown MODEL or DATA must not start a long installation.
.PHONY: check-config
check-config:
	@test -f '$(CONFIG)' || { printf 'error: no %s; with DATA=%s, MODEL is one of: %s\n  DATA is one of: %s\n' '$(CONFIG)' '$(DATA)' '$(or $(MODELS),none)' '$(SETS)' >&2; exit 2; }

train: check-config $(STAMP)  ## train MODEL on DATA with SEED (or each of SEEDS=0,1,2); run again to resume
	@set -e; for seed in $(subst $(comma), ,$(SEEDS)); do $(DIFFBENCH) train $(CONFIG) seed=$$seed $(ARGS); done

comma := ,

.PHONY: check-study
check-study:
	@test -f 'experiments/studies/$(STUDY).yaml' || { echo "error: no experiments/studies/$(STUDY).yaml; STUDY is one of:" >&2; ls experiments/studies/[!_]*.yaml | sed -E 's|.*/(.*)\.yaml|  \1|' >&2; exit 2; }

ablation: check-study $(STAMP)  ## run every variant of STUDY with every seed and write its report; run again to resume
	@$(DIFFBENCH) study experiments/studies/$(STUDY).yaml $(ARGS)

evaluate: $(STAMP)  ## draw and score samples of RUN
	@$(DIFFBENCH) evaluate $(RUN) $(ARGS)

sample: $(STAMP)  ## draw samples of RUN into a PNG, e.g. ARGS="labels=3 n=16 guidance=2"
	@$(DIFFBENCH) sample $(RUN) $(ARGS)

compare: $(STAMP)  ## print a table and write a report of RUNS (default: all runs on DATA)
	@test -n '$(RUNS)' || { echo "error: no runs under runs/$(DATA): train one first" >&2; exit 2; }
	@$(DIFFBENCH) compare $(RUNS) $(ARGS)

findings: $(STAMP)  ## test published claims against the shipped results; RUN=1 trains the runs they need
	@$(DIFFBENCH) findings $(if $(filter 1,$(RUN)),run=true) $(ARGS)

bench: $(STAMP)  ## measure speed in three minutes; compare with BASELINE=old.json; ARGS=full=true for all parts
	@$(BIN)/python -m benchmarks $(if $(BASELINE),baseline=$(BASELINE)) $(ARGS)

bench-gpu: $(STAMP)  ## measure speed of published sizes on one large GPU in ten minutes
	@$(BIN)/python -m benchmarks gpu=true $(if $(BASELINE),baseline=$(BASELINE)) $(ARGS)

tensorboard: $(STAMP)  ## show curves of all runs at http://localhost:6006; HOST=0.0.0.0 admits other machines
	@echo 'curves without smoothing: http://localhost:6006/?smoothing=0'
	@$(BIN)/python -m tensorboard.main --host $(HOST) --logdir runs --samples_per_plugin images=200

test: $(STAMP)  ## run all but the slow tests, on all cores
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-all: $(STAMP)  ## run all tests that need no GPU; coverage of diffbench/ must be at least 90%
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m 'not gpu' --cov=diffbench --cov-report=term --cov-fail-under=90

test-gpu: $(STAMP)  ## run the tests that need a GPU; skipped with a reason if there is none
	@$(BIN)/python -m pytest -m gpu -rs

docker-build:  ## build the image diffbench:cpu, or diffbench:cuda with DEVICE=cuda
	docker build --file docker/Dockerfile --target $(DEVICE) --tag diffbench:$(DEVICE) .

docker-train: check-config  ## train MODEL on DATA with SEED in the image; runs/ is kept on the host
	@mkdir -p runs
	docker run --rm --init --ipc=host --user $$(id -u):$$(id -g) $(DOCKER_GPUS) --volume "$(CURDIR)/runs:/diffbench/runs" \
		diffbench:$(DEVICE) train $(CONFIG) seed=$(SEED) $(ARGS)

lint: $(STAMP)  ## check style and formatting (ruff)
	@$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check .

types: $(STAMP)  ## check types (mypy, strict)
	@$(BIN)/python -m mypy

format: $(STAMP)  ## fix style and formatting (ruff)
	@$(BIN)/python -m ruff check --fix . ; $(BIN)/python -m ruff format .

clean:  ## remove .venv and caches, but never runs
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build diffbench.egg-info
	find diffbench benchmarks tests -name __pycache__ -type d -exec rm -rf {} +
