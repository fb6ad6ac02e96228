# demo, serve, test, test-slow, check, docs, fuzz, gpu: each makes its own environment first, and only when it is not up
# to date.
#
#   VENV=dir     where the environment is (default .venv)
#   PYTHON=exe   which Python makes it (default: the first of python3, python3.11, ... that is 3.10 or newer)
#   FAISS=gpu    FAISS for NVIDIA GPUs on Linux; use another VENV than that of FAISS=cpu, they exclude each other
#   JOBS=n       test processes
#   ARGS='...'   more arguments for pytest, for example ARGS='-k store'

VENV ?= .venv
FAISS ?= cpu
JOBS ?= 2
ARGS ?=
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed-$(FAISS)
INPUTS := pyproject.toml constraints.txt scripts/make-env

.NOTPARALLEL:
.PHONY: demo serve test test-slow check docs fuzz gpu format clean

demo: $(STAMP)-examples
	$(PY) examples/digits.py

# The explorer of the demo's index, at http://127.0.0.1:8321, until Ctrl+C.
serve: $(STAMP)-examples
	$(PY) -m examples.explorer $(ARGS)

test: $(STAMP)-dev
	$(PY) -m pytest -n $(JOBS) --dist loadgroup -m 'not slow' $(ARGS)

# What `test` leaves out: tests that take long by themselves.
test-slow: $(STAMP)-dev
	$(PY) -m pytest -n $(JOBS) --dist loadgroup -m slow $(ARGS)

check: $(STAMP)-dev
	PY=$(PY) scripts/check

docs: $(STAMP)-docs
	$(PY) -m mkdocs build --strict $(ARGS)

fuzz: $(STAMP)-dev
	$(PY) -m benchmarks.reliability.fuzz $(ARGS)

# What needs a GPU: tests and benchmarks; use FAISS=gpu. Without make's environment: PY=python scripts/gpu
gpu: $(STAMP)-dev
	PY=$(PY) scripts/gpu

format: $(STAMP)-dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

$(STAMP)-%: $(INPUTS)
	scripts/make-env $(VENV) $(FAISS),$*
	touch $@

clean:
	if [ -f $(VENV)/pyvenv.cfg ]; then rm -rf $(VENV); fi
	rm -rf build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find tracin_ann tests examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
