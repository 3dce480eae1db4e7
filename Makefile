# make demo      build ViT-S/14 from made-up weights, judge it, say what to do next
# make test      everything CI runs: format, lint, types, import contracts, tests
# make bench     latency, accuracy and export beside the peers', who have an environment of their own in .venv-peers;
#                then what a build costs beside a plain export and the PyTorch runs
# make engines   every variant compiled to an fp16 engine: seconds, memory, size
#
# All set themselves up in .venv; a second call does no set-up again.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PEERS := .venv-peers

.PHONY: demo test bench engines clean

demo: $(READY)
	$(BIN)/dinoexport build vits14 --weights synthetic:0

test: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2 --dist worksteal

bench: $(READY) $(PEERS)/.ready
	$(PEERS)/bin/python benchmarks/run.py
	$(BIN)/python benchmarks/build_cost.py

engines: $(READY)
	$(BIN)/python benchmarks/engines.py

# The machine's own pip fills the environment: Debian's python3 makes one with a pip inside only if python3-venv is there.
PIP := $(PYTHON) -m pip --python $(BIN)/python --quiet --disable-pip-version-check install --constraint constraints.txt

# timm asks for torchvision, which brings gigabytes of CUDA; its state dicts, all we use it for, need none of that.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv --without-pip $(VENV)
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps timm
	touch $(READY)

$(PEERS)/.ready: pyproject.toml constraints.txt benchmarks/requirements.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv --without-pip $(PEERS)
	$(PYTHON) -m pip --python $(PEERS)/bin/python --quiet --disable-pip-version-check install \
		--constraint constraints.txt --requirement benchmarks/requirements.txt --editable '.[export,cpu,openvino]'
	touch $(PEERS)/.ready

clean:
	rm -rf $(VENV) $(PEERS) bundles build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
