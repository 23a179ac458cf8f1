# Every target sets up .venv on first use. `make demo` and `make test` are all a newcomer needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Files of packages that few programs import: Python compiles them when one does.
RARE := /tests?/|/benchmarks/|/_internal/|/transformers/(models|exporters|pipelines)/|/ray/(rllib|data|serve|tune|train|llm)/|/nvidia/|/mypyc?/|/pip/|/setuptools/|/sympy/(physics|stats|parsing)/|/pygments/lexers/|/fontTools/(ttLib|varLib|feaLib)/|/torch/_vendor/|/onnxruntime/(transformers|tools)/|/playwright/async_api/|/numpy/distutils/|/tensorboard/_vendor/|/huggingface_hub/(cli|inference)/
# That share the tests: one more than there are cores, as some tests wait, and at most 4.
PROCESSES := $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n < 4 ? n + 1 : 4)))

.PHONY: demo test check zoo torture fuzz matrix mutants machines docs format clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(VENV)/.ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "netfission needs Python 3.11 or newer; name one: make PYTHON=python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt --editable '.[dev]'
	@$(BIN)/python -m compileall -qq -j 0 -x '$(RARE)' $(VENV)/lib || true # what pip does, on all cores; some files are no Python 3
	@touch $@

demo: $(VENV)/.ready ## train, evaluate and compare on real digits in under 3 minutes
	$(BIN)/netfission demo

# Threads that wait for each other must not keep a core busy that another process needs.
test: $(VENV)/.ready ## run the test suite, with compiled modules cached, as many processes load them
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest -n $(PROCESSES) --dist worksteal

check: $(VENV)/.ready ## lint, format, strict types and the layers of packages
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

zoo: $(VENV)/.ready ## fission every family of image models by every grouping, and check it (hours; resumes)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/zoo.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/zoo.py --second

torture: $(VENV)/.ready ## kill commands and damage their files, 700 times (hours; resumes)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/torture.py

matrix: $(VENV)/.ready ## run the test suite with other versions of Python and PyTorch, and in other surroundings (hours)
	$(BIN)/python benchmarks/matrix.py

mutants: $(VENV)/.mutants ## change the method's code in 260 places, and see which changes no test notices (hours; resumes)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mutants.py

$(VENV)/.mutants: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[mutants]'
	@touch $@

machines: $(VENV)/.ready ## train in two processes, and on two machines, which are network namespaces (minutes; needs root)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/processes.py
	$(BIN)/python benchmarks/machines.py

fuzz: $(VENV)/.ready ## give thousands of random and damaged files and requests to all readers
	NETFISSION_FUZZ=3000 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_fuzz.py

docs: $(VENV)/.docs ## build the documentation in site/
	COLUMNS=100 $(BIN)/python docs/make_reference.py
	$(BIN)/python benchmarks/zoo.py --page
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "open site/index.html"

$(VENV)/.docs: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	@touch $@

format: $(VENV)/.ready ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) site .mypy_cache .pytest_cache .ruff_cache build dist
