"""Frames of all cameras in one array, whatever their sizes.

Every frame stands in the upper left corner of an area that is as high as the highest of them and as
wide as the widest; what is left of it is zero, and no graph looks there.

Letters in shapes: K cameras, H and W height and width of the area, h and w those of a camera.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Scalar = TypeVar("Scalar", bound=np.generic)
ImageShape = tuple[int, int, int]  # (h, w, 3)


def pack_frames(images: Sequence[NDArray[Scalar]]) -> NDArray[Scalar]:
    """One array (..., h, w, 3) per camera -> (..., K, H, W, 3)."""
    *leading, _, _, channels = images[0].shape
    height, width = (max(image.shape[axis] for image in images) for axis in (-3, -2))
    packed = np.zeros((*leading, len(images), height, width, channels), images[0].dtype)
    for camera, image in enumerate(images):
        packed[..., camera, : image.shape[-3], : image.shape[-2], :] = image
    return packed


def unpack_frames(
    frames: NDArray[Scalar], shapes: Mapping[str, ImageShape]
) -> dict[str, NDArray[Scalar]]:
    """(..., K, H, W, 3) -> by key (..., h, w, 3), as views; `shapes` are in the cameras' order."""
    return {
        key: frames[..., camera, :height, :width, :]
        for camera, (key, (height, width, _)) in enumerate(shapes.items())
    }
