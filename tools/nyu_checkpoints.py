"""Write random checkpoints in the format of Robot Utility Models or Contact-Anchored Policies.

python tools/nyu_checkpoints.py --repository CLONE --out tests/nyu/data   # tiny, golden actions
python tools/nyu_checkpoints.py --repository CLONE --out FOLDER --full    # their sizes, 20-200 MB

Their classes make the network, the optimisers, the schedulers and the actions (nyu_reference.py).
Every tensor is random: BatchNorm's statistics and LayerNorms too. So that the codes of different
frames differ as those of a trained policy do, the inputs of the transformer and both code heads are
centred and scaled on random frames.
"""

import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import tyro
from safetensors.numpy import save_file

sys.path.insert(0, str(Path(__file__).parent))

from nyu_reference import (
    Family,
    Sizes,
    Theirs,
    configuration,
    frame,
    goals,
    grids,
    instantiate,
    offline,
    open_repository,
)

STEPS = 12
# How far the two largest logits of a golden step are apart at least, of about 1.
CLEAR = 0.01
# Metres, radians, gripper: as large as what their controllers send at one step.
_SCALE = torch.tensor([0.02, 0.02, 0.02, 0.05, 0.05, 0.05, 0.3])
_GRIPPER = 0.5


def _randomise(policy: torch.nn.Module) -> None:
    """Draw every parameter and buffer anew, as large as keeps a network's outputs in range."""
    for module in policy.modules():
        weight = getattr(module, "weight", None)
        match module:
            case torch.nn.LayerNorm() | torch.nn.BatchNorm2d():
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                torch.nn.init.normal_(module.bias, std=0.2)
            case torch.nn.Linear() | torch.nn.Conv2d():
                fan_in = weight[0].numel()
                torch.nn.init.normal_(weight, std=(1.5 / fan_in) ** 0.5)
                if module.bias is not None:
                    torch.nn.init.normal_(module.bias, std=0.2)
            case torch.nn.Embedding():
                torch.nn.init.normal_(weight, std=0.3)
    for name, buffer in policy.named_buffers():
        match name.rsplit(".", 1)[-1]:
            case "embed" | "embed_avg":
                buffer.normal_()
            case "cluster_size":
                buffer.uniform_(1, 100)
            case "initted":
                buffer.fill_(1)
    torch.nn.init.normal_(policy.loss_fn._obs_mask_token)


def _settle_statistics(encoder: torch.nn.Module, images: torch.Tensor) -> None:
    """BatchNorm statistics near those of `images`, none exactly."""
    norms = [each for each in encoder.modules() if isinstance(each, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    # Their evaluation transform depends on `model.training`; only the norms train here.
    encoder((images,))
    for norm in norms:
        norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.7, 1.4)).add_(1e-3)
        norm.running_mean.add_(0.2 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean))
        norm.eval()


def _centre(layer: torch.nn.Linear, spread: float, run: Callable[[], object]) -> None:
    """Scale and shift a layer so that its outputs over `run` vary by `spread` around about 0."""
    seen: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    run()
    handle.remove()
    outputs = torch.cat([each.flatten(0, -2) for each in seen])
    scale = spread / outputs.std(0).mean()
    layer.weight.mul_(scale)
    layer.bias.sub_(outputs.mean(0)).mul_(scale).add_(0.2 * spread * torch.randn_like(layer.bias))


