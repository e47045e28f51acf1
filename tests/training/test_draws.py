"""Random numbers of a batch that is computed in parts, against torch's and torchvision's own."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2 import RandomCrop

from vqbet_edge.training.draws import Shard, causal_attention, dropout, sampled
from vqbet_edge.training.objectives import random_crop

BATCH = 6
WHOLE = Shard(0, BATCH, BATCH)


def seeded(function: Any, *args: Any, **options: Any) -> Tensor:
    torch.manual_seed(5)
    result: Tensor = function(*args, **options)
    return result


def values(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("count", [1, 2, 4])  # four parts of six are not of one size
def test_parts_draw_what_torch_draws_for_the_whole_batch(count: int) -> None:
    parts = [WHOLE.part(index, count) for index in range(count)]
    x, (q, k, v) = values(2 * BATCH, 7), values(3, BATCH, 2, 5, 8)
    probabilities = values(2 * BATCH, 7).softmax(-1)
    attended = seeded(F.scaled_dot_product_attention, q, k, v, is_causal=True, dropout_p=0.3)
    dropped, codes = seeded(F.dropout, x, 0.3), seeded(torch.multinomial, probabilities, 1)
    assert len(codes.unique()) > 3
    for part in parts:
        rows, both = part.rows, slice(2 * part.start, 2 * part.stop)
        assert torch.equal(seeded(dropout, x[both], 0.3, part), dropped[both])
        got = seeded(causal_attention, q[rows], k[rows], v[rows], 0.3, part)
        assert torch.equal(got, attended[rows])
        assert torch.equal(seeded(sampled, probabilities[both], part), codes[both, 0])


def test_crops_are_where_torchvision_crops() -> None:
    images = torch.randint(0, 256, (BATCH, 2, 1, 20, 30, 3), dtype=torch.uint8)
    for size in ((12, 9), (20, 9), (12, 30), (20, 30)):
        expected = seeded(RandomCrop(size), images.movedim(-1, -3)).movedim(-3, -1)
        assert torch.equal(seeded(random_crop, images, size, None, each=False), expected)
        part = WHOLE.part(1, 4)
        got = seeded(random_crop, images[part.rows], size, part, each=False)
        assert torch.equal(got, expected[part.rows])


def test_every_window_is_cropped_at_a_place_of_its_own() -> None:
    rows, columns = torch.meshgrid(torch.arange(20), torch.arange(30), indexing="ij")
    frame = torch.stack([rows, columns, rows * 0], -1).to(torch.uint8)
    images = frame.expand(BATCH, 2, 1, 20, 30, 3)
    whole = seeded(random_crop, images, (12, 9), None, each=True)
    corners = whole[:, :, 0, 0, 0]  # (B, N, 3): where the window was cut
    assert torch.equal(corners[:, 0], corners[:, 1])  # its frames show one place
    assert len(corners[:, 0].unique(dim=0)) == BATCH
    for window, (top, left, _) in zip(whole, corners[:, 0].tolist(), strict=True):
        expected = frame[top : top + 12, left : left + 9]
        assert torch.equal(window, expected.expand(2, 1, 12, 9, 3))
    for part in (WHOLE.part(index, 4) for index in range(4)):
        got = seeded(random_crop, images[part.rows], (12, 9), part, each=True)
        assert torch.equal(got, whole[part.rows])
