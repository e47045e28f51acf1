"""Camera messages as the frames that the policy was trained on: uint8 (H, W, 3), RGB."""

import functools
import io
import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vqbet_edge import ObservationError

Frame = NDArray[np.uint8]

_LOG = logging.getLogger(__name__)
# Encoding -> bytes per pixel, and which of them are red, green and blue.
_PIXELS: dict[str, tuple[int, list[int]]] = {
    "rgb8": (3, [0, 1, 2]),
    "bgr8": (3, [2, 1, 0]),
    "rgba8": (4, [0, 1, 2]),
    "bgra8": (4, [2, 1, 0]),
    "mono8": (1, [0, 0, 0]),
}
# Encoding -> bytes per pixel, rows per two rows of pixels, and OpenCV's conversion (BT.601).
_YUV: dict[str, tuple[int, int, str]] = {
    "yuyv": (2, 2, "COLOR_YUV2RGB_YUY2"),
    "yuv422_yuy2": (2, 2, "COLOR_YUV2RGB_YUY2"),
    "uyvy": (2, 2, "COLOR_YUV2RGB_UYVY"),
    "yuv422": (2, 2, "COLOR_YUV2RGB_UYVY"),
    "nv12": (1, 3, "COLOR_YUV2RGB_NV12"),
    "nv21": (1, 3, "COLOR_YUV2RGB_NV21"),
}
# Where a PNG says how many bits a number has.
_PNG_BITS = 24
ENCODINGS = (*_PIXELS, *_YUV)


def decode_image(message: Any, shape: tuple[int, int, int]) -> Frame:
    """The frame of a `sensor_msgs/Image`; rows may be padded to `step` bytes.

    Grey is taken as equal red, green and blue, as cv_bridge does, and that is said once. Numbers of
    16 bits are refused: nobody knows which of them are white.

    Args:
        message: with one of `ENCODINGS`, in whatever case; those of YUV take OpenCV.
        shape: (H, W, 3), as the policy wants it; nothing is resized.

    Raises:
        ObservationError: the encoding, the size or the number of bytes is another.
    """
    encoding = message.encoding.lower()
    _check_size(message.height, message.width, shape)
    if encoding in _YUV:
        depth, rows, conversion = _YUV[encoding]
        packed = _rows(message, message.height * rows // 2, depth)
        return _from_yuv(packed.reshape(*packed.shape[:1], message.width, -1), conversion)
    if encoding not in _PIXELS:
        raise ObservationError(
            f"expected an encoding of {list(ENCODINGS)}, got {message.encoding!r}; choose one in "
            "the camera's driver, or convert with image_proc"
        )
    depth, order = _PIXELS[encoding]
    if depth == 1:
        _say_grey()
    pixels = _rows(message, message.height, depth)
    return np.ascontiguousarray(pixels.reshape(message.height, message.width, depth)[..., order])


def _rows(message: Any, count: int, depth: int) -> Frame:
    """uint8 (count, width * depth), without what rows are padded with."""
    data = np.frombuffer(message.data, np.uint8)
    row = message.width * depth
    if message.step < row or len(data) != count * message.step:
        raise ObservationError(
            f"expected {count} rows of {row} bytes or more, got a step of {message.step} "
            f"and {len(data)} bytes; the camera's driver sends damaged frames"
        )
    return data.reshape(count, message.step)[:, :row]


def _from_yuv(packed: Frame, conversion: str) -> Frame:
    # Not a dependency of those whose cameras send colours.
    try:
        import cv2  # noqa: PLC0415
    except ImportError as error:
        raise ObservationError(
            f"YUV takes OpenCV to convert ({error}): sudo apt install python3-opencv, or choose "
            "rgb8 in the camera's driver"
        ) from error
    try:
        found = cv2.cvtColor(np.ascontiguousarray(packed), getattr(cv2, conversion))
    except cv2.error as error:
        raise ObservationError(f"expected an even width and height: {error}") from error
    return np.asarray(found, np.uint8)


@functools.cache
def _say_grey() -> None:
    _LOG.warning(
        "a camera's frames are grey: red, green and blue are taken as equal, which is right only "
        "if they were in the demonstrations"
    )


def decode_compressed(message: Any, shape: tuple[int, int, int]) -> Frame:
    """The frame of a `sensor_msgs/CompressedImage`, JPEG or PNG; transparency is left out.

    Raises:
        ObservationError: it cannot be decoded, or has another size.
    """
    # Not a dependency of those who have raw images.
    from PIL import Image  # noqa: PLC0415

    try:
        with Image.open(io.BytesIO(message.data), formats=("JPEG", "PNG")) as image:
            # The header's size, before anything of that size is allocated.
            _check_size(image.height, image.width, shape)
            # Pillow takes the upper half of 16 bits of colour, and says 8.
            bits = message.data[_PNG_BITS] if image.format == "PNG" else 8
            if image.mode not in {"RGB", "RGBA", "L", "LA"} or bits > 8:
                raise ObservationError(
                    f"expected 8 bits of colour or grey, got {bits} bits of {image.mode}"
                )
            if image.mode.startswith("L"):
                _say_grey()
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
