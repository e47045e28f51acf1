"""Pictures that are changed at random while training: torchvision's, as LeRobot chooses them."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import adjust_sharpness

from vqbet_edge.training.config import ImageTransforms
from vqbet_edge.training.dataset.table import Indices

Transform: TypeAlias = Callable[[Tensor], Tensor]


class Augmentation:
    """Changes the pictures of a batch; what is drawn follows from seed, step and sample alone."""

    def __init__(self, config: ImageTransforms, seed: int) -> None:
        self._seed, self._random_order = seed, config.random_order
        self._transforms = _transforms(config)
        self._most = min(config.max_num_transforms, len(self._transforms))

    def __call__(self, images: Tensor, step: int, frames: Indices) -> Tensor:
        """uint8 (B, N, K, H, W, 3) -> the same; `frames` (B,) are the windows' current ones."""
        if not self._most:
            return images
        changed = torch.empty_like(images)
        # The device's random numbers are left alone: transforms draw on the processor.
        with torch.random.fork_rng(devices=[]):
            for row, frame in enumerate(frames.tolist()):
                torch.default_generator.manual_seed(hash((self._seed, step, frame)) % 2**63)
                for camera in range(images.shape[2]):
                    window = images[row, :, camera].movedim(-1, -3)  # (N, 3, H, W)
                    changed[row, :, camera] = self.change(window).movedim(-3, -1)
        return changed

    def change(self, window: Tensor) -> Tensor:
        """One sample's pictures (..., 3, H, W) of one camera, with torch's random numbers."""
        chosen = torch.multinomial(torch.ones(len(self._transforms)), self._most)
        order = chosen if self._random_order else chosen.sort().values
        for number in order.tolist():
            window = self._transforms[number](window)
        return window


def _transforms(config: ImageTransforms) -> list[Transform]:
    found: list[Transform] = [
        v2.ColorJitter(**{name: ends})
        for name in ("brightness", "contrast", "saturation", "hue")
        if (ends := getattr(config, name)) is not None
    ]
    if (sharpness := config.sharpness) is not None:
        low, high = sharpness

        def sharpen(window: Tensor) -> Tensor:
            factor = torch.empty(1).uniform_(low, high).item()
            sharpened: Tensor = adjust_sharpness(window, sharpness_factor=factor)
            return sharpened

        found.append(sharpen)
    if config.affine is not None:
        degrees, translate = config.affine
        found.append(v2.RandomAffine(degrees=degrees, translate=translate))
    return found
