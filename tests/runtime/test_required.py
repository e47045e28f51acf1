"""A backend that is required, and a time that its predictions may take."""

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import miniature
import numpy as np
import pytest

from vqbet_edge import BackendError, EdgePolicy, Guards, UsageError
from vqbet_edge.runtime import timing
from vqbet_edge.runtime.backends.cpu import CpuWindow
from vqbet_edge.runtime.worker import Backlog

NEWEST_S, AHEAD_S = 0.05, 0.2


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time that passes in the transformer alone; ahead of time only once somebody waits for it."""
    now, waited = [0.0], threading.Event()
    replan, prefill = CpuWindow.replan, CpuWindow.prefill

    def replanning(self: CpuWindow, *arguments: Any, **options: Any) -> Any:
        now[0] += NEWEST_S
        return replan(self, *arguments, **options)

    def prefilling(self: CpuWindow, states: Any) -> None:
        assert waited.wait(20)
        now[0] += AHEAD_S
        prefill(self, states)

    def waited_for(name: str) -> Any:
        original = getattr(Backlog, name)

        def waiting(self: Backlog[Any], *arguments: Any) -> Any:
            waited.set()
            result = original(self, *arguments)
            waited.clear()
            return result

        return waiting

    for name in ("wait", "running"):
        monkeypatch.setattr(Backlog, name, waited_for(name))
    monkeypatch.setattr(CpuWindow, "replan", replanning)
    monkeypatch.setattr(CpuWindow, "prefill", prefilling)
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now[0]))


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    ("replan_every", "takes"), [(None, NEWEST_S), (2, NEWEST_S), (1, NEWEST_S + AHEAD_S)]
)
def test_a_backend_that_is_too_slow_is_refused(
    mini: Path, replan_every: int | None, takes: float
) -> None:
    """What is computed ahead counts where nothing lies between two predictions."""
    options: dict[str, Any] = {"prefetch": "thread", "replan_every": replan_every}
    EdgePolicy.load(mini, "onnxruntime", predict_within_s=1.01 * takes, **options).close()
    said = rf"takes {1e3 * takes:.3g} ms here on 'onnxruntime'.*expected {990 * takes:.3g} ms.*"
    with pytest.raises(BackendError, match=said + "vqbet-doctor '.*predict_within"):
        EdgePolicy.load(mini, "onnxruntime", predict_within_s=0.99 * takes, **options)


def test_measuring_leaves_no_trace(mini: Path) -> None:
    """Whatever states the guards refuse, and others who act."""
    guards = Guards(state_limits=(miniature.LOW.tolist(), miniature.HIGH.tolist()))
    random = np.random.default_rng(0)
    seen = [miniature.observation(random) for _ in range(6)]
    with (
        EdgePolicy.load(mini, "onnxruntime", seed=3, guards=guards) as policy,
        EdgePolicy.load(mini, "onnxruntime", seed=3) as plain,
    ):
        for observation in seen:
            policy.check_prediction_time(float("inf"))
            assert (policy.act(observation) == plain.act(observation)).all()
    with pytest.raises(BackendError, match="closed"):
        policy.check_prediction_time(1.0)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"predict_within_s": 0.0}, "expected predict_within_s above 0, got 0.0"),
        ({"predict_within_s": float("nan")}, "expected predict_within_s above 0, got nan"),
        ({"require": ("auto",)}, r"expected require of tensorrt, .*, got \('auto',\)"),
        ({"require": "onnxruntime"}, "expected require of tensorrt, .*, got 'onnxruntime'"),
        ({"require": ("tensorrt", "onnxruntime-cuda")}, "'onnxruntime' is none of those required"),
    ],
)
def test_what_makes_no_sense_is_refused(mini: Path, options: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        EdgePolicy.load(mini, "onnxruntime", **options)
