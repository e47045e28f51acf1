"""The VQ-BeT of Robot Utility Models and of Contact-Anchored Policies in PyTorch.

Read at haritheja-e/robot-utility-models 82c4691 (Etukuru et al., arXiv 2409.05865) and
jeffacce/cap-policy 8ab1117 (arXiv 2602.09017): `TimmSSL`, `VQBeTLossFn`, `VQBehaviorTransformer`,
`VqVae` and `GPT` of their `imitation-in-homes`. Their GPT is nanoGPT's, as LeRobot's is, so both
share it, but for the tanh approximation of its GELU.

From top to bottom: the picture, the ResNet, the decoder of codes, the heads, the whole network.

Letters in shapes: B batch, N window, E width of an encoded frame, G of a goal, F `gpt_output_dim`,
C codes per layer, W actions per chunk, A action width.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from vqbet_edge.training.config import (
    ACTION_KEY,
    NUM_CODE_LAYERS,
    Feature,
    FeatureType,
)
from vqbet_edge.training.network import GPT, PairDecoder, mlp

IMAGE_KEY, GOAL_KEY = "observation.image", "observation.goal"
# What their cameras send, and what is left of it for the encoder.
CAMERA_SIZE, ENCODER_SIZE = 256, 224
# Of ImageNet, which timm's encoders expect.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What their run configurations sample codes at, whatever the training's was: greedy but for ties.
RUN_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class ResNetSizes:
    """A ResNet: blocks and width of every stage, and width of the stem."""

    stem: int
    blocks: tuple[int, ...]
    widths: tuple[int, ...]
    bottleneck: bool


@dataclass(frozen=True)
class NyuConfig:
    """A policy's architecture; names that LeRobot has too are its names.

    Attributes:
        resnet: the encoder.
        bicubic: whether frames are shrunk to the encoder's size, as Contact-Anchored Policies are;
            otherwise their centre is cut out.
        goal_dim: G, 0 without a goal.
        obs_width: E.
        latent: width of a code vector.
        decoder_widths: of the code decoder's hidden layers; likewise those of the heads.
    """

    resnet: ResNetSizes
    bicubic: bool
    goal_dim: int
    obs_width: int
    goal_width: int
    action_dim: int
    n_obs_steps: int
    vqvae_n_embed: int
    latent: int
    decoder_widths: tuple[int, ...]
    primary_widths: tuple[int, ...]
    secondary_widths: tuple[int, ...]
    offset_widths: tuple[int, ...]
    gpt_hidden_dim: int
    gpt_output_dim: int
    gpt_n_layer: int
    gpt_n_head: int
    gpt_block_size: int
    action_chunk_size: int = 1
    tokens_per_step: int = 1
    bet_softmax_temperature: float = RUN_TEMPERATURE
    sequentially_select: bool = True
    relative_actions: tuple[bool, ...] = ()
    dropout: float = 0.0
    encoder_shape: tuple[int, int] = field(default=(ENCODER_SIZE, ENCODER_SIZE))

    @property
    def input_features(self) -> dict[str, Feature]:
        """One camera, and the goal if there is one."""
        frame = Feature(FeatureType.VISUAL, (3, CAMERA_SIZE, CAMERA_SIZE))
        goal = {GOAL_KEY: Feature(FeatureType.ENV, (self.goal_dim,))} if self.goal_dim else {}
        return {IMAGE_KEY: frame, **goal}

    @property
    def output_features(self) -> dict[str, Feature]:
        """The action."""
        return {ACTION_KEY: Feature(FeatureType.ACTION, (self.action_dim,))}

    @property
    def resize_shape(self) -> tuple[int, int] | None:
        """(height, width) that frames are shrunk to, if they are."""
        return self.encoder_shape if self.bicubic else None

    @property
    def gpt_input_dim(self) -> int:
        """Width of what enters the transformer: the goal's part, then the frame's."""
        return self.goal_width + self.obs_width


# ---- The picture and the ResNet: `decord_transforms.create_transform`, `TimmSSL`.


class ResNet(nn.Module):
    """torchvision's and timm's ResNet without its last layer, of any widths."""

    def __init__(self, sizes: ResNetSizes) -> None:
        super().__init__()
        block: type[BasicBlock | Bottleneck] = Bottleneck if sizes.bottleneck else BasicBlock
        self.conv1 = nn.Conv2d(3, sizes.stem, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(sizes.stem)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        fan_ins = (sizes.stem, *(width * block.expansion for width in sizes.widths))
        for i, (blocks, width) in enumerate(zip(sizes.blocks, sizes.widths, strict=True)):
            stage = _stage(block, fan_ins[i], width, blocks, stride=1 if i == 0 else 2)
            self.add_module(f"layer{i + 1}", stage)
        self.feature_dim = fan_ins[-1]

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), normalised -> (B, feature_dim)."""
        maps: Tensor = images
        for module in self.children():
            maps = module(maps)
        # A pooling of the whole map, which every backend has, instead of a mean.
        return F.avg_pool2d(maps, maps.shape[-2:]).flatten(1)


