"""VQ-BeT in PyTorch ("Behavior Generation with Latent Actions", figure 2).

Letters in shapes: B batch, N window (`n_obs_steps`), K cameras, S state width, Q action queries
(N + `n_action_pred_token` - 1), C codes per layer, W actions per chunk, A action width, D feature
width (`gpt_output_dim`).

Every tensor has LeRobot's name, so `load_state_dict(strict=True)` takes LeRobot's
`model.safetensors` and LeRobot takes ours.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqbet_edge.model.config import NUM_CODE_LAYERS, VQBeTConfig
from vqbet_edge.model.gpt import GPT
from vqbet_edge.model.rvq import VqVae, mlp
from vqbet_edge.model.vision import RgbEncoder


class ActionHead(nn.Module):
    """Features of action queries -> code logits, offsets, action chunks (section 3.3)."""

    def __init__(self, config: VQBeTConfig) -> None:
        super().__init__()
        width, codes = config.gpt_output_dim, config.vqvae_n_embed
        self.offset_shape = (NUM_CODE_LAYERS, codes, config.action_chunk_size, config.action_dim)
        self.num_codes = codes
        self.vqvae_model = VqVae(config)
        if config.sequentially_select:
            self.map_to_cbet_preds_primary_bin = mlp(width, codes)
            self.map_to_cbet_preds_secondary_bin = mlp(width + codes, codes)
        else:
            self.map_to_cbet_preds_bin = mlp(width, NUM_CODE_LAYERS * codes)
        self.map_to_cbet_preds_offset = mlp(width, torch.Size(self.offset_shape).numel())
        self.sequential = config.sequentially_select

    def code_logits(self, features: Tensor, primary: Tensor) -> Tensor:
        """Logits of both layers' codes.

        Args:
            features: (..., D).
            primary: int64 (...), the primary code that the secondary logits are conditioned on
                when codes are selected sequentially; unused otherwise.

        Returns:
            (..., 2, C).
        """
        if not self.sequential:
            out: Tensor = self.map_to_cbet_preds_bin(features)
            return out.view(*features.shape[:-1], NUM_CODE_LAYERS, self.num_codes)
        one_hot = F.one_hot(primary, self.num_codes).to(features.dtype)
        secondary = self.map_to_cbet_preds_secondary_bin(torch.cat([features, one_hot], dim=-1))
        return torch.stack([self.primary_logits(features), secondary], dim=-2)

    def primary_logits(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., C): logits of the primary code."""
        if self.sequential:
            out: Tensor = self.map_to_cbet_preds_primary_bin(features)
            return out
        joint: Tensor = self.map_to_cbet_preds_bin(features)
        return joint[..., : self.num_codes]

    def offsets(self, features: Tensor) -> Tensor:
        """(..., D) -> (..., 2, C, W, A): the offset of every code of both layers."""
        out: Tensor = self.map_to_cbet_preds_offset(features)
        return out.view(*features.shape[:-1], *self.offset_shape)

    def action_chunk(self, features: Tensor, codes: Tensor) -> Tensor:
        """Decoded chunk plus the chosen codes' offsets.

        Args:
            features: (M, D).
            codes: int64 (M, 2).

        Returns:
            (M, W, A), normalised.
        """
        offsets, rows = self.offsets(features), torch.arange(len(codes), device=codes.device)
        chosen = offsets[rows, 0, codes[:, 0]] + offsets[rows, 1, codes[:, 1]]
        with torch.no_grad():
            decoded = self.vqvae_model.decode(codes)
        return decoded + chosen


class Trunk(nn.Module):
    """All parts of the policy, named `vqbet.*` in the checkpoint."""

    select_target_actions_indices: Tensor

    def __init__(self, config: VQBeTConfig) -> None:
        super().__init__()
        self.rgb_encoder = RgbEncoder(config)
        self.action_token = nn.Parameter(torch.randn(1, 1, config.gpt_input_dim))
        self.state_projector = mlp(config.state_dim, config.gpt_input_dim)
        self.rgb_feature_projector = mlp(self.rgb_encoder.feature_dim, config.gpt_input_dim)
        self.policy = GPT(config)
        self.action_head = ActionHead(config)
        queries = config.n_obs_steps + config.n_action_pred_token - 1
        first, step = torch.arange(queries)[:, None], torch.arange(config.action_chunk_size)
        # Row q holds the indices of query q's action chunk within the training sequence.
        self.register_buffer("select_target_actions_indices", first + step)


class VQBeT(nn.Module):
    """The policy network."""

    def __init__(self, config: VQBeTConfig) -> None:
        super().__init__()
        self.config = config
        self.vqbet = Trunk(config)

    @property
    def head(self) -> ActionHead:
        """Code and offset heads with the RVQ decoder."""
        return self.vqbet.action_head

    def forward(self, images: Tensor, states: Tensor) -> Tensor:
        """Features of every action query: the window's first, then the future's.

        Args:
            images: (B, N, K, 3, H, W) in [0, 1], normalised as the checkpoint asks.
            states: (B, N, S), normalised.

        Returns:
            (B, Q, D). Index N - 1 is the current step, the only one used at rollout.
        """
        batch, window = states.shape[:2]
        tokens = self.vqbet.policy(self._tokens(images, states))  # (B, T, D)
        per_step = self.config.tokens_per_step
        past = tokens[:, per_step - 1 : window * per_step : per_step]
        return torch.cat([past, tokens[:, window * per_step :]], dim=1).view(
            batch, -1, self.config.gpt_output_dim
        )

    def encode_images(self, images: Tensor) -> Tensor:
        """(B, N, K, 3, H, W) -> (B, N, K, gpt_input_dim): one token per frame."""
        features = self.vqbet.rgb_encoder(images.flatten(0, 2))
        out: Tensor = self.vqbet.rgb_feature_projector(features)
        return out.view(*images.shape[:3], -1)

    def _tokens(self, images: Tensor, states: Tensor) -> Tensor:
        """Interleave cameras, state and action query step by step, then the future queries."""
        batch, window = states.shape[:2]
        query = self.vqbet.action_token
        steps = torch.cat(
            [
                self.encode_images(images),
                self.vqbet.state_projector(states)[:, :, None],
                query[:, :, None].expand(batch, window, 1, -1),
            ],
            dim=2,
        )
        future = query.expand(batch, self.config.n_action_pred_token - 1, -1)
        return torch.cat([steps.flatten(1, 2), future], dim=1)
