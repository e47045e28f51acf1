"""Where observations enter: every one is checked before it touches the history.

The data contract:

    {
        "observation.image": uint8   (h, w, 3)                    a camera frame, RGB
                        or   float32 (3, h, w), values in [0, 1]  as LeRobot passes it
        ... one per camera, under the checkpoint's keys and of its own size ...
        "observation.state": float32 or float64 (S,), finite, in the robot's units
        ... or, under its own key, a goal like that; a policy may observe neither ...
    }

A leading batch axis of 1 is accepted. Other keys are ignored. A float32 frame is rounded to the 256
levels it came from.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqbet_edge.errors import ObservationError
from vqbet_edge.runtime.backends.base import Floats, Frames
from vqbet_edge.runtime.cameras import ImageShape
from vqbet_edge.runtime.guards.states import StateGuard
from vqbet_edge.runtime.manifest import Manifest
from vqbet_edge.runtime.normalization import Affine

Observation = Mapping[str, Any]

# Instances: comparing with a type makes one every time.
_UINT8, _FLOAT32 = np.dtype(np.uint8), np.dtype(np.float32)
_STATE_DTYPES = (_FLOAT32, np.dtype(np.float64))


class ObservationReader:
    """Checks observations and writes them, normalised, into the runtime's arrays."""

    def __init__(
        self, manifest: Manifest, state_scaling: Affine, states: StateGuard | None = None
    ) -> None:
        self._rows, self._columns = manifest.crop.rows, manifest.crop.columns
        # Key and shape of every camera, and where in `frames` its pixels go.
        self._cameras: list[tuple[str, ImageShape, tuple[int, slice, slice]]] = []
        for camera, (key, shape) in enumerate(manifest.image_shapes.items()):
            rows = slice(len(range(*self._rows.indices(shape[0]))))
            columns = slice(len(range(*self._columns.indices(shape[1]))))
            self._cameras.append((key, shape, (camera, rows, columns)))
        self._state_key, self._state_dim = manifest.state_key, manifest.state_dim
        self._keys = list(manifest.observation_shapes)
        self._scaling, self._states = state_scaling, states

    def read(self, observation: Observation, frames: Frames, state: Floats) -> None:
        """Write an observation into `frames` (K, H, W, 3), cropped, and `state` (S,).

        Of a smaller camera only the upper left corner of its frame is written.

        Raises:
            ObservationError: a feature is missing or not as the policy expects it; what was
                written until then is meaningless.
        """
        # After a pause the abstract class alone would take 80 microseconds.
        if type(observation) is not dict and not isinstance(observation, Mapping):
            raise ObservationError(
                f"expected a mapping with {self._keys}, got {type(observation).__name__}"
            )
        for key, shape, place in self._cameras:
            image = feature_array(observation, key, self._keys)
            self._read_image(key, shape, image, frames[place])
        if self._state_dim:
            self._read_state(feature_array(observation, self._state_key, self._keys), state)

    def _read_image(
        self, key: str, shape: ImageShape, image: NDArray[Any], out: NDArray[np.uint8]
    ) -> None:
        height, width, channels = shape
        if image.dtype == _UINT8 and _matches(image, (height, width, channels)):
            np.copyto(out, image[..., self._rows, self._columns, :])
        elif image.dtype == _FLOAT32 and _matches(image, (channels, height, width)):
            low, high = image.min(), image.max()
            # Written so that NaN fails too.
            if not (low >= 0 and high <= 1):
                raise ObservationError(
                    f"'{key}': expected float32 values in [0, 1], got {low} to {high}; "
                    "divide by 255, or pass uint8 (H, W, 3)"
                )
            levels = np.rint(image[..., self._rows, self._columns] * np.float32(255))
            np.copyto(out, np.moveaxis(levels, -3, -1), casting="unsafe")
        else:
            raise ObservationError(
                f"'{key}': expected uint8 {(height, width, channels)} or float32 "
                f"{(channels, height, width)} in [0, 1], got {image.dtype} {image.shape}"
                f"{resize_hint(image.shape, shape)}"
            )

    def _read_state(self, state: NDArray[Any], out: Floats) -> None:
        if state.dtype not in _STATE_DTYPES or not _matches(state, (self._state_dim,)):
            raise ObservationError(
                f"'{self._state_key}': expected float32 {(self._state_dim,)}, "
                f"got {state.dtype} {state.shape}"
            )
        if state.dtype == _FLOAT32:
            np.copyto(out, state)
        else:
            with np.errstate(over="ignore"):
                np.copyto(out, state, casting="same_kind")
        self._scaling.apply(out, out)
        # Of a few numbers, and in one piece of code instead of NumPy's three.
        if not all(map(math.isfinite, out.tolist())):
            raise ObservationError(
                f"'{self._state_key}': expected finite values, got {np.array2string(state)}"
            )
        if self._states is not None:
            self._states.check(state)


def _matches(array: NDArray[Any], shape: tuple[int, ...]) -> bool:
    return array.shape in (shape, (1, *shape))


def resize_hint(came: tuple[int, ...], expected: tuple[int, ...]) -> str:
    """What to do about a frame of another size; empty where it is no such frame."""
    channels = expected[-1]
    if len(came) != 3 or len(expected) != 3 or channels not in (came[0], came[-1]):
        return ""
    height, width = came[:2] if came[-1] == channels else came[1:]
    if (height, width) == expected[:2]:
        return ""
    return (
        f"; the policy was trained on {expected[0]}x{expected[1]} (height x width) and resizes "
        f"nothing, the camera gives {height}x{width}: resize its frames, on the robot, as those of "
        "the training data were"
    )


def feature_array(observation: Observation, key: str, keys: list[str]) -> NDArray[Any]:
    """The array under `key`, one of the expected `keys`; its type and shape are not checked.

    Raises:
        ObservationError: it is missing or no array.
    """
    value = observation.get(key)
    if value is None:
        raise ObservationError(
            f"'{key}' is None, expected an array; look at the driver that it comes from"
            if key in observation
            else f"'{key}' is missing: expected {keys}, got {sorted(map(str, observation))}"
        )
    # `__array__` lets tensors in without importing their library.
    if not isinstance(value, np.ndarray) and not hasattr(value, "__array__"):
        raise ObservationError(f"'{key}': expected a NumPy array, got {type(value).__name__}")
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise ObservationError(
            f"'{key}': expected an array of valid values, got one with masked values"
        )
    try:
        return np.asarray(value)
    except Exception as error:  # any: it is the array's own code
        raise ObservationError(
            f"'{key}' cannot be read as an array ({error}); "
            "of a tensor, pass tensor.detach().cpu().numpy()"
        ) from error
