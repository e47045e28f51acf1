"""Configuration of the network, under LeRobot's field names and defaults."""

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgspec
import numpy as np
import tyro
from msgspec import Meta

from vqbet_edge.errors import CheckpointError, DatasetError, UsageError
from vqbet_edge.training.dataset import LeRobotDataset

STATE_KEY = "observation.state"
ACTION_KEY = "action"

Share = Annotated[float, Meta(ge=0, lt=1)]
NotNegative = Annotated[float, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
Count = Annotated[int, Meta(ge=1)]
Turn = Annotated[float, Meta(ge=-0.5, le=0.5)]


# What a backbone makes of an image: a map with so many channels, smaller by the stride.
BACKBONES = {
    # A map of 8x8 is left of an image of 64x64 to find keypoints in.
    "resnet10_small": (64, 8),
    "resnet18": (512, 32),
    "resnet34": (512, 32),
    "resnet50": (2048, 32),
    "resnet101": (2048, 32),
    "resnet152": (2048, 32),
}
NUM_CODE_LAYERS = 2
# A random crop with less than this share of a side is warned of.
SMALL_CROP = 0.7


class FeatureType(str, Enum):
    """What a feature is, as LeRobot names it."""

    VISUAL = "VISUAL"
    STATE = "STATE"
    ENV = "ENV"
    ACTION = "ACTION"


class NormalizationMode(str, Enum):
    """How a feature is scaled, as LeRobot names it."""

    IDENTITY = "IDENTITY"
    MIN_MAX = "MIN_MAX"
    MEAN_STD = "MEAN_STD"
    QUANTILES = "QUANTILES"
    QUANTILE10 = "QUANTILE10"


@dataclass(frozen=True)
class Feature:
    """One input or output; its shape is (3, height, width) of images, else (dim,)."""

    type: FeatureType
    shape: tuple[int, ...]


def _plain(value: Any) -> Any:  # noqa: ANN401
    match value:
        case os.PathLike():
            return os.fspath(value)
        case np.generic() | np.ndarray():
            return _plain(value.tolist())
        case Enum():
            return value.value
        case float() if not math.isfinite(value):
            raise TypeError("Expected a finite number")
        case dict():
            return {key: _plain(each) for key, each in value.items()}
        case list() | tuple():
            return [_plain(each) for each in value]
        case _:
            return value


def _decode(kind: type[Any], value: Any) -> Any:  # noqa: ANN401
    if kind is not Path or not isinstance(value, str):
        raise TypeError(f"Expected a path, got `{type(value).__name__}`")
    return Path(value)


def convert_fields(config: Any, prefix: str = "") -> None:  # noqa: ANN401
    """Give every field of a frozen dataclass its type: texts are paths and modes, lists tuples.

    Args:
        config: the dataclass.
        prefix: what the command line has before its fields' names.

    Raises:
        UsageError: names the field and what it takes.
    """
    for name, kind in get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, name)
        if value is tyro.MISSING:  # the command line still asks for it
            continue
        try:
            if isinstance(value, dict) and isinstance(kind, type) and is_dataclass(kind):
                value = kind(**value)  # refuses names that it does not know
            converted = msgspec.convert(_plain(value), kind, dec_hook=_decode)
        except (msgspec.ValidationError, TypeError) as error:
            spelled = flag(prefix + name)
            raise UsageError(f"{name} ({spelled}): {error}; got {value!r}") from error
        object.__setattr__(config, name, converted)


