"""The published recover code's own building blocks, with their signatures and state-dict names, on this engine's operations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fd2fast import ops
from fd2fast.dropin.networks import NAMES, SMALL, STOCKED, small_backbone, stocked
from fd2fast.errors import UserError, nearest
from fd2fast.models.attention_head import POOL_EPS, SCALE, AttentionHead

_METHODS, _TARGETS = ("l2", "l1", "cos"), ("up", "down")


class BAP(nn.Module):
    """Bilinear attention pooling; pool "GAP" (the mean over the map) or "GMP" (its maximum)."""

    def __init__(self, pool: str = "GAP"):
        super().__init__()
        if pool not in ("GAP", "GMP"):
            raise ValueError(f"pool must be GAP or GMP, got {pool!r}")
        self.pool = None if pool == "GAP" else nn.AdaptiveMaxPool2d(1)

    def forward(self, features: Tensor, attentions: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, H, W], [B, M, h, w] -> (z, counterfactual z) [B, M*C], both of unit norm.

        The counterfactual's attention is uniform in [0, 2) in train mode and 1 in eval mode.
        """
        if attentions.shape[-2:] != features.shape[-2:]:
            attentions = F.interpolate(attentions, size=features.shape[-2:], mode="bilinear", align_corners=True)
        if self.pool is None:
            z = ops.bilinear_attention_pool(features, attentions, eps=POOL_EPS)
        else:
            maps = [self.pool(features * attentions[:, i : i + 1]).flatten(1) for i in range(attentions.shape[1])]
            z = _rooted(torch.cat(maps, dim=1))
        if self.training:
            other = torch.zeros_like(attentions).uniform_(0, 2)
            return z, ops.bilinear_attention_pool(features, other, eps=POOL_EPS)
        # every map pools alike
        mean = _rooted(features.to(z.dtype).mean(dim=(2, 3)))
        count = attentions.shape[1]
        return z, mean.repeat(1, count) / count**0.5


def _rooted(pooled: Tensor) -> Tensor:
    return F.normalize(torch.sign(pooled) * torch.sqrt(pooled.abs() + POOL_EPS), dim=-1)