def _stage(
    block: type[BasicBlock | Bottleneck], fan_in: int, width: int, blocks: int, stride: int
) -> nn.Sequential:
    out, shortcut = width * block.expansion, None
    if stride != 1 or fan_in != out:
        projection = nn.Conv2d(fan_in, out, kernel_size=1, stride=stride, bias=False)
        shortcut = nn.Sequential(projection, nn.BatchNorm2d(out))
    first = block(fan_in, width, stride, shortcut)
    return nn.Sequential(first, *(block(out, width) for _ in range(blocks - 1)))


# ---- The decoder of codes: `VqVae`, whose encoder only training needs.


class CodeDecoder(PairDecoder):
    """Code pair -> action."""

    def __init__(self, config: NyuConfig) -> None:
        super().__init__()
        self.chunk_shape = (config.action_chunk_size, config.action_dim)
        self.codebooks = nn.ParameterList(
            torch.zeros(config.vqvae_n_embed, config.latent) for _ in range(NUM_CODE_LAYERS)
        )
        self.decoder = mlp(config.latent, *config.decoder_widths, math.prod(self.chunk_shape))

    @property
    def code_vectors(self) -> list[Tensor]:
        """See `PairDecoder`."""
        return list(self.codebooks)


# ---- The heads: `VQBehaviorTransformer`.


class Heads(nn.Module):
    """Feature -> logits of both layers' codes, offsets of every code."""

    sequential = True

    def __init__(self, config: NyuConfig) -> None:
        super().__init__()
        width, codes = config.gpt_output_dim, config.vqvae_n_embed
        self.num_codes = codes
        self.offset_shape = (NUM_CODE_LAYERS, codes, config.action_chunk_size, config.action_dim)
        self.vqvae_model = CodeDecoder(config)
        self.primary = mlp(width, *config.primary_widths, codes)
        self.secondary = mlp(width + codes, *config.secondary_widths, codes)
        self.offset = mlp(width, *config.offset_widths, math.prod(self.offset_shape))

    def code_logits(self, features: Tensor, primary: Tensor | None = None) -> Tensor:
        """(..., F), int64 (...) -> (..., 2, C), the secondary ones given the primary codes.

        Without those, the most probable ones.
        """
        logits = self.primary(features)
        chosen = F.one_hot(logits.argmax(dim=-1) if primary is None else primary, self.num_codes)
        given = torch.cat([features, chosen.to(features.dtype)], dim=-1)
        return torch.stack([logits, self.secondary(given)], dim=-2)

    def offsets(self, features: Tensor) -> Tensor:
        """(..., F) -> (..., 2, C, W, A)."""
        flat: Tensor = self.offset(features)
        return flat.view(*features.shape[:-1], *self.offset_shape)


# ---- The whole: `VQBeTLossFn._step` behind `WrapperPolicy.step`.


class NyuVQBeT(nn.Module):
    """The policy network."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: NyuConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1), persistent=False)
        self.encoder = ResNet(config.resnet)
        self.obs_adapter = nn.Linear(self.encoder.feature_dim, config.obs_width, bias=False)
        self.goal_adapter: nn.Linear | None = None
        if config.goal_dim:
            self.goal_adapter = nn.Linear(config.goal_dim, config.goal_width, bias=False)
        self.gpt = GPT(config, gelu="tanh")
        self.head = Heads(config)

    def forward(self, images: Tensor, goals: Tensor) -> Tensor:
        """(B, N, 1, 3, H, W) in [0, 1], (B, N, G) -> (B, N, F); step N - 1 is the current one."""
        return self.features(self.encode_images(images), goals)

    def crop(self, frames: Tensor) -> Tensor:
        """(..., H, W) -> their centre, or all where they are shrunk."""
        if self.config.bicubic:
            return frames
        edge = round((CAMERA_SIZE - ENCODER_SIZE) / 2)
        return frames[..., edge : edge + ENCODER_SIZE, edge : edge + ENCODER_SIZE]

    def encode_images(self, images: Tensor) -> Tensor:
        """(B, N, 1, 3, H, W) in [0, 1], cropped -> (B, N, 1, E)."""
        flat = images.flatten(0, 2)
        if self.config.bicubic:
            flat = F.interpolate(flat, self.config.encoder_shape, mode="bicubic", antialias=False)
        features = self.obs_adapter(self.encoder((flat - self.mean) / self.std))
        encoded: Tensor = features.view(*images.shape[:3], -1)
        return encoded

    def features(self, image_tokens: Tensor, goals: Tensor) -> Tensor:
        """(B, N, 1, E) and (B, N, G) -> (B, N, F)."""
        tokens = image_tokens[:, :, 0]
        if self.goal_adapter is not None:
            tokens = torch.cat([self.goal_adapter(goals), tokens], dim=-1)
        features: Tensor = self.gpt(tokens)
        return features

    def embed(self, image_tokens: Tensor) -> Tensor:
        """(..., E) -> (..., gpt_hidden_dim): frames as the GPT's blocks take them."""
        embedding = self.gpt.transformer["wte"]
        assert isinstance(embedding, nn.Linear)  # noqa: S101 - it is made above
        return F.linear(image_tokens, embedding.weight[:, self.config.goal_width :], embedding.bias)

    def places(self) -> Tensor:
        """(N, 1, gpt_hidden_dim): the positions."""
        places: Tensor = self.gpt.transformer["wpe"](torch.arange(self.config.n_obs_steps))
        return places[:, None]
