"""No bundle that computes another policy proves itself right, whatever its precision."""

from pathlib import Path
from typing import get_args

import miniature
import numpy as np
import pytest
from miniature import IMAGE
from mutations import mutations
from workshop import once

from vqbet_edge import EdgePolicy
from vqbet_edge.errors import BackendError, BundleError, NonFiniteError, UsageError
from vqbet_edge.runtime.backends import create_backend
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.cases import ReferenceCases
from vqbet_edge.runtime.manifest import Precision
from vqbet_edge.runtime.proof import act_out
from vqbet_edge.training.dataset.samples import patches

CAMERAS = IMAGE, f"{IMAGE}.wrist"


def made(shared: Path, precision: Precision, seed: int) -> Bundle:
    """A policy of two cameras whose every layer matters."""
    path = shared / f"mutations-{precision}-{seed}.bundle"

    def make() -> None:
        # Of one block, only the newest token's row would matter.
        sizes = {"sequentially_select": True, "gpt_n_layer": 2, "bet_softmax_temperature": 0.5}
        policy = miniature.attentive(seed, cameras=CAMERAS, **sizes)
        seen = shared / "mutations-seen"
        if precision == "int8":
            once(seen, lambda: record(shared))
        calibration = seen if precision == "int8" else None
        miniature.write(path, policy, 96, precision, calibration)

    return Bundle.open(once(path, make))


def record(shared: Path) -> None:
    """What INT8 is calibrated on."""
    bundle, random = made(shared, "fp32", 1), np.random.default_rng(0)
    policy = EdgePolicy.load(bundle.path, "onnxruntime", prefetch="off")
    with policy, policy.record(shared / "mutations-seen"):
        for _ in range(8):
            policy.reset()
            for _ in range(32):
                seen = miniature.observation(random, CAMERAS)
                seen |= {key: patches(random, seen[key].shape) for key in CAMERAS}
                policy.act(seen)


def refused(bundle: Bundle, cases: ReferenceCases) -> bool:
    """By its figures, or because nothing can act on it."""
    try:
        backend = create_backend("onnxruntime", bundle)
        try:
            return bool(act_out(bundle, backend, cases).violations)
        finally:
            backend.close()
    except (BackendError, BundleError, NonFiniteError, UsageError):
        return True


@pytest.mark.parametrize("precision", get_args(Precision))
def test_each_is_refused(shared: Path, precision: Precision) -> None:
    bundle = made(shared, precision, 1)
    cases = ReferenceCases.of(bundle)
    assert not refused(bundle, cases)
    tried = [(name, refused(b, cases)) for name, b in mutations(bundle, made(shared, precision, 2))]
    assert len(tried) > 90
    assert [name for name, found in tried if not found] == []
