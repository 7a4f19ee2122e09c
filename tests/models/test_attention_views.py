"""Attention crop and drop against a plain loop over samples."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fd2fast.models.attention_views import attended, choose_maps, crop_and_drop, crop_boxes


def by_hand(attention, draws, size):
    """One sample at a time, in Python numbers."""
    boxes, kept = [], []
    for maps, (u_crop, u_drop, t_crop, t_drop) in zip(attention, draws.tolist(), strict=True):
        weights = [np.sqrt(float(m.sum()) + 1e-6) for m in maps]
        shares = np.cumsum(weights) / np.sum(weights)
        crop_map = maps[int(np.searchsorted(shares, u_crop, side="right"))]
        drop_map = maps[int(np.searchsorted(shares, u_drop, side="right"))]

        def reaches(chosen, theta):
            large = F.interpolate(chosen[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
            return large >= theta * chosen.max()

        at = reaches(crop_map, 0.4 + 0.2 * t_crop).nonzero()
        if len(at) == 0:
            at = torch.ones(size).nonzero()
        box = []
        for axis in (0, 1):
            low, high = int(at[:, axis].min()), int(at[:, axis].max())
            pad = 0.1 * size[axis]
            start = max(int(low - pad), 0)
            end = max(min(int(high + pad), size[axis]), start + 1)
            box.append((start, end - start))
        boxes.append([box[0][0], box[1][0], box[0][1], box[1][1]])
        kept.append(~reaches(drop_map, 0.2 + 0.3 * t_drop))
    return torch.tensor(boxes), torch.stack(kept)[:, None]


@pytest.mark.parametrize(("side", "size"), [(2, (64, 64)), (7, (224, 224)), (4, (64, 48)), (1, (32, 32)), (8, (4, 4))])
def test_boxes_and_drops_are_the_plain_loops(side, size):
    attention = torch.relu(torch.randn(40, 5, side, side))
    attention[0] = 0
    attention[1] = 1
    draws = torch.rand(40, 4)
    boxes, kept = crop_and_drop(attention, draws, size)
    wanted_boxes, wanted_kept = by_hand(attention, draws, size)
    assert torch.equal(boxes, wanted_boxes)
    assert torch.equal(kept, wanted_kept)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= torch.tensor(size)).all()


def test_an_attended_corner_is_cropped_and_dropped():
    attention = torch.zeros(1, 1, 4, 4)
    attention[0, 0, 3, 0] = 2.0
    boxes, kept = crop_and_drop(attention, torch.full((1, 4), 0.5), (64, 64))
    top, left, height, width = boxes[0].tolist()
    assert top + height == 64
    assert left == 0
    assert 16 <= height < 32
    assert 16 <= width < 32
    assert not kept[0, 0, 60, 3]
    assert kept[0, 0, :40].all()
    assert kept[0, 0, :, 30:].all()


def test_maps_are_drawn_in_proportion_to_the_root_of_their_sum():
    attention = torch.stack([torch.full((2, 2), v) for v in (0.0, 1.0, 4.0)])[None]
    uniform = (torch.arange(3000) + 0.5)[None] / 3000
    chosen = choose_maps(attention, uniform)[0, :, 0, 0]
    shares = [(chosen == v).float().mean().item() for v in (0.0, 1.0, 4.0)]
    assert shares == pytest.approx([0.0003, 1 / 3, 2 / 3], abs=1e-3)
    assert choose_maps(attention, torch.ones(1, 1)).max() == 4  # 1 itself is no draw, but must not run over


def test_an_empty_mask_is_the_whole_image_and_a_theta_of_zero_everything():
    assert crop_boxes(torch.zeros(1, 20, 30, dtype=torch.bool)).tolist() == [[0, 0, 20, 30]]
    assert attended(torch.zeros(1, 2, 2), torch.tensor([0.5]), (4, 4)).all()


def test_half_precision_maps_are_understood():
    attention = torch.rand(3, 2, 4, 4).bfloat16()
    draws = torch.rand(3, 4)
    for a, b in zip(
        crop_and_drop(attention, draws, (32, 32)), by_hand(attention.float(), draws, (32, 32)), strict=True
    ):
        assert torch.equal(a, b)
