"""From the window to an action chunk: predict, decide, fuse, un-normalise, clamp."""

import numpy as np

from vqbet_edge.errors import NonFiniteError
from vqbet_edge.runtime.backends.base import Floats
from vqbet_edge.runtime.bundle import DECODE_TABLE, SECONDARY_COLUMNS, Bundle
from vqbet_edge.runtime.guards.actions import ActionGuard
from vqbet_edge.runtime.manifest import ACTION_RANGE
from vqbet_edge.runtime.normalization import ActionScaling, Affine
from vqbet_edge.runtime.sampling import Codes, CodeSampler, Decision
from vqbet_edge.runtime.window import ObservationWindow


class Planner:
    """Predicts chunks (paper, section 3.3: decoded code pair plus the codes' offsets).

    `table` is float32 (C, C, W, A), the decoded chunk of every code pair; None decodes by graph.
    """

    def __init__(
        self,
        window: ObservationWindow,
        sampler: CodeSampler,
        table: Floats | None,
        scaling: ActionScaling,
        actions: ActionGuard,
    ) -> None:
        self.sampler = sampler
        self._window, self._table = window, table
        self._scaling, self._actions = scaling, actions

    def plan(self, forced: Codes | None = None) -> Decision:
        """Predict from the window as it is, with the `forced` code pair (2,) if there is one.

        Raises:
            NonFiniteError: the network produced NaN or infinity.
        """
        outputs = self._window.predict()
        choice = self.sampler.choose(outputs, forced)
        primary, secondary = choice.codes
        offsets = outputs.offsets[0, primary] + outputs.offsets[1, secondary]
        graphs = self._window.graphs
        decoded = (
            graphs.decode(choice.codes) if self._table is None else self._table[primary, secondary]
        )
        chunk: Floats = decoded + offsets
        self._scaling.apply(chunk, self._window.newest_state, chunk)
        if not (np.isfinite(outputs.offsets).all() and np.isfinite(chunk).all()):
            raise NonFiniteError("the predicted actions are not finite; none is executed")
        clamped = self._actions.clamp(chunk)
        return Decision(
            step=self._window.newest_step,
            codes=choice.codes,
            code_probabilities=choice.probabilities,
            draws=choice.draws,
            decoded_chunk=decoded.copy(),
            offset_chunk=offsets,
            action_chunk=chunk,
            clamped=clamped,
            seconds=dict(graphs.seconds),
        )


def secondary_columns(bundle: Bundle) -> Floats | None:
    """float32 (C, C): what each primary code adds to the secondary logits; None: nothing.

    Only bundles of format 2 have them; later ones' graphs give a row for every primary code.
    """
    size, rows = bundle.manifest.policy.vqvae_n_embed, bundle.manifest.secondary_rows
    if not bundle.manifest.policy.sequentially_select or rows == size:
        return None
    return bundle.array(SECONDARY_COLUMNS, (size, size))


def decode_table(bundle: Bundle) -> Floats | None:
    """float32 (C, C, W, A): every code pair's chunk, normalised; None for large codebooks."""
    if DECODE_TABLE not in bundle.arrays:
        return None
    policy, action_dim = bundle.manifest.policy, bundle.manifest.action_dim
    codes = policy.vqvae_n_embed
    return bundle.array(DECODE_TABLE, (codes, codes, policy.action_chunk_size, action_dim))


def action_scaling(bundle: Bundle) -> ActionScaling:
    """What turns the network's chunks into the robot's actions; may raise BundleError."""
    manifest, arrays = bundle.manifest, bundle.arrays
    action = Affine.from_arrays(arrays, "action", manifest.action_dim)
    state = Affine.from_arrays(arrays, "state", manifest.state_dim)
    limits = bundle.demonstrated(ACTION_RANGE, manifest.action_dim)
    return ActionScaling.of(action, state, manifest.policy.relative_actions, limits)
