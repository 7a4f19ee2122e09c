"""Plain-torch specification of the BN statistics matching loss, alone and fused with BN and activation."""

import torch
from torch import Tensor

from fd2fast.reference._offsets import (
    Offsets,
    accumulation_dtype,
    device_offsets,
    equal_length,
    host_offsets,
    row_owner,
)
from fd2fast.reference.activation import activation as activate


def segment_statistics(x: Tensor, segments: Offsets) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each segment's rows and pixels.

    x: [N, C, H, W]; segments: int row offsets [S+1] from 0 to N. Returns mean and var [S, C] in float32 (float64 for
    float64 input), both 0 and without gradient for an empty segment; the variance is summed around the mean.
    Gradient, with n = rows H W of the segment: dL/dx = (dL/dmean + 2 dL/dvar (x - mean)) / n.
    """
    x = x.to(accumulation_dtype(x))
    length = equal_length(host_offsets(segments))
    if length is not None:
        parts = x.unflatten(0, (-1, length))  # [S, L, C, H, W]
        var, mean = torch.var_mean(parts, dim=(1, 3, 4), correction=0)
        return mean, var
    bounds = device_offsets(segments, x.device)
    owner = row_owner(bounds, x.shape[0])
    empty = x.new_zeros(bounds.numel() - 1, x.shape[1])
    rows = bounds.diff().clamp_min(1).to(x.dtype).unsqueeze(1)
    mean = empty.index_add(0, owner, x.mean(dim=(2, 3))) / rows
    centred = x - mean.index_select(0, owner)[:, :, None, None]
    var = empty.index_add(0, owner, centred.square().mean(dim=(2, 3))) / rows
    return mean, var


def match_statistics(mean: Tensor, var: Tensor, running_mean: Tensor, running_var: Tensor) -> Tensor:
    """|var - running_var|_2 + |mean - running_mean|_2 over channels: [S, C] x 2, [C] x 2 -> [S].

    For networks where several BN layers see the same channels (DenseNet): statistics are taken once.
    """
    norm = torch.linalg.vector_norm
    return norm(var - running_var.to(var.dtype), dim=-1) + norm(mean - running_mean.to(mean.dtype), dim=-1)


def bn_matching(x: Tensor, running_mean: Tensor, running_var: Tensor, segments: Offsets) -> Tensor:
    """Distance of each segment's batch statistics from the stored ones (SRe2L's BN loss, per segment).

    x: [N, C, H, W]; running_mean, running_var: [C]; segments: int row offsets [S+1] from 0 to N. Returns [S]
    in float32 (float64 for float64 input):

        L[s] = |var_s - running_var|_2 + |mean_s - running_mean|_2

    var_s is the biased variance of the segment's rows and pixels. An empty segment gives 0.
    Gradient, with n = rows H W of the segment, u = (mean - running_mean) / |.|, v = (var - running_var) / |.|
    (0 where the norm is 0): dL/dx = u_c / n + 2 v_c (x - mean_c) / n, an affine function a_c + b_c x.
    """
    loss = match_statistics(*segment_statistics(x, segments), running_mean, running_var)
    return torch.where(device_offsets(segments, x.device).diff() > 0, loss, 0.0)


def bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    *,
    residual: Tensor | None = None,
    activation: str = "relu",
    eps: float = 1e-5,
) -> Tensor:
    """The first result of bn_act_matching, without the loss: act(BN(x) + residual) [N, C, H, W] in x's type."""
    dtype = accumulation_dtype(x)
    scale = weight.to(dtype) * torch.rsqrt(running_var.to(dtype) + eps)
    shift = bias.to(dtype) - running_mean.to(dtype) * scale
    y = x.to(dtype) * scale[:, None, None] + shift[:, None, None]
    if residual is not None:
        y = y + residual.to(dtype)
    return activate(y, activation).to(x.dtype)


def bn_act_matching(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    segments: Offsets,
    *,
    residual: Tensor | None = None,
    activation: str = "relu",
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """Eval-mode BN, optional addition and activation of x, with the matching loss of x.

    x, residual: [N, C, H, W]; weight, bias, running_mean, running_var: [C]; segments: int row offsets [S+1];
    activation: "relu", "relu6" or "identity". Returns y [N, C, H, W] in x's type and bn_matching(x, ...) [S]:

        y = act(weight (x - running_mean) / sqrt(running_var + eps) + bias + residual)

    Gradient: with h = dL/dy where the activation is open (relu: y > 0; relu6: 0 < y < 6), dL/dresidual = h
    and dL/dx = h weight / sqrt(running_var + eps) + the gradient of bn_matching.
    """
    y = bn_act(x, weight, bias, running_mean, running_var, residual=residual, activation=activation, eps=eps)
    return y, bn_matching(x, running_mean, running_var, segments)
