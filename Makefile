# `make help` lists the targets.
#
# Variables: PYTHON=  the interpreter to use       (default: the active python3, or python, 3.11 or later)
#            ARGS=    more arguments for the target's command: make test ARGS="-k lora -x"
#            VENV=    where an environment is made, if one must be (default: .venv)
#            TORCH_INDEX=  index to take PyTorch from when it must be installed (see pytorch.org's install page)
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo test bench static check env

VENV ?= .venv
ARGS ?=
export TORCH_INDEX
export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels$(if $(PYTHONPATH),:$(PYTHONPATH))

ifndef PYTHON
PYTHON := $(shell for p in python3 python python3.11 python3.12 python3.13 python3.14; do \
    if "$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then command -v "$$p"; break; fi; done)
endif

# Says so where there is no such Python, or the one that PYTHON= names is older.
define need_python
@[ -n "$(PYTHON)" ] && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
    { echo "Python 3.11 or later is needed$(if $(PYTHON),; $(PYTHON) is not): name one with PYTHON=" >&2; exit 1; }
endef

# $(call run,TARGET,ARGUMENTS): run Python with ARGUMENTS in an environment that has what TARGET needs.
define run
$(need_python)
@python="$$("$(PYTHON)" tools/make_env.py --for $(1) --venv "$(VENV)")" && \
    echo "$$python $(2)" >&2 && exec "$$python" $(2)
endef

help: ## this list
	@awk -F ' *## *' '/^[a-z]+: .*##/ { sub(/:.*/, "", $$1); printf "make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@sed -n '3,6s/^#//p' $(firstword $(MAKEFILE_LIST))

demo: ## fine-tune a small language model on real text, save it, load it again, compare (about two minutes)
	$(call run,demo,examples/quickstart.py $(ARGS))

test: ## the whole test suite, in a process for each core; kernels run in Triton's interpreter where there is no GPU
	$(call run,test,-m pytest -n logical --maxprocesses 8 --dist worksteal $(ARGS))

bench: ## measure peftkern beside its peers on this machine
	$(call run,bench,-m bench.run $(ARGS))

static: ## compile every kernel for every GPU architecture and check registers, spills, instructions
	$(call run,static,-m bench.static $(ARGS))

check: ## ruff, mypy and the layering test
	$(call run,check,-m ruff check .)
	$(call run,check,-m mypy)
	$(call run,check,-m pytest -q tests/test_layout.py)

env: ## what this machine has, which paths can run on it, and what to do about each fault
	$(need_python)
	@"$(PYTHON)" -P peftkern/env.py $(ARGS)
