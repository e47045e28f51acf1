"""The openpi protocol's frames: MessagePack with NumPy arrays as maps.

An array is the map {b"__ndarray__": True, b"data": bytes, b"dtype": NumPy's code, b"shape": [...]}
with binary keys (`openpi_client.msgpack_numpy`). Nothing in a frame is code, and nothing reaches
NumPy before its type, its shape and its number of bytes agree.
"""

import math
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from vqbet_edge.errors import ObservationError, VQBeTEdgeError

#: Types that an observation's arrays may have.
DTYPES = {code: np.dtype(code) for code in ("|u1", "<f4", "<f8")}
_MAX_AXES = 8
_ENCODER = msgspec.msgpack.Encoder()


class FrameError(VQBeTEdgeError):
    """A frame that is no request, or no answer."""


def pack(message: Mapping[str, Any]) -> bytes:
    """A frame; arrays, numbers, texts and maps of them."""
    return _ENCODER.encode(_plain(message))


def _plain(value: Any) -> Any:  # noqa: ANN401 - whatever a message holds
    match value:
        case np.ndarray():
            return {
                b"__ndarray__": True,
                b"data": value.tobytes(),
                b"dtype": value.dtype.str,
                b"shape": value.shape,
            }
        case Mapping():
            return {key: _plain(child) for key, child in value.items()}
        case _:
            return value


def unpack(frame: bytes) -> dict[str, Any]:
    """The map in a frame, its arrays still maps; `array` makes them arrays.

    Raises:
        FrameError: it is no MessagePack map with texts as keys.
    """
    try:
        return msgspec.msgpack.decode(frame, type=dict[str, Any])
    # RecursionError: maps in maps without end; UnicodeDecodeError: bytes that are no text.
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise FrameError(f"expected a MessagePack map of an observation, got {error}") from error


def array(key: str, value: Any) -> NDArray[Any]:  # noqa: ANN401 - whatever a frame holds
    """An array of a frame, as a read-only view of its bytes.

    Raises:
        ObservationError: it is none, or its parts contradict each other.
    """
    if not isinstance(value, dict) or value.get(b"__ndarray__") is not True:
        raise ObservationError(f"'{key}': expected an array, got {type(value).__name__}")
    data, code, shape = (value.get(part) for part in (b"data", b"dtype", b"shape"))
    if not isinstance(code, str) or code not in DTYPES:
        raise ObservationError(f"'{key}': expected dtype {', '.join(DTYPES)}, got {str(code)[:40]!r}")
    if (
        not isinstance(shape, list)
        or len(shape) > _MAX_AXES
        or any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in shape)
    ):
        raise ObservationError(f"'{key}': expected a shape of at most {_MAX_AXES} lengths")
    expected = math.prod(shape) * DTYPES[code].itemsize
    if not isinstance(data, bytes) or len(data) != expected:
        raise ObservationError(
            f"'{key}': expected {expected} bytes for {code} {tuple(shape)}, got "
            f"{len(data) if isinstance(data, bytes) else type(data).__name__}"
        )
    return np.frombuffer(data, DTYPES[code]).reshape(shape)