@dataclass(frozen=True)
class Hyperparameters:
    """What a person chooses about a VQ-BeT policy, under LeRobot's names and defaults."""

    # By type of feature: IDENTITY, MIN_MAX, MEAN_STD, QUANTILES (1 % and 99 %) or QUANTILE10.
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.MIN_MAX,
            "ACTION": NormalizationMode.MIN_MAX,
        }
    )

    # Observations in the window.
    n_obs_steps: Count = 5
    # Action queries from the current step on.
    n_action_pred_token: Count = 3
    # Actions that one code pair stands for, executed before the next prediction.
    action_chunk_size: Count = 5
    # Predict distances from the state that an observation shows instead of positions.
    use_relative_actions: bool = False
    # Actions with one of these in their names stay positions.
    relative_exclude_joints: tuple[str, ...] = ("gripper",)

    # A torchvision ResNet, or resnet10_small, a narrow one for small images and processors.
    vision_backbone: Annotated[str, tyro.conf.arg(metavar="NAME")] = "resnet18"
    # (height, width) to shrink images of any size to, before the crop; LeRobot never resizes.
    resize_shape: tuple[int, int] | None = None
    # (height, width) of the crop that the backbone sees.
    crop_shape: tuple[int, int] | None = (84, 84)
    # Crop at random places while training; always the centre at evaluation.
    crop_is_random: bool = True
    # Name of torchvision's pretrained weights; None trains from scratch.
    pretrained_backbone_weights: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
    # GroupNorm instead of BatchNorm in the backbone.
    use_group_norm: bool = True
    # Keypoints of the spatial softmax behind the backbone.
    spatial_softmax_num_keypoints: Count = 32

    # Optimisation steps of phase 1, the residual VQ-VAE.
    n_vqvae_training_steps: int = 20000
    # Codes in each of the two layers.
    vqvae_n_embed: Count = 16
    # Width of a code vector.
    vqvae_embedding_dim: Count = 256
    # Width of the VQ-VAE's hidden layers.
    vqvae_enc_hidden_dim: Count = 128

    # Most tokens that the transformer can see.
    gpt_block_size: Count = 500
    # Width of the tokens.
    gpt_input_dim: Count = 512
    # Width of the features that the heads see.
    gpt_output_dim: Count = 512
    # Transformer blocks.
    gpt_n_layer: Count = 8
    # Attention heads.
    gpt_n_head: Count = 8
    # Width inside the transformer.
    gpt_hidden_dim: Count = 512
    # Dropout in the transformer.
    dropout: Share = 0.1

    # Weight of the offsets' L1 loss.
    offset_loss_weight: NotNegative = 10000.0
    # Weight of the primary code's focal loss.
    primary_code_loss_weight: NotNegative = 5.0
    # Weight of the secondary code's focal loss.
    secondary_code_loss_weight: NotNegative = 0.5
    # Temperature that codes are sampled with.
    bet_softmax_temperature: Positive = 0.1
    # Choose the secondary code knowing the primary one, instead of both at once.
    sequentially_select: bool = False


@dataclass(frozen=True, kw_only=True)
class VQBeTConfig(Hyperparameters):
    """A policy's architecture ("Behavior Generation with Latent Actions", section 3).

    Raises:
        CheckpointError: the fields contradict each other or are not VQ-BeT's.
    """

    # Features by LeRobot's keys; the cameras in this order, of one shape unless they are resized.
    input_features: dict[str, Feature]
    output_features: dict[str, Feature]
    # Of every action, as the data set has them; empty where it has none.
    action_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        try:
            convert_fields(self)
        except UsageError as error:
            raise CheckpointError(str(error)) from error
        _check_features(self)
        _check_vision(self)
        _check_sizes(self)

    @property
    def image_keys(self) -> tuple[str, ...]:
        """Keys of the cameras, in token order."""
        return tuple(k for k, f in self.input_features.items() if f.type is FeatureType.VISUAL)

    @property
    def image_sizes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of every camera before resize and crop, in token order."""
        shapes = (self.input_features[key].shape for key in self.image_keys)
        return tuple((height, width) for _, height, width in shapes)

    @property
    def cameras_differ(self) -> bool:
        """Whether the cameras are of several sizes."""
        return len(set(self.image_sizes)) > 1

    @property
    def frame_size(self) -> tuple[int, int]:
        """(H, W) of the area that holds any camera's frame: see `pack_frames`."""
        heights, widths = zip(*self.image_sizes, strict=True)
        return max(heights), max(widths)

    @property
    def encoder_shape(self) -> tuple[int, int]:
        """(height, width) that the backbone sees, after resize and crop."""
        return self.crop_shape or self.resize_shape or self.frame_size

    @property
    def state_dim(self) -> int:
        """Width of `observation.state`."""
        return self.input_features[STATE_KEY].shape[0]

    @property
    def action_dim(self) -> int:
        """Width of one action."""
        return self.output_features[ACTION_KEY].shape[0]

    @property
    def relative_actions(self) -> tuple[bool, ...]:
        """(A,): which actions are distances from the state; empty where none is.

        Those that `relative_exclude_joints` does not name, as LeRobot's
        `RelativeActionsProcessorStep` finds them: by parts of names, whatever their case.
        """
        if not self.use_relative_actions:
            return ()
        kept = [name.lower() for name in self.relative_exclude_joints if name]
        names = [name.lower() for name in self.action_names] or [""] * self.action_dim
        return tuple(not any(part in name for part in kept) for name in names)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one observation: a token per camera, the state, the action query."""
        return len(self.image_keys) + 2

    @property
    def num_queries(self) -> int:
        """Action queries: one per observation, and those for the future."""
        return self.n_obs_steps + self.n_action_pred_token - 1

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole training sequence, future action queries included."""
        return self.n_obs_steps * self.tokens_per_step + self.n_action_pred_token - 1


