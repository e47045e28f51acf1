"""Whether a policy still computes what was exported: a step of its bundle's reference cases."""

import asyncio
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from vqbet_edge import EdgePolicy, VerificationError
from vqbet_edge.runtime.bundle import Bundle
from vqbet_edge.runtime.cases import ReferenceCases
from vqbet_edge.runtime.comparison import LIMITS

_LOG = logging.getLogger(__name__)
# Encoder, transformer and heads; and how much further off than all cases one alone may be. This
# finds what is broken: `vqbet-doctor` proves.
_STAGES, _ALONE = 2, 10.0
# How old an outcome may be, and how long an answer waits for a new one.
_FRESH_S, _WAIT_S = 10.0, 5.0


class ReferenceStep:
    """One step of a bundle's reference cases.

    Args:
        policy: acts it out; nothing else may use it.
        bundle: the policy's, with all its files.

    Raises:
        BundleError: the bundle has no reference cases.
    """

    def __init__(self, policy: EdgePolicy, bundle: Bundle) -> None:
        cases = ReferenceCases.of(bundle)
        case = cases.cases[0]
        self._policy, self._codes = policy, case.outputs.codes[0]
        self._observation = next(cases.observations(case, bundle.manifest))
        self._expected = case.outputs.decoded_chunk[0] + case.outputs.offset_chunk[0]
        limits = LIMITS[bundle.manifest.precision].behind(_STAGES)
        self._limit = _ALONE * limits.relative_error

    def __call__(self) -> None:
        """Act it out.

        Raises:
            VerificationError: what the policy computes is not what was exported.
            VQBeTEdgeError: it cannot act.
        """
        self._policy.reset()
        self._policy.act_chunk(self._observation, codes=self._codes)
        decision = self._policy.last
        assert decision is not None  # noqa: S101 - a chunk was just predicted
        error = decision.decoded_chunk + decision.offset_chunk - self._expected
        relative = np.linalg.norm(error) / max(float(np.linalg.norm(self._expected)), 1e-12)
        if not relative <= self._limit:  # written so that NaN is wrong
            raise VerificationError(
                f"a reference step came out wrong: its chunk is {relative:.3g} off, expected "
                f"{self._limit:.3g} at most; prove the bundle on this machine: vqbet-doctor BUNDLE"
            )


class Readiness:
    """The outcome of a check, not older than ten seconds; one runs at a time, on its own thread.

    Args:
        check: raises where something is wrong.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check
        self._pool = ThreadPoolExecutor(1, "vqbet-readiness")
        self._running: asyncio.Future[None] | None = None
        self._began = 0.0

    async def failure(self) -> str:
        """What is wrong, in a sentence that anybody may read; empty if nothing is."""
        now = time.monotonic()
        if self._running is None or (self._running.done() and now - self._began > _FRESH_S):
            loop = asyncio.get_running_loop()
            self._running, self._began = loop.run_in_executor(self._pool, self._check), now
            self._running.add_done_callback(_log)
        done, _ = await asyncio.wait({self._running}, timeout=_WAIT_S)
        if not done:
            return f"the policy has not answered for {now - self._began + _WAIT_S:.0f} s"
        wrong = self._running.cancelled() or self._running.exception() is not None
        return "the policy does not act; the server's log tells more" if wrong else ""

    def close(self) -> None:
        """Check nothing any more."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _log(check: "asyncio.Future[None]") -> None:
    if not check.cancelled() and (error := check.exception()) is not None:
        _LOG.error("not ready", exc_info=error)
