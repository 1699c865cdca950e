# make train   a first run: hybrid MoZO on handwritten digits, two processes (or one per GPU), about a minute
# make test    the tests            make check   style and types
# make oldest  the tests of what depends on other packages, with the oldest versions that pyproject.toml allows
PYTHON ?= python3
BIN = .venv/bin
PROCESSES ?= $(shell n=$$(nvidia-smi -L 2>/dev/null | grep -c '^GPU'); [ "$$n" -gt 0 ] && echo $$n || echo 2)
# One more than there are cores, at most 5: many tests wait for processes of their own, for a network or for Slurm.
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); [ "$$n" -gt 4 ] && echo 5 || echo $$((n + 1)))

PACKAGES = --constraint constraints.txt --editable '.[all,dev]'
OLDEST = tests/report tests/run tests/data tests/model tests/test_configs.py tests/test_command_line.py tests/test_inference.py

.PHONY: train test check oldest install clean

train: install
	$(BIN)/accelerate launch $(if $(filter-out 1,$(PROCESSES)),--multi_gpu --main_process_port 0) --num_processes $(PROCESSES) --num_machines 1 --mixed_precision no --dynamo_backend no \
		-m dist_vlcl.train $(ARGS)

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadscope --no-loadscope-reorder $(ARGS)

check: install
	$(BIN)/ruff check dist_vlcl benchmarks tests tools
	$(BIN)/ruff format --check dist_vlcl benchmarks tests tools
	$(BIN)/mypy

oldest:
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install --quiet --disable-pip-version-check uv
	.venv-oldest/bin/uv pip install --quiet --python .venv-oldest/bin/python --resolution lowest-direct --editable '.[report,digits,transformers,hf,dev]'
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest --numprocesses $(WORKERS) --dist loadscope --no-loadscope-reorder $(OLDEST) $(ARGS)

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "dist_vlcl needs Python 3.11 or newer; try: make $(MAKECMDGOALS) PYTHON=python3.12"; exit 1; }
	@echo "installing the packages into .venv, which takes one to five minutes"
	@$(PYTHON) -m venv .venv
	@! $(BIN)/pip config list | grep -q '[.]index' && \
		$(BIN)/pip install --quiet --disable-pip-version-check uv && \
		$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode $(PACKAGES) || { \
		echo "now with pip, which is slower: uv failed, or pip has an index of its own, which uv does not know"; \
		$(BIN)/pip install --quiet --disable-pip-version-check $(PACKAGES); }
	@touch $@

clean:
	rm -rf .venv .venv-oldest