def _check_features(config: VQBeTConfig) -> None:
    states = [key for key, f in config.input_features.items() if f.type is FeatureType.STATE]
    vectors = {**config.input_features, **config.output_features}
    if states != [STATE_KEY] or config.output_features.keys() != {ACTION_KEY}:
        raise CheckpointError(
            f"expected the one state '{STATE_KEY}' and the one output feature '{ACTION_KEY}', got "
            f"{states} and {sorted(config.output_features)}"
        )
    for key, feature in ((key, vectors[key]) for key in (STATE_KEY, ACTION_KEY)):
        if len(feature.shape) != 1 or feature.shape[0] < 1:
            raise CheckpointError(f"expected '{key}' of shape (dim,), got {feature.shape}")
    _check_relative(config)
    if not config.image_keys:
        raise CheckpointError(
            "no camera among the input features; VQ-BeT needs at least one feature of type VISUAL"
        )
    for key in config.image_keys:
        shape = config.input_features[key].shape
        if len(shape) != 3 or shape[0] != 3:
            raise CheckpointError(f"expected '{key}' of shape (3, height, width), got {shape}")
    if config.cameras_differ and config.resize_shape is None:
        shapes = sorted({config.input_features[key].shape for key in config.image_keys})
        raise CheckpointError(
            f"expected cameras of one shape (3, height, width), got {shapes}; choose cameras of "
            "one size with --cameras, or shrink all to one with --resize-shape HEIGHT WIDTH"
        )


def _check_relative(config: VQBeTConfig) -> None:
    names = config.action_names
    if names and len(names) != config.action_dim:
        raise CheckpointError(
            f"expected names of {config.action_dim} actions, got {len(names)}: {', '.join(names)}"
        )
    if not config.use_relative_actions:
        return
    if config.state_dim < config.action_dim:
        raise CheckpointError(
            f"use_relative_actions takes action i as a distance from state i, and there are "
            f"{config.action_dim} actions and {config.state_dim} states; leave it out"
        )
    if not any(config.relative_actions):
        raise CheckpointError(
            f"relative_exclude_joints {config.relative_exclude_joints} leaves none of the actions "
            f"{', '.join(names)} relative; name fewer, or leave use_relative_actions out"
        )


def _check_vision(config: VQBeTConfig) -> None:
    if config.vision_backbone not in BACKBONES:
        raise CheckpointError(
            f"vision_backbone '{config.vision_backbone}' is unknown; "
            f"use one of {', '.join(BACKBONES)}"
        )
    pretrained = config.pretrained_backbone_weights
    if pretrained and (config.use_group_norm or config.vision_backbone == "resnet10_small"):
        raise CheckpointError(
            f"pretrained_backbone_weights '{pretrained}' belong to a torchvision ResNet with "
            f"BatchNorm, not to {config.vision_backbone} with use_group_norm "
            f"{config.use_group_norm}; pass --no-use-group-norm, or no pretrained weights"
        )
    resize, crop = config.resize_shape, config.crop_shape
    for key, (height, width) in zip(config.image_keys, config.image_sizes, strict=True):
        if resize is not None and not (0 < resize[0] <= height and 0 < resize[1] <= width):
            raise CheckpointError(
                f"resize_shape {resize} does not shrink the {height}x{width} images of '{key}'; "
                "choose a smaller one, or leave the camera out with --cameras"
            )
    height, width = resize or config.frame_size
    if crop is not None and not (0 < crop[0] <= height and 0 < crop[1] <= width):
        raise CheckpointError(f"crop_shape {crop} does not fit into images of {height}x{width}")


