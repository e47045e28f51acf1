"""Bundles of format 2, which `vqbet-export` wrote before 2026-12: they act as they did.

The one place that knows the format. A manifest of it becomes one of today's that still says
`format_version` 2: the secondary logits are then one row, to which the runtime adds a column of
`secondary_columns`, and what was demonstrated is inferred from the scaling.
"""

from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from vqbet_edge.runtime.manifest import ACTION_RANGE, STATE_RANGE, Manifest, seal
from vqbet_edge.runtime.normalization import Affine

Arrays = Mapping[str, NDArray[np.float32]]

ACTION_LIMITS = "action.limits"
_LEAST_SPREAD = 0.05


def decode(data: bytes) -> tuple[Manifest, bytes]:
    """A manifest as today's, and the one text that format 2 has for it.

    Raises:
        msgspec.DecodeError: it is none.
    """
    found: dict[str, dict[str, Any]] = msgspec.json.decode(data, type=dict[str, Any])
    try:
        cameras = sum(f.get("type") == "VISUAL" for f in found["input_features"].values())
        found["policy"]["tokens_per_step"] = cameras + 2
        if (verified := found["verification"]) is not None:
            verified["cases"] = verified["observations"]
    except (KeyError, TypeError, AttributeError) as error:
        raise msgspec.ValidationError(f"its structure is another ({error!r})") from error
    manifest = msgspec.convert({**found, "fps": None, "license": None}, Manifest)

    def spelled(digest: str) -> bytes:
        # What the format has not is left out, so that a text which has it differs.
        text: dict[str, Any] = msgspec.to_builtins(manifest) | {"manifest_sha256": digest}
        for part, key in (("policy", "tokens_per_step"), ("policy", "action_kinds"),
                          ("verification", "cases")):  # fmt: skip
            (text[part] or {}).pop(key, None)
        del text["fps"], text["license"]
        return msgspec.json.format(msgspec.json.encode(text), indent=2) + b"\n"

    return manifest, seal(spelled)


def with_ranges(arrays: Arrays, manifest: Manifest) -> Arrays:
    """The runtime's arrays, with what was demonstrated as far as the scaling tells.

    Quantiles are scaled as the lowest and highest are, so they cannot be told apart.
    """
    state = Affine.from_arrays(arrays, "state", manifest.state_dim)
    action = Affine.from_arrays(arrays, "action", manifest.action_dim)
    found = dict(arrays)
    if (state.add == -1).all():
        found[STATE_RANGE] = np.stack([state.subtract, state.subtract + 2 / state.multiply])
    if ACTION_LIMITS in arrays:
        found[ACTION_RANGE] = found.pop(ACTION_LIMITS)
    elif (action.subtract == -1).all() and not any(manifest.policy.relative_actions):
        found[ACTION_RANGE] = np.stack([action.add, action.add + 2 * action.multiply])
    return found


def with_judgements(arrays: Mapping[str, Any], manifest: Manifest) -> dict[str, Any]:
    """Arrays of reference cases, with NaN for what they do not have: it is not compared."""
    steps, codes = len(arrays.get("states", ())), manifest.policy.vqvae_n_embed
    unknown = {
        "scaled_states": (steps, manifest.state_dim),
        "offset_prints": (steps, 2, codes),
        "logit_prints": (steps, manifest.secondary_rows),
    }
    actions = arrays.get("actions", np.zeros((1, 1, manifest.action_dim), np.float32))
    flat = actions.reshape(-1, actions.shape[-1])
    # Of few actions: one that hardly changes is computed no more exactly than its size allows.
    spread = np.maximum(flat.std(axis=0), _LEAST_SPREAD * np.sqrt((flat**2).mean(axis=0)))
    return {
        **arrays,
        **{name: np.full(shape, np.nan, np.float32) for name, shape in unknown.items()},
        "temperature": np.array([manifest.policy.bet_softmax_temperature]),
        "spread": spread,
        "decoded_prints": np.zeros((0, 0), np.float32),
    }
