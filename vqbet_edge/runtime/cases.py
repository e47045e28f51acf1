"""Reference cases: short episodes in a bundle, with all that the reference computes for them.

The file is at most about a megabyte whatever the camera: of large images every stored pixel stands
for a square of `magnification` pixels, and nothing outside the crop is stored, because it must not
matter: it is black.

Letters in shapes: T steps of all cases, M of one, K cameras, h and w height and width of a stored
frame, S state width, D `gpt_hidden_dim`, F `gpt_output_dim`, C codes per layer, R rows of secondary
logits, W actions per chunk, A action width.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from vqbet_edge.errors import BundleError
from vqbet_edge.runtime import format2
from vqbet_edge.runtime.bundle import CAUSAL_MASK, TOKEN_CONSTANTS, Bundle, load_arrays
from vqbet_edge.runtime.cameras import ImageShape, unpack_frames
from vqbet_edge.runtime.manifest import ACTION_RANGE, STATE_RANGE, CropSpec, Manifest
from vqbet_edge.runtime.observation import Observation

CASES_NAME = "reference.safetensors"
MAX_STEPS = 1024
# What no graph's output shows by itself, or not in every precision.
CONSTANTS = STATE_RANGE, ACTION_RANGE, TOKEN_CONSTANTS, CAUSAL_MASK

Floats = NDArray[np.float32]
Frames = NDArray[np.uint8]


class PolicyOutputs(NamedTuple):
    """What the reference computes for consecutive observations, from an empty history."""

    frame_tokens: Floats  # (M, K, D), behind the token embedding
    feature: Floats  # (M, F)
    logits: Floats  # (M, 2, C), the secondary ones given the primary code
    codes: NDArray[np.int64]  # (M, 2), the most probable ones
    decoded_chunk: Floats  # (M, W, A), normalised: the codes' chunk without their offsets
    offset_chunk: Floats  # (M, W, A), normalised: the codes' offsets, summed over both layers
    actions: Floats  # (M, W, A), in the robot's units: what both make together
    scaled_states: Floats  # (M, S), normalised
    # Of every code, whether it is probable or not, a number each: see `prints`.
    offset_prints: Floats  # (M, 2, C), of offsets
    logit_prints: Floats  # (M, R), of rows of secondary logits


class Case(NamedTuple):
    """One short episode, from an empty history."""

    frames: Frames  # (M, K, h, w, 3), as stored
    states: Floats  # (M, S), in the robot's units
    outputs: PolicyOutputs
    # (M,): whether no other code is nearly as probable, so that rounding cannot exchange them.
    clear: NDArray[np.bool_]


@dataclass(frozen=True)
class ReferenceCases:
    """All cases of a bundle.

    Attributes:
        crop: where the reference looks in the camera's image.
        magnification: a stored pixel stands for so many rows and columns of the crop.
        temperature: that the reference samples codes at.
        spread: float32 (A,), of the actions that the reference chooses among, in the robot's units.
        decoded_prints: float32 (C, C), of every code pair's chunk, see `prints`; (0, 0) where the
            codebook is decoded by its graph.
        constants: arrays of the runtime as the reference has them, by their names; without ranges
            that nobody knew.
        cases: the episodes.
    """

    crop: CropSpec
    magnification: int
    temperature: float
    spread: Floats
    decoded_prints: Floats
    constants: Mapping[str, Floats]
    cases: tuple[Case, ...]

    @classmethod
    def of(cls, bundle: Bundle) -> "ReferenceCases":
        """Read those of a bundle.

        Raises:
            BundleError: it has none, or they do not fit its policy.
        """
        data = bundle.contents.get(CASES_NAME)
        if data is None:
            raise BundleError(
                f"the bundle has no reference cases ({CASES_NAME}), so it cannot prove itself; "
                "export its checkpoint again: vqbet-export model.safetensors --force"
            )
        arrays = load_arrays(CASES_NAME, data)
        if not all(np.isfinite(array).all() for array in arrays.values()):
            raise _misfit("some values are not finite and")
        if bundle.manifest.format_version == 2:
            arrays = format2.with_judgements(arrays, bundle.manifest)
        _check_arrays(arrays, bundle.manifest)
        *crop, magnification = arrays["geometry"].tolist()
        starts = np.cumsum(arrays["lengths"])[:-1].tolist()
        names = (*Case._fields, *PolicyOutputs._fields)
        parts = {name: np.split(arrays[name], starts) for name in names if name != "outputs"}
        cases = [
            Case(
                frames=frames,
                states=parts["states"][i],
                outputs=PolicyOutputs(*(parts[name][i] for name in PolicyOutputs._fields)),
                clear=parts["clear"][i] != 0,
            )
            for i, frames in enumerate(parts["frames"])
        ]
        return cls(
            CropSpec(*crop),
            magnification,
            float(arrays["temperature"][0]),
            arrays["spread"].astype(np.float32),
            arrays["decoded_prints"],
            {name: arrays[name] for name in CONSTANTS if name in arrays},
            tuple(cases),
        )

    def encode(self) -> bytes:
        """The file."""
        columns: dict[str, Sequence[NDArray[Any]]] = {
            "frames": [case.frames for case in self.cases],
            "states": [case.states for case in self.cases],
            "clear": [case.clear.astype(np.uint8) for case in self.cases],
            **{n: [getattr(c.outputs, n) for c in self.cases] for n in PolicyOutputs._fields},
        }
        crop = self.crop
        geometry = [crop.top, crop.left, crop.height, crop.width, self.magnification]
        arrays = {name: np.concatenate(parts) for name, parts in columns.items()}
        arrays["geometry"] = np.array(geometry, np.int64)
        arrays["temperature"] = np.array([self.temperature], np.float64)
        arrays |= {"spread": self.spread, "decoded_prints": self.decoded_prints, **self.constants}
        arrays["lengths"] = np.array([len(case.states) for case in self.cases], np.int64)
        data: bytes = save(arrays)
        return data

    def observations(self, case: Case, manifest: Manifest) -> Iterator[Observation]:
        """What the robot would have passed, step by step: whole images."""
        for frames, state in zip(case.frames, case.states, strict=True):
            images = unpack_frames(self.images(frames, manifest.frame_shape), manifest.image_shapes)
            yield {**images, manifest.state_key: state}

    def images(self, frames: Frames, shape: ImageShape) -> Frames:
        """Stored frames (..., K, h, w, 3) -> (..., K, H, W, 3), whole."""
        images = np.zeros((*frames.shape[:-3], *shape), np.uint8)
        large = frames.repeat(self.magnification, axis=-3).repeat(self.magnification, axis=-2)
        part = self.crop.cut(images)
        part[...] = large[..., : self.crop.height, : self.crop.width, :]
        return images


def prints(values: NDArray[np.floating], axes: int) -> Floats:
    """What the last `axes` axes hold, as one number: their product with random signs.

    Whatever changes there changes it, and the file holds all codes instead of the probable ones.
    """
    kept, size = values.shape[: values.ndim - axes], math.prod(values.shape[values.ndim - axes :])
    signs = _signs(size)
    flat = values.reshape(*kept, size).astype(np.float64)
    found: Floats = (flat @ signs / np.sqrt(size)).astype(np.float32)
    return found


@cache
def _signs(size: int) -> NDArray[np.float64]:
    return np.random.default_rng(0).choice([-1.0, 1.0], size)


def _check_arrays(arrays: Mapping[str, NDArray[Any]], manifest: Manifest) -> None:
    """Raise BundleError unless they are what the policy's sizes ask for."""
    check = partial(_checked, arrays)
    # Python's integers do not overflow.
    top, left, height, width, magnification = check("geometry", "int64", 5).tolist()
    rows, columns, _ = manifest.frame_shape
    inside = 0 <= top <= rows - height and 0 <= left <= columns - width
    if not (inside and min(height, width, magnification) > 0) or magnification > max(height, width):
        raise _misfit("geometry")
    lengths: list[int] = check("lengths", "int64", None).tolist()
    steps = sum(lengths)
    if not (lengths and min(lengths) > 0 and steps <= MAX_STEPS):
        raise _misfit("lengths")
    policy, cameras, state = manifest.policy, len(manifest.image_keys), manifest.state_dim
    chunk, size = (policy.action_chunk_size, manifest.action_dim), policy.vqvae_n_embed
    stored = -(-height // magnification), -(-width // magnification)
    check("frames", "uint8", steps, cameras, *stored, 3)
    check("states", "float32", steps, state)
    check("frame_tokens", "float32", steps, cameras, policy.gpt_hidden_dim)
    check("feature", "float32", steps, policy.gpt_output_dim)
    check("logits", "float32", steps, 2, size)
    codes = check("codes", "int64", steps, 2)
    for name in ("decoded_chunk", "offset_chunk", "actions"):
        check(name, "float32", steps, *chunk)
    check("scaled_states", "float32", steps, state)
    check("offset_prints", "float32", steps, 2, size)
    check("logit_prints", "float32", steps, manifest.secondary_rows)
    check("clear", "uint8", steps)
    check("temperature", "float64", 1)
    check("spread", "float32", manifest.action_dim)
    prints_of_pairs = check("decoded_prints", "float32", None, None)
    if prints_of_pairs.shape not in {(0, 0), (size, size)}:
        raise _misfit("decoded_prints")
    if codes.min() < 0 or codes.max() >= size:
        raise _misfit("codes")
    for name in ("temperature", "spread"):
        if arrays[name].min() < 0:
            raise _misfit(name)


def _checked(
    arrays: Mapping[str, NDArray[Any]], name: str, dtype: str, *shape: int | None
) -> NDArray[Any]:
    array = arrays.get(name, np.zeros(0))
    if array.dtype != dtype or array.ndim != len(shape):
        raise _misfit(name)
    if any(want not in {None, have} for have, want in zip(array.shape, shape, strict=True)):
        raise _misfit(name)
    return array


def _misfit(what: str) -> BundleError:
    return BundleError(f"{CASES_NAME}: {what} do not fit the bundle's policy; export again")
