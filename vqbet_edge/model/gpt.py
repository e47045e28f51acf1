"""The causal transformer over the window of observation tokens (GPT-2, pre-norm, exact GELU)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqbet_edge.model.config import VQBeTConfig


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention in which a token sees itself and the tokens before it."""

    bias: Tensor

    def __init__(self, config: VQBeTConfig) -> None:
        super().__init__()
        width, block = config.gpt_hidden_dim, config.gpt_block_size
        self.num_heads = config.gpt_n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)
        self.resid_dropout = nn.Dropout(config.dropout)
        # LeRobot keeps the mask in the checkpoint, so it is a buffer here too.
        self.register_buffer("bias", torch.ones(block, block).tril().view(1, 1, block, block))

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        q, k, v = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, T, D / heads)
            for part in self.c_attn(x).chunk(3, dim=2)
        )
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        out: Tensor = self.resid_dropout(self.c_proj(y.transpose(1, 2).flatten(2)))
        return out


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VQBeTConfig) -> None:
        super().__init__()
        width = config.gpt_hidden_dim
        self.ln_1 = nn.LayerNorm(width)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            nn.Dropout(config.dropout),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        x = x + self.attn(self.ln_1(x))
        out: Tensor = x + self.mlp(self.ln_2(x))
        return out


class GPT(nn.Module):
    """Tokens of width `gpt_input_dim` -> features of width `gpt_output_dim`."""

    def __init__(self, config: VQBeTConfig) -> None:
        super().__init__()
        width = config.gpt_hidden_dim
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Linear(config.gpt_input_dim, width),
                "wpe": nn.Embedding(config.gpt_block_size, width),
                "drop": nn.Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.gpt_n_layer)),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, config.gpt_output_dim, bias=False)
        self._init_weights(config.gpt_n_layer)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, gpt_input_dim) -> (B, T, gpt_output_dim), T at most `gpt_block_size`."""
        parts = self.transformer
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = parts["drop"](parts["wte"](tokens) + parts["wpe"](positions))
        for block in parts["h"]:  # type: ignore[attr-defined]
            x = block(x)
        out: Tensor = self.lm_head(parts["ln_f"](x))
        return out

    def _init_weights(self, num_layers: int) -> None:
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        # GPT-2 scales the projections into the residual stream by their number; upstream does so
        # for the attention's projection only.
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * num_layers))
