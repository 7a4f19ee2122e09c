"""bilinear_attention_pool with its roots and their norm by the C++ kernels; the two products are torch's."""

from typing import Any

import torch
from torch import Tensor

from fd2fast.ops import _dispatch
from fd2fast.ops.cpu import native


class _Pool(torch.autograd.Function):
    """Keeps the maps in their own type, the matrix G, z and the norms; fd2fast.reference has the equations."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, attention: Tensor, eps: float) -> Tensor:
        f, a = features.float().flatten(2), attention.float().flatten(2)
        gram = (torch.bmm(a, f.transpose(1, 2)) / f.shape[2]).flatten(1)  # [N, M C]
        z, norms = native.unit_root_forward(gram, eps)
        ctx.save_for_backward(features, attention, gram, z, norms)
        ctx.eps = eps
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _dispatch.only_once()
        features, attention, gram, z, norms = ctx.saved_tensors
        f, a = features.float().flatten(2), attention.float().flatten(2)
        by_gram = native.unit_root_backward(gram, z, norms, grad, ctx.eps) / f.shape[2]
        by_gram = by_gram.view(len(f), a.shape[1], f.shape[1])
        grad_f = torch.bmm(by_gram.transpose(1, 2), a).view_as(features).to(features.dtype)
        grad_a = torch.bmm(by_gram, f).view_as(attention).to(attention.dtype)
        return grad_f, grad_a, None


def _by_cpu(features: Tensor, attention: Tensor, *, eps: float) -> Tensor:
    z: Tensor = _Pool.apply(features, attention, eps)
    return z


def _off_cpu(features: Tensor, attention: Tensor, **settings: Any) -> str | None:
    if features.numel() == 0 or attention.numel() == 0:
        return "a map has no elements"
    return _dispatch.off_cpu((features, attention), (torch.float32, torch.bfloat16))


_dispatch.register("bilinear_attention_pool", "cpu", _dispatch.without_autocast(_by_cpu), _off_cpu, native.missing)
