"""Multiplying out what is affine before anything is exported."""

import copy
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class AffineMap(NamedTuple):
    """`y = weight @ x + bias`, weight (out, in), bias (out,)."""

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, layer: nn.Module) -> "AffineMap":
        """The map of a linear layer, a missing bias as zeros."""
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"expected a linear layer, got {type(layer).__name__}")
        bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias
        return cls(layer.weight.detach(), bias.detach())

    def after(self, first: "AffineMap") -> "AffineMap":
        """`self(first(x))`, multiplied out in float64."""
        weight, bias = self.weight.double(), self.bias.double()
        folded = weight @ first.weight.double()
        shift = weight @ first.bias.double() + bias
        return AffineMap(folded.float(), shift.float())

    def layer(self, dtype: torch.dtype) -> nn.Linear:
        """A linear layer that computes the map in `dtype`."""
        layer = nn.Linear(self.weight.shape[1], self.weight.shape[0], dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(self.weight)
            layer.bias.copy_(self.bias)
        return layer


def fold_batch_norms(backbone: nn.Module) -> nn.Module:
    """A copy of a ResNet with every BatchNorm folded into the convolution before it.

    In torchvision's ResNets a norm directly follows its convolution among its siblings.
    """
    folded = copy.deepcopy(backbone).eval()
    for parent in list(folded.modules()):
        for (conv_name, conv), (norm_name, norm) in pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, conv_name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())
    return folded
