"""What an iteration changes: images, Adam's moments and loss scales, all of them tensors changed in place."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

FIRST_SCALE = 2.0**16
# By row, and of the phase's side.
BY_ROW = ("images", "exp_avg", "exp_avg_sq")
NAMES = (*BY_ROW, "scale", "clean")


class State:
    """images, exp_avg, exp_avg_sq [N, 3, S, S]; scale, clean [segments]: fp16's loss scale and iterations without overflow."""

    def __init__(self, images: Tensor, segments: int):
        self.images = images
        self.exp_avg = torch.zeros_like(images)
        self.exp_avg_sq = torch.zeros_like(images)
        self.scale = torch.full((segments,), FIRST_SCALE, device=images.device)
        self.clean = torch.zeros(segments, device=images.device)

    def tensors(self) -> dict[str, Tensor]:
        """By name, as they are."""
        return {name: getattr(self, name).detach() for name in NAMES}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies of these take the place of the tensors of their names."""
        device = self.scale.device
        for name in NAMES:
            setattr(self, name, tensors[name].to(device, copy=True))


class NewImages:
    """Images with fresh moments take the place of the old ones, which are kept until it is known that they are not needed.

    On the host, where a GPU's memory is the limit. Raises what making the moments raises, before anything is changed.
    """

    def __init__(self, state: State, images: Tensor):
        moments = [torch.zeros_like(images) for _ in range(2)]
        self._state = state
        self._before = {name: getattr(state, name).to("cpu") for name in BY_ROW}
        state.images, (state.exp_avg, state.exp_avg_sq) = images, moments

    def undo(self) -> None:
        """The old ones are back."""
        device = self._state.scale.device
        for name in self._before:
            setattr(self._state, name, None)
        for name, tensor in self._before.items():
            setattr(self._state, name, tensor.to(device))
