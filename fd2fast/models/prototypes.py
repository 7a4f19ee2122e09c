"""Class prototypes in training: the two update rules of Eq. 5, and the target of the centre loss."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Rule = Literal["ema", "last"]


class Prototypes:
    """Both kinds of prototypes of K classes, updated side by side; `ema` and `last` [K, D] and `seen` [K] change in place.

    ema: c_y <- (1 - mu) c_y + mu Norm(z), started at the class's first Norm(z) (paper, Eq. 5). Images of one class in a
    batch count one after the other.
    last: c_y <- c_y + mu (z - Norm(c_y)), started at 0, of several images of a class in a batch the last one (released
    code). As z has norm 1 (or is 0), this is c_y = mu z of the class's last image, and is computed so.
    """

    def __init__(self, ema: Tensor, last: Tensor, seen: Tensor, mu: float):
        self.ema, self.last, self.seen, self.mu = ema, last, seen, mu

    @torch.no_grad()
    def center_target(self, z: Tensor, labels: Tensor, rule: Rule) -> Tensor:
        """Norm(c_y) [N, D] before this batch's update; for ema and a class not seen before, its first Norm(z) in the batch."""
        if rule == "last":
            return F.normalize(self.last[labels], dim=1, eps=1e-12)
        first = _same(labels).int().argmax(1)
        known = self.seen[labels][:, None]
        return torch.where(
            known, F.normalize(self.ema[labels], dim=1, eps=1e-12), F.normalize(z[first], dim=1, eps=1e-12)
        )

    @torch.no_grad()
    def update(self, z: Tensor, labels: Tensor) -> None:
        """Take a batch in: z [N, D] of unit norm, labels [N]."""
        unit = F.normalize(z.detach().to(self.ema.dtype), dim=1, eps=1e-12)
        same = _same(labels)
        order = torch.arange(len(labels), device=labels.device)
        last = torch.where(same, order, -1).amax(1)
        later = (same & (order[None, :] > order[:, None])).sum(1)  # images of the same class after this one
        count = same.sum(1)
        starts = (later == count - 1) & ~self.seen[labels]
        weight = (1 - self.mu) ** later.to(unit.dtype) * torch.where(starts, 1.0, unit.new_tensor(self.mu))
        mixed = (same * weight) @ unit
        decay = (1 - self.mu) ** count.to(unit.dtype) * self.seen[labels]
        new = decay[:, None] * self.ema[labels] + mixed
        # every image of a class writes its last image's row: duplicates write equal values, in whatever order
        self.ema[labels] = new[last]
        self.last[labels] = self.mu * unit[last]
        self.seen[labels] = True


def _same(labels: Tensor) -> Tensor:
    return labels[:, None] == labels[None, :]
