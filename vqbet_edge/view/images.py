"""Frames as JPEG and PNG, by Pillow."""

import io
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

JPEG_QUALITY = 85


def encode(
    frame: NDArray[np.uint8], kind: Literal["jpeg", "png"], max_width: int | None = None
) -> bytes:
    """A frame (H, W, 3) as a file, shrunk to a width if it is wider; PNG keeps every value."""
    image = Image.fromarray(np.ascontiguousarray(frame))
    if max_width is not None and image.width > max_width:
        image = image.reduce(-(-image.width // max_width))
    buffer = io.BytesIO()
    image.save(buffer, kind, quality=JPEG_QUALITY)
    return buffer.getvalue()
