# Three commands do all the set-up: `make demo`, `make demo-training` and `make test`. Another Python, on the path or pyenv's,
# gets an environment of its own: `make test PYTHON=python3.12` works in .venv-3.12.
PYTHON ?= python3
FOUND := $(shell $(PYTHON) -c 'import sys; print(sys.executable)' 2>/dev/null \
	|| ls -d $(HOME)/.pyenv/versions/$(PYTHON:python%=%).*/bin/python 2>/dev/null | tail -1)
VERSION := $(if $(FOUND),$(shell $(FOUND) -c 'import sys; print("%d.%d" % sys.version_info[:2])'))
VENV ?= .venv$(if $(filter python3,$(PYTHON)),,-$(VERSION))
BIN := $(VENV)/bin
# Modules are compiled when they are first imported: most never are. Where that is not kept, each of
# many processes compiles PyTorch again.
unexport PYTHONDONTWRITEBYTECODE
PIP := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt

.PHONY: demo demo-training test test-all torture aarch64 check clean python

demo: $(VENV)/.package
	PATH="$(abspath $(BIN)):$$PATH" examples/pusht/demo.sh

# A task of its own, from demonstrations on: some minutes of training.
demo-training: $(VENV)/.package
	PATH="$(abspath $(BIN)):$$PATH" examples/detour/demo.sh

# One thread per worker: workers that each spin on all cores slow each other several times.
# A worker that dies fails the run at once: its tests are lost, and pytest would wait for them.
PYTEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto --dist loadgroup --max-worker-restart 0

# Every part of the product.
test: $(VENV)/.reference
	$(PYTEST) -m "not extended" $(PYTEST_ARGS)

# The rest: other environments (LeRobot 0.6.1, ROS 2, Ray, a browser), honest sizes, attacks, searches.
test-all: $(VENV)/.reference
	$(PYTEST) -m extended $(PYTEST_ARGS)

# The abuse cases, the soak and the guards in full: hours instead of minutes.
torture: $(VENV)/.reference
	VQBET_EDGE_TORTURE=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest tests/attacks tests/runtime tests/serve tests/ros2 $(PYTEST_ARGS)

# The robot's side on an emulated aarch64 processor, such as a Jetson's; on Debian. Not part of CI.
# BUNDLE=path proves that bundle instead of small ones.
aarch64: $(VENV)/.reference
	PYTHON=$(BIN)/python tools/aarch64.sh outputs/aarch64 $(BUNDLE)

check: $(VENV)/.reference
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Which Python the environment is made with; fails if there is none.
python:
	@test -n "$(FOUND)" && echo $(FOUND)

clean:
	rm -rf .venv .venv-* outputs build dist

$(VENV)/.package: pyproject.toml constraints.txt
	@test -n "$(FOUND)" || { echo "there is no $(PYTHON) here" >&2; exit 1; }
	$(FOUND) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) --editable '.[export,train,sim]'
	touch $@

# LeRobot is the reference: from Python 3.12 on the newest one. The newest for older Pythons pins a
# torch that is too old, so it comes without its pins.
$(VENV)/.reference: $(VENV)/.package tests/requirements-reference.txt
	$(PIP) --editable '.[dev]'
	$(PIP) --requirement tests/requirements-reference.txt
	$(if $(filter 3.10 3.11,$(VERSION)),$(BIN)/python -m pip install --quiet --no-deps lerobot==0.4.4)
	touch $@
