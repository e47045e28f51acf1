"""Image encoder: ResNet, spatial softmax, one linear layer.

Spatial softmax: "Deep Spatial Autoencoders for Visuomotor Learning", section IV; LeRobot's
`VQBeTRgbEncoder` is the reference for the arrangement.
"""

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock
from torchvision.transforms.v2 import CenterCrop, RandomCrop

from vqbet_edge.model.config import BACKBONE_CHANNELS, VQBeTConfig

# A ResNet halves the image five times, rounding up; the small one three times, so that an image of
# 64x64 still has a map of 8x8 to find keypoints in.
BACKBONE_STRIDE, SMALL_STRIDE = 32, 8


def pixel_grid(height: int, width: int) -> Tensor:
    """Coordinates of a feature map's cells, row by row.

    Returns:
        float32 (height * width, 2): x and y in [-1, 1].
    """
    # float64 as in the reference: in float32 linspace's last bits differ.
    ys = torch.linspace(-1.0, 1.0, height, dtype=torch.float64)
    xs = torch.linspace(-1.0, 1.0, width, dtype=torch.float64)
    if height == 1:
        ys = torch.tensor([-1.0], dtype=torch.float64)
    if width == 1:
        xs = torch.tensor([-1.0], dtype=torch.float64)
    y, x = torch.meshgrid(ys, xs, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], dim=1).float()


class SpatialSoftmax(nn.Module):
    """Expected image coordinates of `num_keypoints` learned heat maps."""

    pos_grid: Tensor

    def __init__(self, channels: int, height: int, width: int, num_keypoints: int) -> None:
        super().__init__()
        self.nets = nn.Conv2d(channels, num_keypoints, kernel_size=1)
        self.register_buffer("pos_grid", pixel_grid(height, width))

    def forward(self, features: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, num_keypoints, 2), x and y in [-1, 1]."""
        heat = self.nets(features).flatten(2)  # (B, K, H * W)
        expected: Tensor = heat.softmax(dim=-1) @ self.pos_grid
        return expected


def shrink(images: Tensor, shape: tuple[int, int]) -> Tensor:
    """(B, 3, H, W) -> (B, 3, *shape) without aliasing.

    Averages over whole pixels first and interpolates the rest, because every inference engine has
    these two operators, and none has an antialiased resize.
    """
    factors = [have // want for have, want in zip(images.shape[-2:], shape, strict=True)]
    if max(factors) > 1:
        images = F.avg_pool2d(images, factors)
    return F.interpolate(images, shape, mode="bilinear", align_corners=False)


def build_backbone(config: VQBeTConfig) -> nn.Sequential:
    """A torchvision ResNet up to its last feature map, children numbered as in LeRobot."""
    norm = _group_norm if config.use_group_norm else nn.BatchNorm2d
    if config.vision_backbone == "resnet10_small":
        return _small_backbone(norm)
    resnet = torchvision.models.get_model(
        config.vision_backbone, weights=config.pretrained_backbone_weights, norm_layer=norm
    )
    return nn.Sequential(*list(resnet.children())[:-2])


def _small_backbone(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    """ResNet-10 at a quarter of the usual width and less, its last stages at full resolution."""
    width = 16
    layers: list[nn.Module] = [
        # A stride of 4 instead of 2 and a pooling: most of a ResNet's time goes into its stem.
        nn.Conv2d(3, width, kernel_size=7, stride=4, padding=3, bias=False),
        norm(width),
        nn.ReLU(inplace=True),
        nn.Identity(),
    ]
    fan_in = width
    for fan_out, stride in ((width, 1), (2 * width, 2), (2 * width, 1), (4 * width, 1)):
        shortcut = nn.Sequential(nn.Conv2d(fan_in, fan_out, 1, stride, bias=False), norm(fan_out))
        same = stride == 1 and fan_in == fan_out
        block = BasicBlock(fan_in, fan_out, stride, None if same else shortcut, norm_layer=norm)
        layers.append(nn.Sequential(block))
        fan_in = fan_out
    backbone = nn.Sequential(*layers)
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return backbone


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=channels // 16, num_channels=channels)


class RgbEncoder(nn.Module):
    """One camera frame -> one feature vector of 2 x `spatial_softmax_num_keypoints`."""

    def __init__(self, config: VQBeTConfig) -> None:
        super().__init__()
        self.resize_shape = config.resize_shape
        size = None if config.crop_shape is None else list(config.crop_shape)
        self.center_crop = nn.Identity() if size is None else CenterCrop(size)
        random = config.crop_is_random and size is not None
        self.random_crop = RandomCrop(cast("list[int]", size)) if random else self.center_crop
        self.backbone = build_backbone(config)
        small = config.vision_backbone == "resnet10_small"
        stride = SMALL_STRIDE if small else BACKBONE_STRIDE
        height, width = (-(-side // stride) for side in config.encoder_shape)
        keypoints = config.spatial_softmax_num_keypoints
        channels = BACKBONE_CHANNELS[config.vision_backbone]
        self.pool = SpatialSoftmax(channels, height, width, keypoints)
        self.feature_dim = 2 * keypoints
        self.out = nn.Linear(self.feature_dim, self.feature_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Encode images of the configured size.

        Args:
            images: (B, 3, H, W) in [0, 1], normalised as the checkpoint asks.

        Returns:
            (B, feature_dim), not negative.
        """
        if self.resize_shape is not None:
            images = shrink(images, self.resize_shape)
        crop = self.random_crop if self.training else self.center_crop
        keypoints = self.pool(self.backbone(crop(images)))
        return torch.relu(self.out(keypoints.flatten(1)))
