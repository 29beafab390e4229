# Everything here works from a fresh clone with python3 (3.11 or later), python3-venv, make and git.
#
# On Linux, pip's usual torch comes with CUDA: several gigabytes. Where there is no GPU, name the
# index of torch's CPU builds (see torch's own installation page):
#
#     make demo PIP_ARGS="--extra-index-url https://…/cpu"

PYTHON ?= python3
VENV ?= .venv
PIP_ARGS ?=
PYTEST_ARGS ?=

python := $(VENV)/bin/python
pip_install = $(python) -m pip install --disable-pip-version-check --quiet --use-pep517 $(PIP_ARGS)

# Two workers, since most tests wait for processes of their own; tests of one file stay together.
pytest = $(python) -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 10

# Memory in huge pages, as the programs have it (slam_asr/runtime/environment.py): on a virtual machine with slow
# page faults, importing torch alone took two to four times as long without it.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

# With this variable, which some images of Python set, every process of the tests would compile all modules again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install install-test demo test unit slow soak cluster-test lint docs lock images compile clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do printf '%-20s %s\n' "$$name" "$$text"; done
	@echo 'PIP_ARGS="…" goes to pip (-v shows what it does), PYTEST_ARGS="…" to pytest; PYTHON and VENV choose the interpreter and the environment.'

install: $(VENV)/.run  ## set up .venv with everything that the pipelines need
install-test: $(VENV)/.test  ## the same, plus the packages for the tests

demo: $(VENV)/.run  ## train and evaluate a small model on the speech in demo/
	$(python) -m pipelines run demo

test: unit slow  ## run all tests, the quick ones first

slow: $(VENV)/.test  ## run only the slow tests
	$(pytest) -m slow $(PYTEST_ARGS)

unit: $(VENV)/.test  ## run only the quick tests
	$(pytest) -m "not slow" $(PYTEST_ARGS)

soak: $(VENV)/.test  ## run the long tests, which take hours
	SLAM_ASR_SOAK=1 $(python) -m pytest $(PYTEST_ARGS)

cluster-test: $(VENV)/.test  ## run the tests on a real Kubeflow, for hours: CLUSTER=profile.yaml IMAGES=build/images.yaml
	SLAM_ASR_CLUSTER="$(CLUSTER)" SLAM_ASR_CLUSTER_IMAGES="$(IMAGES)" $(python) -m pytest tests/cluster $(PYTEST_ARGS)

lint: $(VENV)/.test  ## check style, types, words and generated docs, with the hooks of .pre-commit-config.yaml
	PATH="$(abspath $(VENV)/bin):$$PATH" $(python) -m pre_commit run --all-files

docs: $(VENV)/.run  ## write the generated pages, and the picture of the pipeline's graph in the dashboard
	$(python) docs/generate.py

images:  ## build the steps' images: REGISTRY=… TAG=… PUSH=1 or LOAD=kind, and STAGES, BASE_IMAGE, TORCH, PIP_ARGS, BUILD_ARGS
	$(PYTHON) images/build.py $(if $(REGISTRY),--registry "$(REGISTRY)") $(if $(TAG),--tag "$(TAG)") $(if $(PUSH),--push) $(if $(LOAD),--load "$(LOAD)") \
	  $(if $(STAGES),--stages "$(STAGES)") $(if $(BASE_IMAGE),--base-image "$(BASE_IMAGE)") $(if $(TORCH),--torch "$(TORCH)") \
	  $(if $(PIP_ARGS),--pip-args="$(PIP_ARGS)") $(if $(BUILD_ARGS),--build-args="$(BUILD_ARGS)")

compile: $(VENV)/.run  ## write the pipeline's and the components' YAML to build/kfp
	$(python) -m pipelines compile

lock: $(VENV)/.test  ## write requirements/*.txt from the installed versions
	$(python) requirements/lock.py

clean:  ## remove .venv and all build results, but not runs/
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp files are written last, so that an interrupted installation is repeated. test.txt includes
# run.txt, which includes stages.txt: a change of one reinstalls those that include it.
$(VENV)/.run: requirements/run.txt requirements/stages.txt pyproject.toml | $(VENV)/bin/pip
	@echo 'Installing the packages of requirements/run.txt into $(VENV); this takes minutes, once.'
	$(pip_install) -r requirements/run.txt
	$(pip_install) --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.test: requirements/test.txt $(VENV)/.run
	$(pip_install) -r requirements/test.txt
	@touch $@

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, not " + sys.version.split()[0] + ": choose one with make PYTHON=…")'
	$(PYTHON) -m venv $(VENV)
