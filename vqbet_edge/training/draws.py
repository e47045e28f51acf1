"""Random numbers that belong to a sample, whichever process computes it.

Every process seeds alike, draws what is random for the whole batch, and takes its own rows. A
process that has the whole batch uses torch's own operators, which draw the same on a CPU.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Shard(NamedTuple):
    """Rows `start` to `stop` of a batch of `whole` windows are computed at once."""

    start: int
    stop: int
    whole: int

    @property
    def rows(self) -> slice:
        """Of the batch."""
        return slice(self.start, self.stop)

    @property
    def size(self) -> int:
        """How many rows."""
        return self.stop - self.start

    def part(self, index: int, count: int) -> "Shard":
        """One of `count` parts; there may be none in it."""
        first, end = (self.start + self.size * place // count for place in (index, index + 1))
        return Shard(first, end, self.whole)


def drawn(like: Tensor, shard: Shard | None, draw: Callable[[Tensor], Tensor]) -> Tensor:
    """Random numbers in the shape of `like`, a shard's rows of those of the whole batch.

    Args:
        like: (R, ...), R a multiple of the shard's windows, which follow each other in it.
        shard: None is a whole batch.
        draw: fills a tensor.
    """
    if shard is None:
        return draw(torch.empty_like(like))
    rows = len(like) // shard.size
    whole = draw(like.new_empty(rows * shard.whole, *like.shape[1:]))
    return whole[rows * shard.start : rows * shard.stop]


class Dropout(nn.Dropout):
    """torch's, of a shard."""

    def forward(self, x: Tensor, shard: Shard | None = None) -> Tensor:
        """(R, ...), R as in `drawn`."""
        return dropout(x, self.p, shard) if self.training else x


def dropout(x: Tensor, p: float, shard: Shard | None) -> Tensor:
    """`F.dropout` of a shard."""
    if shard is None or not p:
        return F.dropout(x, p)
    return x * drawn(x, shard, lambda whole: whole.bernoulli_(1 - p)).div(1 - p)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, p: float, shard: Shard | None) -> Tensor:
    """`F.scaled_dot_product_attention` of a shard, (B, heads, T, D / heads) each."""
    if shard is None or not p:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
    # As torch does on a CPU, to the bit.
    scale = math.sqrt(1 / math.sqrt(q.shape[-1]))
    future = q.new_full((q.shape[-2],) * 2, -math.inf).triu(1)
    weights = (q * scale) @ (k.transpose(-2, -1) * scale) + future
    return dropout(weights.softmax(dim=-1), p, shard) @ v


def sampled(probabilities: Tensor, shard: Shard | None) -> Tensor:
    """One index per row of probabilities (R, C), R as in `drawn`; int64 (R,).

    As `torch.multinomial` draws it, without the checks for which some releases wait for the device.
    """
    waits = drawn(probabilities, shard, lambda whole: whole.exponential_())
    return (probabilities / waits).argmax(dim=-1)
