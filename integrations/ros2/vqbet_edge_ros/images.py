"""Camera messages as the frames that the policy was trained on: uint8 (H, W, 3), RGB."""

import io
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vqbet_edge import ObservationError

Frame = NDArray[np.uint8]

# Encoding -> bytes per pixel, and which of them are red, green and blue.
_ENCODINGS: dict[str, tuple[int, list[int]]] = {
    "rgb8": (3, [0, 1, 2]),
    "bgr8": (3, [2, 1, 0]),
    "rgba8": (4, [0, 1, 2]),
    "bgra8": (4, [2, 1, 0]),
    "mono8": (1, [0, 0, 0]),
}


class ImageMessage(Protocol):
    """What is read of `sensor_msgs/Image`; rows may be padded to `step` bytes."""

    height: int
    width: int
    encoding: str
    step: int
    data: Any


class CompressedMessage(Protocol):
    """What is read of `sensor_msgs/CompressedImage`."""

    format: str
    data: Any


def decode_image(message: ImageMessage, shape: tuple[int, int, int]) -> Frame:
    """The frame of an Image.

    Args:
        message: with one of the encodings rgb8, bgr8, rgba8, bgra8 and mono8.
        shape: (H, W, 3), as the policy wants it; nothing is resized.

    Raises:
        ObservationError: the encoding, the size or the number of bytes is another.
    """
    if message.encoding not in _ENCODINGS:
        raise ObservationError(
            f"expected an encoding of {sorted(_ENCODINGS)}, got {message.encoding!r}; choose one "
            "in the camera's driver, or convert with image_proc"
        )
    depth, order = _ENCODINGS[message.encoding]
    _check_size(message.height, message.width, shape)
    data = np.frombuffer(message.data, np.uint8)
    row = message.width * depth
    if message.step < row or len(data) != message.height * message.step:
        raise ObservationError(
            f"expected {message.height} rows of {row} bytes or more, got a step of {message.step} "
            f"and {len(data)} bytes; the camera's driver sends damaged frames"
        )
    pixels = data.reshape(message.height, message.step)[:, :row]
    return np.ascontiguousarray(pixels.reshape(message.height, message.width, depth)[..., order])


def decode_compressed(message: CompressedMessage, shape: tuple[int, int, int]) -> Frame:
    """The frame of a CompressedImage, JPEG or PNG, with Pillow.

    Raises:
        ObservationError: it cannot be decoded, or has another size.
    """
    # Not a dependency of those who have raw images.
    from PIL import Image  # noqa: PLC0415

    try:
        with Image.open(io.BytesIO(message.data), formats=("JPEG", "PNG")) as image:
            # The header's size, before anything of that size is allocated.
            _check_size(image.height, image.width, shape)
            if image.mode not in {"RGB", "L"}:
                raise ObservationError(f"expected 8 bits of colour or grey, got {image.mode}")
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ObservationError(
            f"expected a JPEG or PNG, got {len(message.data)} bytes of {message.format!r}: {error}"
        ) from error


def _check_size(height: int, width: int, shape: tuple[int, int, int]) -> None:
    if (height, width) != shape[:2]:
        raise ObservationError(
            f"expected {shape[1]}x{shape[0]} pixels, got {width}x{height}; set the camera's "
            "resolution to that of the training data, or resize with image_proc"
        )
