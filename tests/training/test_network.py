"""The network against LeRobot's: names, shapes and numbers."""

import copy
from typing import Any

import oracle
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from vqbet_edge.training.checkpoint import load_checkpoint

pytestmark = pytest.mark.usefixtures("double")

CASES = [
    pytest.param(case, id=case.name, marks=pytest.mark.xdist_group(case.name))
    for case in oracle.CASES
]


# Between two orders of the same operations in float64.
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def pair(workshop: Any, case: oracle.Case) -> tuple[Any, Any]:
    """LeRobot's policy in float64, and its checkpoint."""
    policy, directory = workshop.policy(case), workshop.checkpoint(case)
    return copy.deepcopy(policy).double(), directory


def inputs(case: oracle.Case, window: int) -> tuple[Tensor, Tensor]:
    """Images (2, N, K, 3, H, W) and states (2, N, S)."""
    torch.manual_seed(1)
    images = torch.rand(2, window, case.cameras, 3, *case.image)
    return images, torch.rand(2, window, case.state_dim) * 2 - 1


@torch.no_grad()
def reference_features(policy: Any, images: Tensor, states: Tensor) -> Tensor:
    """What LeRobot's GPT hands to its heads."""
    seen: list[Tensor] = []
    hook = policy.vqbet.action_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    policy.vqbet({"observation.images": images, oracle.STATE: states}, rollout=True)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("case", CASES)
def test_takes_lerobots_file_and_computes_the_same(workshop: Any, case: oracle.Case) -> None:
    policy, directory = pair(workshop, case)
    network = load_checkpoint(str(directory)).network
    network.load_state_dict(load_file(directory / "model.safetensors"), strict=True)
    images, states = inputs(case, policy.config.n_obs_steps)
    expected = reference_features(policy, images, states)
    with torch.no_grad():
        torch.testing.assert_close(network.double()(images, states), expected, **EXACT)


@pytest.mark.parametrize("case", CASES)
def test_head_decodes_the_same(workshop: Any, case: oracle.Case) -> None:
    policy, directory = pair(workshop, case)
    head = load_checkpoint(str(directory)).network.double().head
    reference, injected = policy.vqbet.action_head, oracle.InjectedCodes(policy)
    injected._query = 0
    torch.manual_seed(3)
    features = torch.randn(5, policy.config.gpt_output_dim)
    for codes in [(0, 0), (3, 7), (7, 2)]:
        injected.codes = codes
        pairs = torch.tensor([codes] * len(features))
        with torch.no_grad(), injected.patch():
            expected = reference(features[:, None])
            chunks = head.action_chunk(features, pairs)
            logits = head.code_logits(features, pairs[:, 0])
        torch.testing.assert_close(chunks.flatten(1), expected["predicted_action"][:, 0], **EXACT)
        torch.testing.assert_close(logits, expected["cbet_logits"], **EXACT)


def test_encodes_actions_into_lerobots_codes(workshop: Any) -> None:
    policy, directory = pair(workshop, oracle.CASES[0])
    vqvae = load_checkpoint(str(directory)).network.double().head.vqvae_model
    reference = policy.vqbet.action_head.vqvae_model
    with torch.no_grad():
        # An untrained code book is far from the latents; move it where they are.
        chunks = torch.rand(256, *vqvae.chunk_shape) * 2 - 1
        for layer, theirs in zip(vqvae.vq_layer.codebooks, reference.vq_layer.layers, strict=True):
            moved = vqvae.encoder(chunks[:16].flatten(1))[None]
            layer.embed.copy_(moved)
            theirs._codebook.embed.copy_(moved)
        latents, codes = reference.get_code(chunks)
        ours = vqvae.encode(chunks)
    assert torch.equal(ours.codes, codes)
    assert len(codes.unique(dim=0)) > 8
    torch.testing.assert_close(ours.latents, latents, **EXACT)