def _check_sizes(config: VQBeTConfig) -> None:
    if config.gpt_hidden_dim % config.gpt_n_head:
        raise CheckpointError(
            f"gpt_hidden_dim {config.gpt_hidden_dim} is not a multiple of "
            f"gpt_n_head {config.gpt_n_head}"
        )
    if config.num_tokens > config.gpt_block_size:
        raise CheckpointError(
            f"{config.num_tokens} tokens do not fit into gpt_block_size {config.gpt_block_size}; "
            "raise gpt_block_size or lower n_obs_steps"
        )


def crop_advice(config: VQBeTConfig) -> str:
    """What to say about a random crop that shows too little of a picture; empty if none does."""
    whole, crop = config.resize_shape or config.frame_size, config.encoder_shape
    if not config.crop_is_random or all(
        c >= SMALL_CROP * w for c, w in zip(crop, whole, strict=True)
    ):
        return ""
    sizes = "{}x{}".format(*crop), "{}x{}".format(*whole)
    return (
        f"the crop of {sizes[0]} is less than {SMALL_CROP} of the {sizes[1]} images: the policy "
        "trains on random patches and acts on the centre, and never sees what lies outside it; "
        "shrink the images first with --resize-shape HEIGHT WIDTH, or raise --crop-shape"
    )


def flag(name: str) -> str:
    """A field as the command line spells it."""
    return f"--{name.replace('_', '-')}"


def check_positive(config: object, *names: str) -> None:
    """Refuse fields below 1.

    Raises:
        UsageError: names the flag.
    """
    for name in names:
        value = getattr(config, name)
        if value < 1:
            raise UsageError(f"{flag(name)} must be at least 1, got {value}")


