"""Losses, codes, gradients and codebooks against LeRobot's with the same weights."""

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vqbet_edge.runtime.normalization import Affine
from vqbet_edge.training.backend import TorchBackend
from vqbet_edge.training.checkpoint import Checkpoint
from vqbet_edge.training.codebooks import revive
from vqbet_edge.training.config import Feature, FeatureType, VQBeTConfig
from vqbet_edge.training.description import without_graphs
from vqbet_edge.training.evaluation.actors import Siblings
from vqbet_edge.training.layouts import Layout
from vqbet_edge.training.network import Codebook, VQBeT
from vqbet_edge.training.normalization import Scalings
from vqbet_edge.training.objectives import PolicyObjective, VqVaeObjective

pytestmark = pytest.mark.usefixtures("double")

# Between two orders of the same operations in float64.
EXACT = 1e-11

SIZES: dict[str, Any] = {
    "n_obs_steps": 3,
    "gpt_n_layer": 2,
    "gpt_n_head": 2,
    "gpt_hidden_dim": 32,
    "gpt_input_dim": 24,
    "gpt_output_dim": 40,
    "vqvae_n_embed": 8,
    "vqvae_embedding_dim": 16,
    "vqvae_enc_hidden_dim": 32,
    "crop_shape": (40, 36),
    "dropout": 0.0,
}
SHAPES = {"observation.image": (3, 48, 44), "observation.state": (3,), "action": (2,)}
KINDS = {"observation.image": "VISUAL", "observation.state": "STATE", "action": "ACTION"}
IMAGE = "observation.image"


def build_reference(lerobot: Callable[[str], ModuleType], **overrides: object) -> nn.Module:
    types = lerobot("configs.types")
    features = {
        key: types.PolicyFeature(types.FeatureType[KINDS[key]], shape)
        for key, shape in SHAPES.items()
    }
    config = lerobot("policies.vqbet.configuration_vqbet").VQBeTConfig(
        input_features={k: v for k, v in features.items() if k != "action"},
        output_features={"action": features["action"]},
        device="cpu",
        **{"use_group_norm": True, "pretrained_backbone_weights": None, **SIZES, **overrides},
    )
    torch.manual_seed(0)
    policy: nn.Module = lerobot("policies.vqbet.modeling_vqbet").VQBeTPolicy(config)
    return policy.double()


def build_ours(reference: nn.Module, **overrides: object) -> VQBeT:
    features = {key: Feature(FeatureType[KINDS[key]], shape) for key, shape in SHAPES.items()}
    config = VQBeTConfig(
        input_features={k: v for k, v in features.items() if k != "action"},
        output_features={"action": features["action"]},
        **SIZES,
        **overrides,
    )
    network = VQBeT(config).double()
    network.load_state_dict(reference.state_dict(), strict=True)
    return network


def random_batch() -> dict[str, Tensor]:
    torch.manual_seed(1)
    height, width = SHAPES[IMAGE][1:]
    return {
        IMAGE: torch.randint(0, 256, (4, 3, 1, height, width, 3), dtype=torch.uint8),
        "observation.state": torch.rand(4, 3, 3) * 2 - 1,
        "action": torch.rand(4, 9, 2) * 2 - 1,
    }


