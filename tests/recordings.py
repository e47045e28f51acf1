"""Recordings to show and to replay, of the smallest bundle."""

from pathlib import Path

import miniature
import numpy as np

from vqbet_edge import EdgePolicy
from vqbet_edge.errors import NonFiniteError
from vqbet_edge.runtime.recorded import Recording


def record(bundle: Path, folder: Path, lengths: tuple[int, ...] = (17, 9)) -> Recording:
    """Episodes of random observations, and one that begins with an error."""
    policy, random = EdgePolicy.load(bundle, seed=7), np.random.default_rng(1)
    with policy.record(folder, decisions=True):
        for number, steps in enumerate(lengths):
            policy.reset(seed=number)
            for _ in range(steps):
                policy.act(miniature.observation(random))
        policy.reset()
        fail(policy, miniature.observation(random))
    return Recording(folder)


def fail(policy: EdgePolicy, observation: dict[str, np.ndarray]) -> None:
    """One call that raises after the observation was taken."""
    graphs = policy._window.graphs
    predict = graphs.predict

    def spoiled(states: np.ndarray) -> object:
        outputs = predict(states)
        return outputs._replace(offsets=np.full_like(outputs.offsets, np.nan))

    graphs.predict = spoiled  # type: ignore[method-assign, assignment]
    try:
        policy.act(observation)
    except NonFiniteError:
        return
    finally:
        graphs.predict = predict  # type: ignore[method-assign]
    raise AssertionError("it did not raise")
