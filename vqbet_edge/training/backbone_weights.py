"""Backbone weights that torchvision names, from torch's cache or the network."""

import pickle
from pathlib import Path

import torch
import torchvision
from torch import Tensor

from vqbet_edge.errors import HubError, UsageError


def pretrained_weights(backbone: str, name: str) -> dict[str, Tensor]:
    """The state dict of a whole ResNet, by torchvision's name of it and of the weights.

    Raises:
        UsageError: torchvision has no such weights for this backbone.
        HubError: they are not in torch's cache and cannot be downloaded, or are damaged there.
    """
    known = torchvision.models.get_model_weights(backbone)
    owner, _, short = name.rpartition(".")
    if short not in known.__members__ or owner not in {"", known.__name__}:
        names = ", ".join(f"{known.__name__}.{member}" for member in known.__members__)
        raise UsageError(
            f"--pretrained-backbone-weights {name}: torchvision has for {backbone}: {names}"
        )
    url = known[short].value.url
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    try:
        # torchvision's own way to load them would run code from the file.
        state: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as e:
        remedy = "it is damaged: delete it" if file.exists() else f"download {url} there"
        raise HubError(
            f"cannot take the weights {name} from {file} ({e}); {remedy}, or train without "
            "--pretrained-backbone-weights"
        ) from e
    return state
