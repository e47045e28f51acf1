"""No bundle that computes another policy proves itself right, whatever its precision."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import miniature
import numpy as np
import pytest
import torch
from miniature import IMAGE
from mutations import mutations
from workshop import once

from vqbet_edge import EdgePolicy
from vqbet_edge.errors import BackendError, BundleError, NonFiniteError, UsageError
from vqbet_edge.runtime.backends import create_backend
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.cases import ReferenceCases
from vqbet_edge.runtime.manifest import Precision, encode_manifest
from vqbet_edge.runtime.manifest_reading import decode_manifest
from vqbet_edge.runtime.proof import act_out
from vqbet_edge.training.checkpoint import load_checkpoint
from vqbet_edge.training.dataset.samples import patches
from vqbet_edge.training.network import VQBeT

CAMERAS = IMAGE, f"{IMAGE}.wrist"
PUSHT = Path(__file__).parents[2] / "examples" / "pusht"


def tiny(shared: Path, precision: Precision, seed: int) -> Bundle:
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
    bundle, random = tiny(shared, "fp32", 1), np.random.default_rng(0)
    policy = EdgePolicy.load(bundle.path, "onnxruntime", prefetch="off")
    with policy, policy.record(shared / "mutations-seen"):
        for _ in range(8):
            policy.reset()
            for _ in range(32):
                seen = miniature.observation(random, CAMERAS)
                seen |= {key: patches(random, seen[key].shape) for key in CAMERAS}
                policy.act(seen)


def trained(shared: Path, precision: Precision) -> Bundle:
    """The example's policy."""
    path, frames = shared / f"mutations-trained-{precision}.bundle", PUSHT / "frames"
    policy = load_checkpoint(str(PUSHT / "checkpoint"))
    calibration = frames if precision == "int8" else None
    make = lambda: miniature.write(path, policy, 96, precision, calibration)  # noqa: E731
    return Bundle.open(once(path, make))


def untrained(shared: Path) -> Bundle:
    """Another of the example's sizes; what crosses between graphs is float32 in any precision."""
    path = shared / "mutations-untrained.bundle"

    def make() -> None:
        policy = load_checkpoint(str(PUSHT / "checkpoint"))
        torch.manual_seed(0)
        network = VQBeT(policy.config).eval().requires_grad_(False)
        miniature.write(path, replace(policy, network=network))

    return Bundle.open(once(path, make))


def refused(bundle: Bundle, cases: ReferenceCases) -> bool:
    """By its figures, or because its manifest contradicts itself or nothing can act on it."""
    try:
        decode_manifest(encode_manifest(bundle.manifest))
        backend = create_backend("onnxruntime", bundle)
        try:
            return bool(act_out(bundle, backend, cases).violations)
        finally:
            backend.close()
    except (BackendError, BundleError, NonFiniteError, UsageError):
        return True


def check(bundle: Bundle, other: Bundle, cases: ReferenceCases, *, every: bool = True) -> None:
    """Of those in graphs and arrays a third, or every one."""
    assert not refused(bundle, cases)
    tried = [
        (name, refused(mutated, cases))
        for number, (name, mutated) in enumerate(mutations(bundle, other))
        if every or number % 3 == 0 or mutated.manifest is not bundle.manifest
    ]
    assert len(tried) > (90 if every else 35)
    assert [name for name, found in tried if not found] == []


@pytest.mark.parametrize(
    ("precision", "every"),
    [
        ("fp32", False),
        *(pytest.param(p, True, marks=pytest.mark.extended) for p in get_args(Precision)),
    ],
)
def test_each_is_refused(shared: Path, precision: Precision, every: bool) -> None:
    bundle = tiny(shared, precision, 1)
    check(bundle, tiny(shared, precision, 2), ReferenceCases.of(bundle), every=every)


@pytest.mark.extended
@pytest.mark.parametrize("precision", get_args(Precision))
def test_each_is_refused_at_honest_sizes(shared: Path, precision: Precision) -> None:
    """A trained policy's, on one of its three cases: a robot acts out all."""
    bundle = trained(shared, precision)
    cases = ReferenceCases.of(bundle)
    check(bundle, untrained(shared), replace(cases, cases=cases.cases[:1]))