def as_reference_sees(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch | {IMAGE: batch[IMAGE][:, :, 0].movedim(-1, -3).float() / 255}


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {k: p.grad for k, p in module.named_parameters() if p.grad is not None}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """To 1e-11 of the scale of each layer's tensors.

    A tensor alone is no scale: the softmax over positions makes the gradient of the bias before it
    zero, and what is left of it is rounding.
    """
    assert ours.keys() == theirs.keys()
    scales: dict[str, float] = {}
    for key, expected in theirs.items():
        layer = key.rpartition(".")[0]
        scales[layer] = max(scales.get(layer, 0.0), float(expected.double().abs().max()))
    for key, expected in theirs.items():
        scale = scales[key.rpartition(".")[0]]
        torch.testing.assert_close(ours[key], expected, rtol=EXACT, atol=EXACT * scale, msg=key)


def test_phase1_losses_codes_gradients_and_codebooks(
    lerobot: Callable[[str], ModuleType],
) -> None:
    reference = build_reference(lerobot)
    network = build_ours(reference)
    theirs = reference.vqbet.action_head.vqvae_model
    objective = VqVaeObjective(network.head.vqvae_model, lambda tensor: tensor)
    actions = random_batch()["action"]
    chunks = actions.unfold(1, 5, 1).transpose(2, 3).flatten(0, 1)
    for _ in range(3):  # the codebooks of one step decide the codes of the next
        expected, (reconstruction, commitment, _, _) = theirs.vqvae_forward(chunks)
        got = objective(chunks)
        torch.testing.assert_close(
            got.loss, expected[0] if expected.ndim else expected, rtol=EXACT, atol=0
        )
        torch.testing.assert_close(got.reconstruction, reconstruction, rtol=EXACT, atol=0)
        torch.testing.assert_close(got.commitment, commitment, rtol=EXACT, atol=0)
        reference.zero_grad()
        objective.zero_grad()
        expected.backward()
        got.loss.backward()
        assert_same(gradients(objective.vqvae), gradients(theirs))
        assert_same(dict(objective.vqvae.named_buffers()), dict(theirs.named_buffers()))
        objective.eval(), theirs.eval()
        torch.testing.assert_close(objective.vqvae.encode(chunks).codes, theirs.get_code(chunks)[1])
        objective.train(), theirs.train()


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("crop_is_random", [False, True])
def test_phase2_losses_and_gradients(
    lerobot: Callable[[str], ModuleType], sequential: bool, crop_is_random: bool
) -> None:
    options = {"sequentially_select": sequential, "crop_is_random": crop_is_random}
    reference = build_reference(lerobot, **options)
    vqvae = reference.vqbet.action_head.vqvae_model
    vqvae.discretized.fill_(True)
    vqvae.vq_layer.freeze_codebook.fill_(True)
    network = build_ours(reference, **options)
    everything = Scalings({key: Affine.identity(3) for key in SHAPES}, {}, {})
    objective = PolicyObjective(network, everything).double().train()
    batch = random_batch()
    frozen = {k: v.clone() for k, v in network.head.vqvae_model.state_dict().items()}
    torch.manual_seed(2)
    expected, parts = reference.train()(as_reference_sees(batch))
    torch.manual_seed(2)
    chunks = batch["action"][:, network.vqbet.select_target_actions_indices]
    got = objective(batch[IMAGE], batch["observation.state"], chunks)
    torch.testing.assert_close(got.loss, expected, rtol=EXACT, atol=0)
    weights = network.config
    classification = (
        weights.primary_code_loss_weight * got.primary
        + weights.secondary_code_loss_weight * got.secondary
    )
    for ours, name in (
        (classification, "classification_loss"),
        (got.offset, "offset_loss"),
        (got.primary_accuracy, "equal_primary_code_rate"),
        (got.secondary_accuracy, "equal_secondary_code_rate"),
    ):
        assert float(ours) == pytest.approx(parts[name], rel=EXACT)
    expected.backward()
    got.loss.backward()
    assert_same(gradients(network), gradients(reference))
    assert_same(network.head.vqvae_model.state_dict(), frozen)


def test_dead_codes_go_where_chunks_are_represented_worst() -> None:
    """Once; what is used stays where it is, and so do all where none is dead."""
    book = Codebook(4, 2)
    book.embed[0] = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [50, 50]])
    book.cluster_size[0] = torch.tensor([10.0, 10, 10, 0])
    near = book.embed[0, :3].repeat(20, 1) + 0.01 * torch.randn(60, 2)
    odd = torch.tensor([5.0, 5]) + torch.rand(16, 2)
    vqvae: Any = SimpleNamespace(encoder=nn.Identity(), vq_layer=SimpleNamespace(codebooks=[book]))
    chunks, before = torch.cat([near, odd])[:, None], book.embed.clone()
    assert revive(vqvae, chunks) == 1
    assert torch.equal(book.embed[0, :3], before[0, :3])
    assert (book.embed[0, 3] == odd[odd.norm(dim=-1).argmax()]).all()
    assert book.cluster_size[0, 3] == 7.5  # an equal share
    before = book.embed.clone()
    assert revive(vqvae, chunks) == 0
    assert torch.equal(book.embed, before)


def test_a_checkpoint_acts_as_lerobots_select_action(
    lerobot: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = build_reference(lerobot).eval()
    reference.vqbet.action_head.vqvae_model.discretized.fill_(True)
    network = build_ours(reference).eval().requires_grad_(False)
    checkpoint = Checkpoint(network, {}, {}, Layout.V0_4, "test", "")
    actor = Siblings(without_graphs(checkpoint), TorchBackend(checkpoint), 2, temperature=0)
    rng = np.random.default_rng(0)
    monkeypatch.setattr(torch, "multinomial", lambda p, **_: p.argmax(-1, keepdim=True))
    reference.reset()
    for slot in range(2):
        actor.reset(slot, slot)
    for step in range(12):
        images = rng.integers(0, 256, (2, 48, 44, 3), np.uint8)
        states = rng.normal(size=(2, 3)).astype(np.float32)
        if step == 7:  # a new episode begins in the other slot
            actor.reset(0, 5)
        got = actor.act({"observation.image": images, "observation.state": states})
        pixels = torch.from_numpy(images[1:]).permute(0, 3, 1, 2) / 255
        batch = {
            "observation.image": pixels,
            "observation.state": torch.from_numpy(states[1:]).double(),
        }
        np.testing.assert_allclose(
            got[1], reference.select_action(batch)[0], rtol=EXACT, atol=EXACT
        )
