"""The policies of New York University, run by their own code; nothing of it is copied here.

Robot Utility Models (haritheja-e/robot-utility-models 82c4691) and Contact-Anchored Policies
(jeffacce/cap-policy 8ab1117), both MIT. Their packages have the same names (`models`, ...), so one
process runs one of them. Needs timm and hydra-core beside what vqbet_edge needs.
"""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

SIDE = 256
GRID = 32


@dataclass(frozen=True)
class Sizes:
    """What a policy is instantiated with; None leaves the widths that their code has written in."""

    overrides: tuple[str, ...] = ()
    resnet: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    """Blocks and channels of the four stages; the stem is as wide as the first."""
    head_width: int | None = None
    """Of the hidden layers of code heads, offset head, and the VQ-VAE's encoder and decoder."""


@dataclass(frozen=True)
class Family:
    """One of the two repositories: the names and sizes that its own configurations have."""

    name: str
    resnet: str
    goal: bool
    codes: int
    full: Sizes
    tiny: Sizes

    @property
    def training(self) -> tuple[str, ...]:
        """Overrides of train_vqbet.yaml, which leaves these to who trains."""
        pick = ("goal_dim=3", "gpt_input_dim=512", f"model={self.resnet}") if self.goal else ()
        return (
            *pick,
            f"vqvae_n_embed={self.codes}",
            "model_path=checkpoints/random",
            "files_list_path=r3d_files/random",
        )


_TINY = (
    "loss_fn.gpt_model.config.n_layer=2",
    "loss_fn.gpt_model.config.n_head=3",
    "loss_fn.gpt_model.config.n_embd=12",
    "+loss_fn.gpt_model.config.output_dim=14",
    "loss_fn.vqvae_n_latent_dims=10",
)
FAMILIES = {
    "rum": Family(
        "rum", "resnet34", goal=False, codes=16,
        full=Sizes(),
        tiny=Sizes((*_TINY, "loss_fn.gpt_model.config.input_dim=20"),
                   ((2, 1, 1, 1), (4, 4, 6, 8)), 12),
    ),
    "cap": Family(
        "cap", "resnet50", goal=True, codes=32,
        full=Sizes(),
        tiny=Sizes((*_TINY, "gpt_input_dim=40"), ((1, 1, 1, 1), (4, 4, 4, 6)), 12),
    ),
}  # fmt: skip


def open_repository(repository: Path) -> Family:
    """Make their packages importable and say which of the two repositories it is."""
    root = repository.resolve() / "imitation-in-homes"
    if not (root / "loss_fns/vqbet_loss_fn.py").is_file():
        sys.exit(
            f"{repository}: expected a clone of haritheja-e/robot-utility-models or "
            "jeffacce/cap-policy, which have imitation-in-homes/loss_fns/vqbet_loss_fn.py"
        )
    sys.path.insert(0, str(root))
    # Imported by run.py, called by nothing here; others ask for their specification.
    for name in ("gdown", "wandb"):
        sys.modules.setdefault(name, module_from_spec(ModuleSpec(name, None)))
    return FAMILIES["cap" if (root / "robot/object_tracking.py").is_file() else "rum"]


def configuration(name: str, overrides: Sequence[str]) -> Any:
    """One of their configurations as Hydra composes it."""
    import hydra

    root = next(
        Path(each) for each in sys.path if (Path(each) / "configs/run_vqbet.yaml").is_file()
    )
    with hydra.initialize_config_dir(str(root / "configs"), version_base="1.2"):
        return hydra.compose(name, overrides=list(overrides))


@contextmanager
def _narrow_resnets(blocks: tuple[int, ...], channels: tuple[int, ...]) -> Iterator[None]:
    """Timm's ResNet with fewer channels under the names and data configuration of the wide one."""
    import timm
    from timm.models.resnet import make_blocks

    create = timm.create_model

    def narrow(name: str, **options: Any) -> Any:
        model = create(name, **options)
        model.conv1 = torch.nn.Conv2d(3, channels[0], 7, stride=2, padding=3, bias=False)
        model.bn1 = torch.nn.BatchNorm2d(channels[0])
        kind = type(model.layer1[0])
        stages, _ = make_blocks(
            (kind,) * 4, channels, blocks, channels[0],
            act_layer=torch.nn.ReLU, norm_layer=torch.nn.BatchNorm2d, aa_layer=None,
        )  # fmt: skip
        for stage in stages:
            model.add_module(*stage)
        model.num_features = channels[-1] * kind.expansion
        return model

    with mock.patch.object(timm, "create_model", narrow):
        yield


def _narrow_heads(policy: Any, width: int) -> None:
    """Their own MLPs with hidden layers of `width`, which their code has written in."""
    from models.bet.utils import MLP
    from models.bet.vqvae.vqvae import EncoderMLP

    bet = policy.loss_fn._vqbet
    rvq, features = bet._vqvae_model, bet._gpt_model.config.output_dim
    codes, act = rvq.vqvae_n_embed, rvq.input_dim_w
    bet._map_to_cbet_preds_bin1 = MLP(features, [width, width, codes])
    bet._map_to_cbet_preds_bin2 = MLP(features + codes, [width, codes])
    bet._map_to_cbet_preds_offset = MLP(features, [width, width, 2 * codes * act])
    rvq.encoder = EncoderMLP(act, rvq.n_latent_dims, hidden_dim=width)
    rvq.decoder = EncoderMLP(rvq.n_latent_dims, act, hidden_dim=width)


