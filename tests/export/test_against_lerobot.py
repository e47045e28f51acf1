"""The exported bundle against LeRobot 0.4.4 itself, and its graphs in TensorRT's builder."""

import json

import numpy as np
import oracle
import pytest
from vqbet_engines.builder import Job, build_plan
from workshop import Workshop

from vqbet_edge import EdgePolicy
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.manifest import STAGES, Precision

# The rest in `make test-all`.
FIRST = (oracle.TINY.name, "fp32"), (oracle.TINY.name, "fp16"), ("sequential", "fp32")
CASES = [
    pytest.param(
        case,
        precision,
        id=f"{case.name}-{precision}",
        marks=[
            pytest.mark.xdist_group(case.name),
            *[pytest.mark.extended] * ((case.name, precision) not in FIRST),
        ],
    )
    for case in (*oracle.CASES, oracle.TINY)
    for precision in ("fp32", "fp16")
]
# Of the action's range, and of probabilities.
LIMITS: dict[Precision, tuple[float, float]] = {"fp32": (1e-4, 1e-3), "fp16": (2e-3, 2e-2)}


def force_codes(policy: EdgePolicy, reference: oracle.ReferencePolicy) -> None:
    """Make the runtime decide as the reference is told to."""
    choose = policy._planner.sampler.choose
    policy._planner.sampler.choose = lambda outputs, *_: choose(  # type: ignore[method-assign]
        outputs, np.array(reference.injected.codes)
    )


@pytest.mark.parametrize(("case", "precision"), CASES)
def test_acts_as_select_action(workshop: Workshop, case: oracle.Case, precision: Precision) -> None:
    action_limit, probability_limit = LIMITS[precision]
    exported = workshop.bundle(case, precision)
    reference = oracle.ReferencePolicy(workshop.policy(case), case)
    policy = EdgePolicy.load(exported.bundle)
    force_codes(policy, reference)
    stats = oracle.make_statistics(case)[oracle.ACTION]
    action_range = (stats["max"] - stats["min"]).numpy()
    random = np.random.default_rng(0)
    codes = case.fields.get("vqvae_n_embed", 16)
    for observation in oracle.observations(case, 12):
        reference.injected.codes = tuple(random.integers(codes, size=2).tolist())
        expected, got = reference.act(observation), policy.act(observation)
        assert got.dtype == np.float32
        assert np.abs((got - expected) / action_range).max() <= action_limit
        assert policy.last is not None
        change = np.abs(policy.last.code_probabilities - reference.injected.probabilities)
        assert change.max() <= probability_limit
    for result in json.loads((exported.bundle / "report.json").read_text())["results"]:
        assert min(stage["cosine"] for stage in result["stages"].values()) >= 0.999
        assert 0.99 <= result["whole"]["policy"]["code_agreement"] <= 1


@pytest.mark.parametrize(("case", "precision"), CASES)
def test_graphs_build_in_tensorrt(
    workshop: Workshop, case: oracle.Case, precision: Precision
) -> None:
    pytest.importorskip("tensorrt_rtx")
    bundle = Bundle.open(workshop.bundle(case, precision).bundle)
    for stage in STAGES:
        job = Job("tensorrt_rtx", compute_capability="sm86")
        assert len(build_plan(bundle.graph(stage), job).plan) > 1000, stage