@dataclass(frozen=True)
class ImageTransforms:
    """How pictures are changed while training, under LeRobot's names and defaults.

    Of every sample, all pictures of one camera are changed alike; None leaves a change out.
    """

    # Change pictures.
    enable: bool = False
    # Most changes to one sample, drawn from those below.
    max_num_transforms: Count = 3
    # In an order at random, instead of the one below.
    random_order: bool = False
    # Factors, from and to; for the hue, shares of the circle to turn by.
    brightness: tuple[NotNegative, NotNegative] | None = (0.8, 1.2)
    contrast: tuple[NotNegative, NotNegative] | None = (0.8, 1.2)
    saturation: tuple[NotNegative, NotNegative] | None = (0.5, 1.5)
    hue: tuple[Turn, Turn] | None = (-0.05, 0.05)
    sharpness: tuple[NotNegative, NotNegative] | None = (0.5, 1.5)
    # Degrees to turn pictures by, from and to, and largest shares of width and height to shift by.
    affine: tuple[tuple[float, float], tuple[Share, Share]] | None = ((-5.0, 5.0), (0.05, 0.05))

    def __post_init__(self) -> None:
        convert_fields(self, "image_transforms.")
        for name in ("brightness", "contrast", "saturation", "hue", "sharpness"):
            ends = getattr(self, name)
            if ends is not None and ends[0] > ends[1]:
                raise UsageError(f"image_transforms.{name} goes from {ends[0]} to {ends[1]}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Hyperparameters):
    """One training run.

    Raises:
        UsageError: a value is out of its range.
    """

    # A LeRobot data set: a folder, or an id on the Hub.
    dataset: Annotated[str, tyro.conf.arg(metavar="DATASET")]
    # More of the same robot's, behind it; --episodes and --revision are the first one's.
    more_datasets: Annotated[tuple[str, ...], tyro.conf.arg(metavar="DATASET ...")] = ()
    # How often each data set is drawn from, in proportion; None draws every frame equally often.
    dataset_weights: Annotated[tuple[Positive, ...] | None, tyro.conf.arg(metavar="W ...")] = None
    # Numbers of the episodes to take, and ranges without their end such as 0:50; None takes all.
    episodes: Annotated[tuple[int | str, ...] | None, tyro.conf.arg(metavar="N|N:M ...")] = None
    # Branch, tag or commit of a data set on the Hub.
    revision: Annotated[str | None, tyro.conf.arg(metavar="REVISION")] = None
    # Keys of the cameras to look through, in this order; None takes all RGB ones that fit together.
    cameras: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="KEY ...")] = None
    # Start the backbone from ImageNet weights, with BatchNorm: the defaults of LeRobot 0.6.
    imagenet: bool = False
    # Folder of the run: checkpoints, metrics and curves go there.
    output: Path
    # Optimisation steps of both phases together.
    steps: int = 100_000
    # Windows per step, over all processes together.
    batch_size: Count = 64
    # Of everything that is drawn at random.
    seed: Annotated[int, Meta(ge=0)] = 0
    # Change pictures at random while training, as LeRobot does.
    image_transforms: ImageTransforms = ImageTransforms()
    # Go on from the run's last checkpoint.
    resume: bool = False
    # Begin from another policy: a checkpoint's folder or Hub id. Its hyperparameters, statistics
    # and codes are the run's, which is phase 2 alone; with --n-vqvae-training-steps, phase 1 goes
    # on with its codes before.
    pretrained: Annotated[str | None, tyro.conf.arg(metavar="CHECKPOINT")] = None
    # Take a finished VQ-VAE from a checkpoint and skip phase 1; everything else begins anew.
    pretrained_vqvae: Annotated[str | None, tyro.conf.arg(metavar="CHECKPOINT")] = None
    # Scale by the statistics of the data set instead of the checkpoint's; phase 1 has to go on.
    new_statistics: bool = False

    # Learning rate of phase 2.
    optimizer_lr: NotNegative = 1e-4
    # Decay of Adam's moving averages, both phases.
    optimizer_betas: tuple[Share, Share] = (0.95, 0.999)
    # Adam's epsilon, both phases.
    optimizer_eps: Positive = 1e-8
    # Weight decay of phase 2.
    optimizer_weight_decay: NotNegative = 1e-6
    # Learning rate of phase 1.
    optimizer_vqvae_lr: NotNegative = 1e-3
    # Weight decay of phase 1.
    optimizer_vqvae_weight_decay: NotNegative = 1e-4
    # Gradients longer than this are shortened to it.
    optimizer_grad_clip_norm: Positive = 10.0
    # Steps in which phase 2's learning rate rises to its full height.
    scheduler_warmup_steps: Annotated[int, Meta(ge=0)] = 500

    # End phase 1 as soon as its reconstruction error stops falling.
    vqvae_early_stop: bool = False
    # Decay of the moving average of phase 2's weights that checkpoints then hold; 0 keeps none.
    ema_decay: Share = 0.0
    # Precision that phase 2 computes in, beside the float32 weights.
    mixed_precision: Literal["no", "bf16"] = "no"
    # Compile phase 2 with torch.compile.
    compile: bool = False
    # Parts of a batch that phase 2 computes one after the other, for less memory of the device.
    gradient_accumulation_steps: Count = 1
    # Crop every window of a batch at a random place of its own, instead of all at one.
    crop_per_sample: bool = False

    # Share of the episodes that are kept for validation.
    validation_fraction: Share = 0.05
    # Steps between validations.
    validate_every: Count = 1000
    # Steps between lines of metrics.jsonl.
    log_every: Count = 100
    # Steps between checkpoints.
    save_every: Count = 5000
    # Keep so many checkpoints, the newest, and the best one beside them; none keeps all.
    keep: Count | None = None
    # Where to send the metrics too.
    log_with: Literal["tensorboard", "wandb"] | None = None
    # Drive episodes while training: an environment that vqbet-eval knows, or your own as
    # module:Class. checkpoints/best is the checkpoint that did best.
    eval_env: Annotated[str | None, tyro.conf.arg(metavar="ENV")] = None
    # Steps of phase 2 between them.
    eval_every: Count = 5000
    # Episodes to drive each time.
    eval_episodes: Count = 20
    # Keep decoded frames in this folder between runs, instead of in memory.
    frame_cache: Path | None = None
    # Decode frames on the way, in every epoch anew; None does what memory does not hold.
    stream_frames: bool | None = None
    # Processes that decode frames; None takes one per processor, eight at most.
    num_workers: Annotated[int, Meta(ge=0)] | None = None

    def __post_init__(self) -> None:
        convert_fields(self)
        kinds = {kind.value for kind in FeatureType if kind is not FeatureType.ENV}
        if set(self.normalization_mapping) != kinds:
            raise UsageError(
                f"normalization_mapping needs a mode each for {', '.join(sorted(kinds))}, got "
                f"{', '.join(sorted(self.normalization_mapping)) or 'none'}"
            )
        if self.imagenet and self.pretrained is not None:
            raise UsageError("--pretrained brings its backbone's weights; leave --imagenet out")
        if self.imagenet:
            depth = self.vision_backbone.removeprefix("resnet")
            if not depth.isdecimal():
                raise UsageError(
                    f"--imagenet: there are no ImageNet weights for {self.vision_backbone}; choose "
                    "one of torchvision's ResNets with --vision-backbone, or leave --imagenet out"
                )
            name = f"ResNet{depth}_Weights.IMAGENET1K_V1"
            object.__setattr__(self, "pretrained_backbone_weights", name)
            object.__setattr__(self, "use_group_norm", False)
        if self.revision is not None and Path(self.dataset).is_dir():
            raise UsageError(f"--revision is for the Hub, and {self.dataset} is a folder here")
        weights, count = self.dataset_weights, 1 + len(self.more_datasets)
        if weights is not None and len(weights) != count:
            raise UsageError(
                f"--dataset-weights needs a number for each of {count} data sets, that of "
                f"--dataset first, got {len(weights)}"
            )
        begun = [n for n in ("pretrained", "pretrained_vqvae") if getattr(self, n) is not None]
        if len(begun) == 2:
            raise UsageError("--pretrained brings its VQ-VAE; leave --pretrained-vqvae out")
        if self.new_statistics and not (begun and self.n_vqvae_training_steps):
            raise UsageError(
                "--new-statistics is for --pretrained, and its codes have to learn what they then "
                "stand for: pass --n-vqvae-training-steps N too, or leave it out"
            )
        least = 0 if begun else 1
        if not least <= self.n_vqvae_training_steps < self.steps:
            raise UsageError(
                f"--steps {self.steps} counts both phases and must be more than "
                f"--n-vqvae-training-steps {self.n_vqvae_training_steps}"
            )

    @property
    def source(self) -> str:
        """The data set, with its revision."""
        return self.dataset if self.revision is None else f"{self.dataset}@{self.revision}"

    def policy(self, dataset: LeRobotDataset) -> VQBeTConfig:
        """The architecture for a data set: its cameras, state and action.

        Raises:
            DatasetError: the data set has no camera, no state or no action.
            CheckpointError: the hyperparameters contradict each other or the images.
        """
        for key in (STATE_KEY, ACTION_KEY):
            if key not in dataset.features:
                raise DatasetError(
                    f"{dataset.info.root} has no '{key}'; its features are "
                    f"{', '.join(dataset.features)}"
                )
        images = {
            key: Feature(FeatureType.VISUAL, (3, *dataset.features[key].shape[:2]))
            for key in dataset.chosen_cameras.keys
        }
        state = Feature(FeatureType.STATE, dataset.features[STATE_KEY].shape)
        action = Feature(FeatureType.ACTION, dataset.features[ACTION_KEY].shape)
        chosen = {f.name: getattr(self, f.name) for f in fields(Hyperparameters)}
        return VQBeTConfig(
            input_features={**images, STATE_KEY: state},
            output_features={ACTION_KEY: action},
            action_names=dataset.features[ACTION_KEY].names,
            **chosen,
        )

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON's types."""
        result: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return result
