# make demo      build ViT-S/14 from made-up weights, judge it, compile its engine for an A100, say what to do next
# make test      everything CI runs: format, lint, types, import contracts, tests
# make bench     what a build costs beside a plain export and the PyTorch runs
# make engines   every variant compiled to an fp16 engine: seconds, memory, size
# make gpu       speed and truth of every runtime on this machine's GPU, in one table
#
# All set themselves up in .venv; a second call does no set-up again.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test bench engines gpu clean

demo: $(READY)
	$(BIN)/dinoexport build vits14 --weights synthetic:0 --target a100 --runtime tensorrt_rtx

test: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest -n 2 --dist worksteal

bench: $(READY)
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

gpu: $(READY)
	$(BIN)/python benchmarks/gpu_check.py --out benchmarks/results/gpu.md

clean:
	rm -rf $(VENV) bundles build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