def instantiate(cfg: Any, sizes: Sizes) -> Any:
    """Their `WrapperPolicy`, without weights."""
    import hydra
    from run import WrapperPolicy

    with ExitStack() as stack:
        if sizes.resnet is not None:
            stack.enter_context(_narrow_resnets(*sizes.resnet))
        model = hydra.utils.instantiate(cfg.model)
        policy = WrapperPolicy(model, hydra.utils.instantiate(cfg.loss_fn, model=model))
    if sizes.head_width is not None:
        _narrow_heads(policy, sizes.head_width)
    return policy.eval()


def offline(family: Family) -> tuple[str, ...]:
    """Overrides that build the encoder without its pretrained weights, which a file replaces."""
    # The hub's "hf-hub:notmahi/dobb-e" is a resnet34.
    return (f"++model.model_name={family.resnet}", "++model.pretrained=false")


@dataclass(frozen=True)
class Step:
    """What their policy decided at one step."""

    action: NDArray[np.float32]
    """(7,), as `step` returns it: metres, radians, gripper."""
    codes: NDArray[np.int64]
    """(2,): primary and secondary."""
    logits: NDArray[np.float32]
    """(2, C): of the primary code, and of the secondary given the primary one that was drawn."""


class Theirs:
    """Their policy from a checkpoint, driven as their `Controller` drives it, on the CPU."""

    def __init__(
        self, family: Family, checkpoint: Path, sizes: Sizes, overrides: Sequence[str] = ()
    ) -> None:
        torch.manual_seed(0)
        run = (*offline(family), f"vqvae_n_embed={family.codes}", *sizes.overrides, *overrides)
        cfg = configuration("run_vqbet", (*run, "device=cpu"))
        self.policy = instantiate(cfg, sizes)
        stored = torch.load(checkpoint, map_location="cpu", weights_only=True)
        self.policy.model.load_state_dict(stored["model"])
        self.policy.loss_fn.load_state_dict(stored["loss_fn"])
        self._goal = family.goal
        self._window = cfg.image_buffer_size
        self.reset()

    def reset(self) -> None:
        """As `Controller.reset_experiment`: an empty buffer."""
        from robot import utils

        kind = utils.ImageActionGoalBufferManager if self._goal else utils.ImageActionBufferManager
        self._buffer = kind(self._window)

    def step(self, frame: NDArray[np.uint8], goal: NDArray[np.float32] | None) -> torch.Tensor:
        """The action for an RGB frame (256, 256, 3), by the lines of `Controller._run_policy`.

        Their camera sends BGR; `img[..., ::-1]` undoes what they turn round again.
        """
        self._buffer.add_image(np.ascontiguousarray(frame[..., ::-1]))
        if self._goal:
            self._buffer.add_goal(goal)
        with torch.no_grad():
            sequence = self._buffer.get_input_tensor_sequence()
            inputs = tuple(each.unsqueeze(0) for each in sequence[:2])
            action, _ = self.policy.step(inputs, step_no=0)
            self._buffer.add_action(action.cpu())
        return action

    def decide(self, frame: NDArray[np.uint8], goal: NDArray[np.float32] | None) -> Step:
        """`step`, and what was seen of its inside by hooks on its modules."""
        bet = self.policy.loss_fn._vqbet
        seen: dict[str, torch.Tensor] = {}

        def keep(name: str) -> Any:
            return lambda _module, _inputs, output: seen.__setitem__(name, output)

        draw = bet._vqvae_model.draw_code_forward

        def drawing(codes: torch.Tensor) -> torch.Tensor:
            seen["codes"] = codes
            return draw(codes)

        with ExitStack() as stack:
            for name in ("bin1", "bin2"):
                head = getattr(bet, f"_map_to_cbet_preds_{name}")
                stack.callback(head.register_forward_hook(keep(name)).remove)
            stack.enter_context(mock.patch.object(bet._vqvae_model, "draw_code_forward", drawing))
            action = self.step(frame, goal)
        logits = torch.stack([seen["bin1"][-1], seen["bin2"][-1]])
        return Step(action.numpy(), seen["codes"][-1].numpy(), logits.numpy())


def frame(grid: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(32, 32, 3) to (256, 256, 3): squares of eight pixels, the same everywhere."""
    return grid.repeat(SIDE // GRID, 0).repeat(SIDE // GRID, 1)


def grids(random: np.random.Generator, count: int) -> NDArray[np.uint8]:
    """Pictures (count, 32, 32, 3) that differ in colour, in what is where, and in detail."""
    colour = random.uniform(0, 255, (count, 1, 1, 3))
    coarse = random.uniform(0, 255, (count, 4, 4, 3)).repeat(8, 1).repeat(8, 2)
    fine = random.uniform(0, 255, (count, GRID, GRID, 3))
    weight = random.dirichlet((1, 2, 1), count).T[..., None, None, None]
    mixed = weight[0] * colour + weight[1] * coarse + weight[2] * fine
    return np.rint(mixed).astype(np.uint8)


def goals(random: np.random.Generator, count: int) -> NDArray[np.float32]:
    """Contact points (count, 3) in front of a camera, in metres."""
    low, high = (-0.15, 0.2, -0.15), (0.15, 0.7, 0.15)
    return random.uniform(low, high, (count, 3)).astype(np.float32)
