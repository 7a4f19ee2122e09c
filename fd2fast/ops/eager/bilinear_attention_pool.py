"""bilinear_attention_pool in torch's operations, keeping the maps in their own type."""

from typing import Any

import torch
from torch import Tensor

from fd2fast.ops import _dispatch
from fd2fast.ops.eager import why_not
from fd2fast.reference._offsets import accumulation_dtype


class _Pool(torch.autograd.Function):
    """Bilinear attention pooling that keeps its inputs and the matrix G; fd2fast.reference has the equations."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, attention: Tensor, eps: float) -> Tensor:
        wide = accumulation_dtype(features, attention)
        f, a = features.to(wide).flatten(2), attention.to(wide).flatten(2)
        gram = torch.bmm(a, f.transpose(1, 2)) / f.shape[2]  # [N, M, C]
        ctx.save_for_backward(features, attention, gram)
        ctx.eps = eps
        return _unit_root(gram, eps)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        features, attention, gram = ctx.saved_tensors
        z, norm = _unit_root(gram, ctx.eps)
        grad = (grad - z * (z * grad).sum(dim=1, keepdim=True)) / norm
        slope = torch.where(gram == 0, 0.0, 0.5 * torch.rsqrt(gram.abs() + ctx.eps))
        grad = grad.view_as(gram) * slope / (features.shape[2] * features.shape[3])
        f, a = features.to(grad.dtype).flatten(2), attention.to(grad.dtype).flatten(2)
        grad_f = torch.bmm(grad.transpose(1, 2), a).view_as(features).to(features.dtype)
        grad_a = torch.bmm(grad, f).view_as(attention).to(attention.dtype)
        return grad_f, grad_a, None


def _unit_root(gram: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    root = (torch.sign(gram) * torch.sqrt(gram.abs() + eps)).flatten(1)
    # never below its bound: a sample whose G is 0 everywhere has z = 0 and no gradient
    norm = torch.linalg.vector_norm(root, dim=1, keepdim=True).clamp_min(1e-12)
    return root / norm, norm


def _by_torch(features: Tensor, attention: Tensor, *, eps: float) -> Tensor:
    z: Tensor = _Pool.apply(features, attention, eps)
    return z


_dispatch.register("bilinear_attention_pool", "eager", _dispatch.without_autocast(_by_torch), why_not)
