# make demo | test | bench | lint | clean   (test-torch: the tests, with PyTorch)
# Everything runs in .venv, made on first use: PYTHON picks the interpreter, ARGS goes to the command.

PYTHON ?= python3
TORCH  ?= torch==2.13.0
ARGS   ?=

VENV := .venv
PY   := $(VENV)/bin/python
PIP  := $(PY) -m pip --disable-pip-version-check

# The caller's environment stays out of .venv, and two pips never share it.
unexport PYTHONPATH PYTHONHOME
.NOTPARALLEL:

.PHONY: demo test test-torch bench lint clean

demo: $(VENV)/bench.stamp
	$(PY) -m bench.demo $(ARGS)

test: lint
	$(PY) -m pytest $(ARGS)

test-torch: $(VENV)/torch.stamp test

bench: $(VENV)/bench.stamp
	$(PY) -m bench layer $(ARGS)

lint: $(VENV)/test.stamp
	$(PY) -m ruff check .
	$(PY) -m mypy

clean:
	rm -rf $(VENV) build dist out *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/torch.stamp: | $(VENV)/venv.stamp
	$(PIP) install $(TORCH)
	@touch $@

# bench.stamp, test.stamp: the package, editable, with that extra.
$(VENV)/%.stamp: setup.cfg pyproject.toml | $(VENV)/venv.stamp
	$(PIP) install -e '.[$*]'
	@touch $@

$(VENV)/venv.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	    echo "sbncore needs Python 3.11 or newer, and '$(PYTHON)' is not;" \
	         "name another: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	@touch $@
