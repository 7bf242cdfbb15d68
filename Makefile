# make demo | test | test-frameworks | bench | docs | lint | wheel | clean   (make test TORCH=: without PyTorch)
# make gpu, on a machine with a GPU: its tests and its benchmark, by a Python that has what docs/gpu.md lists
# Everything runs in .venv, made on first use: PYTHON picks the interpreter, ARGS goes to the command.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
JAX    ?= jax==0.10.2 flax==0.12.8
ARGS   ?=
# A test that takes longer hangs: its threads are shown and the run ends.
LIMIT  ?= -o faulthandler_timeout=900 -o faulthandler_exit_on_timeout=true
GPU_PYTHON ?= python3

VENV := .venv
PY   := $(VENV)/bin/python
PIP  := $(PY) -m pip --disable-pip-version-check

# The caller's environment stays out of .venv, and two pips never share it.
unexport PYTHONPATH PYTHONHOME
.NOTPARALLEL:

.PHONY: demo test test-frameworks gpu bench docs lint wheel clean

demo: $(VENV)/bench.stamp
	$(PY) -m bench.demo $(ARGS)

test: lint $(if $(TORCH),$(VENV)/torch.stamp)
	$(PY) -m pytest $(LIMIT) $(ARGS)

# With JAX and Flax, which make test skips; before a release.
test-frameworks: lint $(VENV)/torch.stamp
	$(PIP) install --quiet $(JAX)
	$(PY) -m pytest $(LIMIT) tests/test_jax.py tests/test_flax.py tests/test_residuals.py tests/test_interchange.py \
	  tests/test_readme.py tests/test_examples.py tests/test_bench_cpu.py $(ARGS)

# In stages, each with its result, going on after one that fails; about ten minutes.
gpu:
	@failed=0; set -x; \
	$(GPU_PYTHON) -m bench kernels --cache || failed=1; \
	$(GPU_PYTHON) -m pytest -m gpu -W default tests/test_gpu.py -k "not sanitizer" $(ARGS) || failed=1; \
	$(GPU_PYTHON) -m bench layer --device cuda --budget 180 || failed=1; \
	$(GPU_PYTHON) -m pytest -m gpu -W default tests/test_gpu.py -k sanitizer $(ARGS) || failed=1; \
	exit $$failed

bench: $(VENV)/bench.stamp
	$(PY) -m bench layer $(ARGS)

# The site, build/site/index.html; a warning is an error.
docs: $(VENV)/docs.stamp
	rm -rf build/pages
	mkdir -p build/pages
	cd build/pages && ln -s $(addprefix ../../,README.md CHANGELOG.md CONTRIBUTING.md CITATION.cff LICENSE docs examples bench) .
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict $(ARGS)

lint: $(VENV)/test.stamp
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

# With compiled kernels for these kinds of CPU; it takes minutes.
CPUS ?= x86-64-v3 x86-64-v4
wheel: $(VENV)/test.stamp
	rm -rf sbncore/cpu/objects
	$(PY) -m sbncore warmup --cpu $(CPUS) --dtype float64 float32 float16 bfloat16 --folder sbncore/cpu/objects
	$(PIP) wheel --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist out sbncore/cpu/objects *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/torch.stamp: | $(VENV)/venv.stamp
	$(PIP) install $(TORCH)
	@touch $@

# bench.stamp, docs.stamp, test.stamp: the package, editable, with that extra.
$(VENV)/%.stamp: setup.cfg pyproject.toml | $(VENV)/venv.stamp
	$(PIP) install -e '.[$*]'
	@touch $@

$(VENV)/venv.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "sbncore needs Python 3.11 or newer, and '$(PYTHON)' is not;" \
	         "name another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@
