"""OpenVINO, judged by ONNX Runtime."""

import subprocess
import sys
from pathlib import Path

import miniature
import numpy as np
import oracle
import pytest
from miniature import HIGH, LOW
from workshop import Exported, Workshop

from vqbet_edge import BackendError, EdgePolicy

CALLS = """
import sys
calls = []
sys.addaudithook(lambda event, _: calls.append(event))
from vqbet_edge import EdgePolicy
EdgePolicy.load(sys.argv[1], "openvino")
print([call for call in calls if call.startswith(("socket.", "subprocess.", "os.fork"))])
"""


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_acts_as_onnxruntime_does(workshop: Workshop, precision: str) -> None:
    exported = workshop.bundle(oracle.TINY, precision)  # type: ignore[arg-type]
    ours, theirs = (
        EdgePolicy.load(exported.bundle, backend, seed=2) for backend in ("openvino", "onnxruntime")
    )
    for observation in oracle.observations(oracle.TINY, 12):
        got, expected = ours.act(observation), theirs.act(observation)
        assert ours.last is not None
        assert theirs.last is not None
        np.testing.assert_array_equal(ours.last.codes, theirs.last.codes)
        np.testing.assert_allclose(got, expected, rtol=1e-5 if precision == "fp32" else 2e-3)


def test_a_gpt_of_one_block_needs_no_mask(mini: Path) -> None:
    ours, theirs = (EdgePolicy.load(mini, name, seed=2) for name in ("openvino", "onnxruntime"))
    random = np.random.default_rng(0)
    for _ in range(12):
        observation = miniature.observation(random)
        got, expected = ours.act(observation), theirs.act(observation)
        # Relative to the action's range: an action may be next to 0.
        np.testing.assert_array_less(np.abs(got - expected) / (HIGH - LOW), 1e-5)


def test_calls_no_service(tiny: Exported) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CALLS, str(tiny.bundle)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_says_what_to_install(tiny: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(BackendError, match=r"pip install 'vqbet-edge\[openvino\]'"):
        EdgePolicy.load(Path(tiny.bundle), "openvino")
