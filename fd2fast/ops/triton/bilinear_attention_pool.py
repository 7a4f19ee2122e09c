"""bilinear_attention_pool by Triton's kernels."""

from typing import Any

import torch
from torch import Tensor

from fd2fast.ops import _dispatch
from fd2fast.ops._layout import dense
from fd2fast.reference._offsets import accumulation_dtype

MAX_MAPS = 64


def _few_maps(features: Tensor, attention: Tensor, **settings: Any) -> str | None:
    maps = attention.shape[1]
    return f"attention has {maps} maps, more than the kernel's {MAX_MAPS}" if maps > MAX_MAPS else None


def _kernels() -> Any:
    return _dispatch.kernels("bilinear_attention_pool")


@torch.library.custom_op("fd2fast::bilinear_attention_pool", mutates_args=())
def _pool(features: Tensor, attention: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """z [N, M*C] and, for the backward, the norms [N] of its roots."""
    return _kernels().bilinear_attention_pool_fwd(features, attention, eps)


@_pool.register_fake
def _(features, attention, eps):
    n, c = features.shape[:2]
    dtype = accumulation_dtype(features, attention)
    return features.new_empty(n, attention.shape[1] * c, dtype=dtype), features.new_empty(n, dtype=dtype)


@torch.library.custom_op("fd2fast::bilinear_attention_pool_backward", mutates_args=())
def _pool_backward(grad: Tensor, features: Tensor, attention: Tensor, z: Tensor, norm: Tensor) -> tuple[Tensor, Tensor]:
    return _kernels().bilinear_attention_pool_bwd(grad, features, attention, z, norm)


@_pool_backward.register_fake
def _(grad, features, attention, z, norm):
    return torch.empty_like(features), torch.empty_like(attention)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    # no zeros for the outputs that only the backward reads
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2], *output)


def _gradient(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple:
    if grad is None:
        return (None,) * 3
    return (*_pool_backward(grad, *ctx.saved_tensors), None)


_pool.register_autograd(_gradient, setup_context=_save)


def _by_triton(features: Tensor, attention: Tensor, *, eps: float) -> Tensor:
    return _pool(dense(features), dense(attention), eps)[0]


_dispatch.register_triton("bilinear_attention_pool", _by_triton, tensors=2, limits=_few_maps)