class CAL(nn.Module):
    """The counterfactual attention head for one of the published backbones.

    State-dict names: attentions.conv.weight [M, C, 1, 1], attentions.bn.*, fc.weight [K, M*C]. `load_state_dict` is strict:
    weights of another M or class count raise.
    """

    def __init__(self, num_classes: int, M: int = 32, net: str = "ResNet18", source: str = STOCKED):  # noqa: N803
        """net, source: as the published code names them, "torchvision" or "CVDD". ValueError for others."""
        super().__init__()
        if net not in NAMES:
            raise ValueError(f"Unsupported net: {net}; {nearest(net, NAMES)}")
        if source not in (STOCKED, SMALL):
            raise ValueError(f"source must be {STOCKED} or {SMALL}, got {source!r}")
        self.num_classes, self.M = num_classes, M
        if source == STOCKED:
            self.num_features, side = stocked(net, half_shuffle=True).channels, 7
        else:
            with torch.device("meta"):
                self.num_features, side = small_backbone(net, num_classes).channels, 28
        self.shape_features = (self.num_features, side, side)
        head = AttentionHead(self.num_features, num_classes, M)
        self.attentions = head.attentions
        self.bap = BAP(pool="GAP")
        self.fc = head.fc

    def visualize(self, feature_maps: Tensor) -> tuple[Tensor, Tensor]:
        """[B, C, h, w] -> (logits [B, K], attention maps [B, M, h, w])."""
        attention = self.attentions(feature_maps)
        return self.fc(self.bap(feature_maps, attention)[0] * SCALE), attention

    def forward(self, feature_maps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """[B, C, h, w] -> (p_raw, p_eff [B, K], z [B, M*C], attention map, all attention maps [B, M, h, w]).

        The attention map is the mean [B, 1, h, w] in eval mode; in train mode two maps of each sample, [B, 2, h, w], drawn by
        numpy's global generator with probability in proportion to the root of their sums.
        """
        attention = self.attentions(feature_maps)
        z, other = self.bap(feature_maps, attention)
        raw = self.fc(z * SCALE)
        effect = raw - self.fc(other * SCALE)
        if not self.training:
            return raw, effect, z, attention.mean(dim=1, keepdim=True), attention
        weights = F.normalize(torch.sqrt(attention.detach().sum(dim=(2, 3)) + POOL_EPS), p=1, dim=1).cpu().numpy()
        drawn = np.stack([np.random.choice(self.M, 2, p=own) for own in weights])
        rows = torch.arange(len(attention), device=attention.device)[:, None]
        chosen = attention[rows, torch.from_numpy(drawn).to(attention.device)]
        return raw, effect, z, chosen, attention

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As torch's; a tensor of another shape is an error that names both, whatever `strict`."""
        for name, own in self.state_dict().items():
            given = state_dict.get(name)
            if isinstance(given, Tensor) and given.shape != own.shape:
                raise UserError(f"CAL: {name} is {list(given.shape)}, wanted {list(own.shape)} for M = {self.M}")
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


class BNFeatureHook:
    """Measures, at each forward, how far the statistics of a BN layer's input are from its running ones: `r_feature`."""

    def __init__(self, module: nn.BatchNorm2d):
        self.r_feature: Tensor | None = None
        self._input: Tensor | None = None
        self.hook = module.register_forward_hook(self.hook_fn)

    def hook_fn(self, module: Any, input: tuple[Tensor, ...], output: Tensor) -> None:
        """Called by the layer."""
        self._input = input[0]
        self.r_feature = ops.bn_matching(input[0], module.running_mean, module.running_var, (0, len(input[0])))[0]

    @property
    def mean(self) -> Tensor | None:
        """Of the last input, by channel."""
        return None if self._input is None else self._input.mean([0, 2, 3])

    @property
    def var(self) -> Tensor | None:
        """Of the last input, by channel, biased."""
        return None if self._input is None else self._input.var([0, 2, 3], unbiased=False)

    def close(self) -> None:
        """No more measuring."""
        self.hook.remove()
        self._input = None


def _check(method: str, target: str) -> tuple[str, str]:
    method, target = method.lower(), target.lower()
    if method not in _METHODS:
        raise ValueError(f"method must be one of {', '.join(_METHODS)}, got {method!r}")
    if target not in _TARGETS:
        raise ValueError(f"target must be one of {', '.join(_TARGETS)}, got {target!r}")
    return method, target


def _distance(u: Tensor, v: Tensor, method: str, eps: float) -> Tensor:
    """Of rows that broadcast, in [0, 1]."""
    if method == "l2":
        return ops.normalized_l2(u, v, eps=eps)
    if method == "cos":
        return (1 - F.cosine_similarity(u, v, dim=-1, eps=eps)) / 2
    return (u - v).abs().sum(-1) / (u.abs().sum(-1) + v.abs().sum(-1) + eps)


def intra_feature_center_dist(
    feature_matrix: Tensor,
    labels: Tensor,
    feature_center: Tensor,
    method: str = "cos",
    target: str = "down",
    eps: float = 1e-6,
) -> Tensor:
    """Mean distance (target "down"), or 1 minus it, of [B, D] from its classes' centres [K, D]; a scalar."""
    method, target = _check(method, target)
    if method == "l2" and len(feature_center) > 1:
        mean = ops.prototype_loss(feature_matrix, feature_center.detach(), labels, beta=1.0, eps=eps).mean()
    else:
        mean = _distance(feature_matrix, feature_center[labels], method, eps).mean()
    return 1 - mean if target == "up" else mean


def inter_feature_center_dist(
    feature_matrix: Tensor,
    labels: Tensor,
    feature_center: Tensor,
    method: str = "cos",
    target: str = "up",
    eps: float = 1e-6,
) -> Tensor:
    """Mean distance ("down"), or 1 minus it ("up"), of [B, D] from the centres [K, D] of all other classes; a scalar."""
    method, target = _check(method, target)
    if method == "l2" and len(feature_center) > 1:
        away = ops.prototype_loss(feature_matrix, feature_center.detach(), labels, beta=0.0, eps=eps).mean()
        return away if target == "up" else 1 - away
    if method == "cos":
        norms = [v.norm(dim=1).clamp_min(eps) for v in (feature_matrix, feature_center)]
        apart = (1 - feature_matrix @ feature_center.T / (norms[0][:, None] * norms[1])) / 2
    else:
        sums = [v.abs().sum(1) for v in (feature_matrix, feature_center)]
        apart = torch.cdist(feature_matrix, feature_center, p=1) / (sums[0][:, None] + sums[1] + eps)
    own = apart.gather(1, labels[:, None])[:, 0]
    mean = ((apart.sum(1) - own) / (len(feature_center) - 1)).mean()
    return 1 - mean if target == "up" else mean


def features_dist(
    targets: Tensor, source: Tensor, method: str = "cos", target: str = "up", eps: float = 1e-6
) -> Tensor:
    """Mean distance ("down"), or 1 minus it ("up"), of one image's maps [1, c, h, w] from others' [b, c, H, W]; a scalar.

    Maps of another size are resized to the source's (bilinear). l2: constant in `targets`.
    """
    method, target = _check(method, target)
    if targets.shape[-2:] != source.shape[-2:]:
        targets = F.interpolate(targets, size=source.shape[-2:], mode="bilinear", align_corners=False)
    if method == "l2":
        away = ops.attention_similarity_loss(source, targets.detach(), (0, len(targets)), eps=eps)[0]
        return away if target == "up" else 1 - away
    mean = _distance(targets.flatten(1), source.flatten(1), method, eps).mean()
    return 1 - mean if target == "up" else mean
