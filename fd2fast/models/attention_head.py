"""The counterfactual attention (CAL) head: attention maps, bilinear attention pooling, two classifications (Eq. 3-4)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fd2fast import ops

POOL_EPS = 1e-6  # inside the square root of the pooling (CAL)
SCALE = 100.0  # the classifier sees 100 z (CAL)


class HeadOutput(NamedTuple):
    """What the head says about N images."""

    z: Tensor  # [N, M*C], unit norm, non-negative
    attention: Tensor  # [N, M, h, w], post-ReLU
    logits: Tensor  # [N, K], p_raw of Eq. 4
    effect_logits: Tensor | None  # [N, K], p_eff of Eq. 4; None without a counterfactual


class _Attentions(nn.Module):
    """1x1 convolution + BN + ReLU; a module of its own so that its tensors keep the reference's names."""

    def __init__(self, channels: int, maps: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, maps, kernel_size=1, bias=False)
        self.bn = nn.BatchNorm2d(maps, eps=1e-3)

    def forward(self, features: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(features)))


class AttentionHead(nn.Module):
    """CAL head over a feature map of `channels` with `maps` attention maps M and `classes` outputs K.

    State-dict names are the reference's: attentions.conv.weight [M, C, 1, 1], attentions.bn.*, fc.weight [K, M*C].
    Pooling, normalisation and classifier run in fp32 (fp64 for fp64) whatever the weights' dtype and the autocast around.
    """

    def __init__(self, channels: int, classes: int, maps: int):
        super().__init__()
        self.channels, self.classes, self.maps = channels, classes, maps
        self.attentions = _Attentions(channels, maps)
        self.fc = nn.Linear(maps * channels, classes, bias=False)

    def attention(self, features: Tensor) -> Tensor:
        """[N, C, h, w] -> attention maps A [N, M, h, w], non-negative."""
        return self.attentions(features)

    def forward(
        self,
        features: Tensor,
        counterfactual: Literal["random", "ones"] | None = None,
        generator: torch.Generator | None = None,
    ) -> HeadOutput:
        """[N, C, h, w] -> HeadOutput.

        p_raw = W (100 z); with a counterfactual p_eff = p_raw - W (100 z^), where z^ pools with other attention: U(0, 2) per
        element for "random" (training; drawn from `generator` on its device, else from the global one), 1 for "ones"
        (evaluation). Gradients flow through z^ to the features.
        """
        attention = self.attention(features)
        z = ops.bilinear_attention_pool(features, attention, eps=POOL_EPS)
        logits = self._classify(z)
        if counterfactual is None:
            return HeadOutput(z, attention, logits, None)
        if counterfactual == "ones":
            other = torch.ones_like(attention, dtype=z.dtype)
        elif counterfactual == "random":
            device = generator.device if generator is not None else z.device
            other = torch.rand(attention.shape, generator=generator, device=device, dtype=z.dtype).to(z.device) * 2
        else:
            raise ValueError(f"counterfactual must be None, 'random' or 'ones', got {counterfactual!r}")
        z_other = ops.bilinear_attention_pool(features, other, eps=POOL_EPS)
        return HeadOutput(z, attention, logits, logits - self._classify(z_other))

    def _classify(self, z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            return F.linear(SCALE * z, self.fc.weight.to(z.dtype))
