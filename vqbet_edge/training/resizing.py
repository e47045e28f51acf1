"""Making images smaller: what training keeps, what the network does and what a graph computes."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

Size = tuple[int, int]  # (height, width)


def shrink(images: Tensor, size: Size) -> Tensor:
    """(B, 3, H, W) -> (B, 3, *size) without aliasing; images of that size stay as they are.

    Averages over whole pixels first and interpolates the rest, because every inference engine has
    these two operators, and none has an antialiased resize.
    """
    if images.shape[-2:] == size:
        return images
    factors = [have // want for have, want in zip(images.shape[-2:], size, strict=True)]
    if max(factors) > 1:
        images = F.avg_pool2d(images, factors)
    return F.interpolate(images, size, mode="bilinear", align_corners=False)


def shrink_cameras(images: Tensor, sizes: Sequence[Size], size: Size) -> Tensor:
    """(B, K, 3, H, W) -> (B, K, 3, *size): every camera's frame cut out, and shrunk.

    Args:
        images: what `pack_frames` made; images of the wanted size stay as they are.
        sizes: of every camera's frame.
        size: to shrink them to.
    """
    if images.shape[-2:] == size:
        return images
    frames = (images[:, k, :, :height, :width] for k, (height, width) in enumerate(sizes))
    return torch.stack([shrink(frame, size) for frame in frames], dim=1)


def shrink_frames(frames: NDArray[np.uint8], size: Size) -> NDArray[np.uint8]:
    """uint8 (T, H, W, 3) -> uint8 (T, *size, 3), rounded to the nearest level."""
    images = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    levels = shrink(images, size).round().to(torch.uint8)
    shrunk: NDArray[np.uint8] = levels.permute(0, 2, 3, 1).contiguous().numpy()
    return shrunk
