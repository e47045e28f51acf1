"""The same seed gives the same actions, in every process; backends agree about the codes."""

import hashlib
import subprocess
import sys
import time
from pathlib import Path

import miniature
import numpy as np
import oracle
import pytest
from torture import cases
from vqbet_export.reference import run_reference
from workshop import Workshop

from vqbet_edge import EdgePolicy, Guards
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import Precision
from vqbet_edge.runtime.normalization import Affine
from vqbet_edge.training.checkpoint import load_checkpoint
from vqbet_edge.training.dataset.samples import random_pieces

ACTING = """
import hashlib, sys
import numpy as np
from vqbet_edge import EdgePolicy
policy = EdgePolicy.load(sys.argv[1], backend="onnxruntime", seed=11, temperature=1.0)
random, digest = np.random.default_rng(12), hashlib.sha256()
for step in range(int(sys.argv[2])):
    image = random.integers(0, 256, (24, 24, 3), np.uint8)
    state = random.uniform((-2, 10), (2, 50)).astype(np.float32)
    digest.update(policy.act({"observation.image": image, "observation.state": state}).tobytes())
print(digest.hexdigest())
"""


def test_every_process_acts_bitwise_the_same(mini: Path) -> None:
    steps = str(cases(100, 1000))
    digests = {
        subprocess.run(
            [sys.executable, "-c", ACTING, mini, steps], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(cases(2, 3))
    }
    assert len(digests) == 1
    assert len(digests.pop().strip()) == 2 * hashlib.sha256().digest_size


def test_how_long_the_robot_waits_does_not_change_a_bit(mini: Path) -> None:
    """What is done while the robot moves may be done in time or not."""
    random = np.random.default_rng(13)
    hasty, patient = (
        EdgePolicy.load(mini, backend="onnxruntime", seed=1, temperature=1.0, prefetch="thread")
        for _ in range(2)
    )
    for _ in range(cases(100, 1000)):
        observation = miniature.observation(random)
        time.sleep(random.choice([0, 1e-4, 2e-3]))
        expected = patient.act(observation)
        np.testing.assert_array_equal(hasty.act(observation), expected)


@pytest.mark.extended
@pytest.mark.parametrize(("precision", "share"), [("fp32", 0.999), ("fp16", 0.99)])
def test_codes_agree_with_pytorch(workshop: Workshop, precision: Precision, share: float) -> None:
    """PyTorch is the other backend that every machine has."""
    exported = workshop.bundle(oracle.TINY, precision)
    checkpoint, guards = load_checkpoint(str(exported.checkpoint)), Guards(action_limits=None)
    policy = EdgePolicy.load(exported.bundle, "onnxruntime", temperature=0, guards=guards)
    manifest, equal = policy.manifest, list[bool]()
    scaling = Affine.from_arrays(Bundle.open(exported.bundle).arrays, "state", manifest.state_dim)
    for piece in random_pieces(manifest, scaling, cases(100, 1000)):
        codes = run_reference(checkpoint, piece).outputs.codes
        policy.reset()
        for frames, state, expected in zip(piece.frames, piece.states, codes, strict=True):
            images = dict(zip(manifest.image_keys, frames, strict=True))
            policy.act_chunk({**images, manifest.state_key: state})
            assert policy.last is not None
            equal += (policy.last.codes == expected).tolist()
    assert np.mean(equal) >= share
