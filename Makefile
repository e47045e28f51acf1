# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --constraint constraints.txt

.PHONY: demo test bench torture check clean

demo: $(VENV)/.package
	PATH="$(abspath $(BIN)):$$PATH" examples/detour/demo.sh

# One thread per worker: workers that each spin on all cores slow each other several times.
# A worker that dies fails the run at once: its tests are lost, and pytest would wait for them.
test: $(VENV)/.judge
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n auto --dist loadgroup --max-worker-restart 0 $(PYTEST_ARGS)

# On a machine that does nothing else; bench/README.md says more.
bench: $(VENV)/.judge
	$(BIN)/python -m pytest bench $(PYTEST_ARGS)

# The abuse cases, the soak and the guards in full: hours instead of minutes.
torture: $(VENV)/.judge
	VQBET_EDGE_TORTURE=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest tests/attacks tests/runtime tests/ros2 $(PYTEST_ARGS)

check: $(VENV)/.judge
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) outputs build dist

$(VENV)/.package: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade pip
	$(PIP) --editable '.[export,train,sim]'
	touch $@

# LeRobot judges our results. Its own pins ask for an older torch, so it comes without them.
$(VENV)/.judge: $(VENV)/.package tests/requirements-judge.txt
	$(PIP) --editable '.[dev]'
	$(PIP) --requirement tests/requirements-judge.txt
	$(BIN)/python -m pip install --quiet --no-deps lerobot==0.4.4
	touch $@