@torch.no_grad()
def _random_weights(policy: Any, family: Family, frames: int) -> None:
    random = np.random.default_rng(1)
    pictures = torch.from_numpy(np.stack([frame(each) for each in grids(random, frames)]))
    images = pictures.permute(0, 3, 1, 2).float().div(255).reshape(-1, 3, 3, 256, 256)
    points = torch.from_numpy(goals(random, frames)).reshape(-1, 3, 3)
    bet = policy.loss_fn._vqbet
    _randomise(policy)
    if family.goal:
        policy.loss_fn._goal_adapter.linear.weight.mul_(5)
    decoder, offsets = bet._vqvae_model.decoder.fc, bet._map_to_cbet_preds_offset
    decoder.weight.mul_(_SCALE[:, None])
    decoder.bias.mul_(_SCALE)[-1] += _GRIPPER
    last = offsets[-2]
    each = 0.3 * _SCALE.repeat(last.out_features // len(_SCALE))
    last.weight.mul_(each[:, None])
    last.bias.mul_(each)
    _settle_statistics(policy.model, images)
    features = policy.model((images,))

    def run() -> None:
        for window, point in zip(features, points, strict=True):
            policy.loss_fn.step((None, point[None]), window[None])

    for layer in (
        bet._gpt_model.transformer.wte,
        bet._map_to_cbet_preds_bin1[-2],
        bet._map_to_cbet_preds_bin2[-2],
    ):
        _centre(layer, 1.0, run)


def _optimisers(cfg: Any, policy: Any) -> dict[str, Any]:
    """State of both optimisers and schedulers, as `VQBeTWorkspace` sets them up."""
    import hydra
    from torch.optim.lr_scheduler import LRScheduler

    loss_fn, bet = policy.loss_fn, policy.loss_fn._vqbet
    offset = list(bet._map_to_cbet_preds_offset.parameters())
    own = (
        policy.model, loss_fn._obs_adapter, bet._gpt_model,
        bet._map_to_cbet_preds_bin1, bet._map_to_cbet_preds_bin2,
    )  # fmt: skip
    first = list(itertools.chain.from_iterable(each.parameters() for each in own))
    init, states = LRScheduler.__init__, {}
    for number, parameters in enumerate((first, offset), 1):
        optimiser = hydra.utils.instantiate(cfg.optimizer, params=parameters, lr=3e-4)
        # Their scheduler passes `verbose`, which newer versions of torch no longer take.
        with mock.patch.object(
            LRScheduler, "__init__", lambda self, opt, last, _: init(self, opt, last)
        ):
            scheduler = hydra.utils.instantiate(cfg.scheduler, optimizer=optimiser)
        states[f"optimizer{number}"] = optimiser.state_dict()
        states[f"scheduler{number}"] = scheduler.state_dict()
    return states


def write_checkpoint(family: Family, path: Path, sizes: Sizes, seed: int) -> None:
    """A checkpoint as their `train.py` writes it, `cfg` and all, with random weights."""
    from omegaconf import OmegaConf

    torch.manual_seed(seed)
    overrides = (*family.training, *sizes.overrides)
    cfg = configuration("train_vqbet", overrides)
    build = configuration(
        "train_vqbet", (*overrides, *offline(family), "device=cpu", "vqvae_load_dir=null")
    )
    policy = instantiate(build, sizes)
    states = _optimisers(build, policy)
    _random_weights(policy, family, 24)
    stored = {
        "cfg": OmegaConf.to_container(cfg, resolve=True),
        "epoch": 500,
        "model": policy.model.state_dict(),
        **states,
        "loss_fn": policy.loss_fn.state_dict(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(stored, path)


def write_golden(theirs: Theirs, family: Family, path: Path) -> bool:
    """What their `step` does on random frames; False if a code was chosen by a hair."""
    random = np.random.default_rng(2)
    pictures, points = grids(random, STEPS), goals(random, STEPS)
    theirs.reset()
    steps = [
        theirs.decide(frame(picture), point if family.goal else None)
        for picture, point in zip(pictures, points, strict=True)
    ]
    logits = np.stack([each.logits for each in steps])
    largest = np.sort(logits, -1)
    if (largest[..., -1] - largest[..., -2]).min() < CLEAR:
        return False
    kept = {
        "grids": pictures,
        "actions": np.stack([each.action for each in steps]),
        "codes": np.stack([each.codes for each in steps]),
        "primary_logits": logits[:, 0],
        "secondary_logits": logits[:, 1],
    }
    if family.goal:
        kept["goals"] = points
    save_file({key: np.ascontiguousarray(each) for key, each in kept.items()}, path)
    return True


def write_diffusion(path: Path) -> None:
    """The keys of their diffusion policy, every tensor cut to two entries a dimension."""
    import hydra
    from omegaconf import OmegaConf

    cfg = configuration(
        "run_diffusion", ("++model.model_name=resnet34", "++model.pretrained=false")
    )
    model = hydra.utils.instantiate(cfg.model)
    # Which is no module, and whose constructor changed since diffusers 0.11.
    with mock.patch("models.policies.diffusion_policy.EMAModel"):
        loss_fn = hydra.utils.instantiate(cfg.loss_fn, model=model)

    def cut(states: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {k: v[(slice(0, 2),) * v.ndim].clone() for k, v in states.items()}

    torch.save(
        {
            "cfg": OmegaConf.to_container(cfg, resolve=True),
            "epoch": 500,
            "model": cut(model.state_dict()),
            "optimizer": {"state": {}, "param_groups": []},
            "scheduler": {},
            "loss_fn": cut(loss_fn.state_dict()),
        },
        path,
    )


@dataclass(frozen=True)
class Options:
    """Which repository, where to, which size."""

    repository: Path
    out: Path
    full: bool = False
    seed: int = 0


def main(options: Options) -> None:
    """Write NAME.pt, and for the tiny one NAME.safetensors with golden actions."""
    family = open_repository(options.repository)
    sizes = family.full if options.full else family.tiny
    path = options.out / f"{family.name}.pt"
    for seed in itertools.count(options.seed):
        write_checkpoint(family, path, sizes, seed)
        theirs = Theirs(family, path, sizes)
        if options.full or write_golden(theirs, family, path.with_suffix(".safetensors")):
            break
    if family.name == "rum" and not options.full:
        write_diffusion(options.out / "rum_diffusion.pt")
    sys.stdout.write(f"{path}: seed {seed}, {path.stat().st_size / 1e3:.0f} kB\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
