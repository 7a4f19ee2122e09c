"""attention_similarity_loss by Triton's kernels."""

from typing import Any

import torch
from torch import Tensor

from fd2fast.ops import _dispatch
from fd2fast.ops._layout import dense, dense_like
from fd2fast.reference._offsets import Offsets, accumulation_dtype, device_offsets


def _kernels() -> Any:
    return _dispatch.kernels("attention_similarity")


@torch.library.custom_op("fd2fast::attention_similarity_loss", mutates_args=())
def _loss(attention: Tensor, prior: Tensor, offsets: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """loss [N] and, for the backward, the weights of a - p [P] and of a [N]."""
    return _kernels().attention_similarity_fwd(attention, prior, offsets, eps)


@_loss.register_fake
def _(attention, prior, offsets, eps):
    dtype = accumulation_dtype(attention, prior)
    return tuple(attention.new_empty(s, dtype=dtype) for s in (attention.shape[0], prior.shape[0], attention.shape[0]))


@torch.library.custom_op("fd2fast::attention_similarity_loss_backward", mutates_args=())
def _loss_backward(
    grad: Tensor, attention: Tensor, prior: Tensor, offsets: Tensor, pull: Tensor, shrink: Tensor
) -> Tensor:
    return _kernels().attention_similarity_bwd(grad, attention, prior, offsets, pull, shrink)


@_loss_backward.register_fake
def _(grad, attention, prior, offsets, pull, shrink):
    return torch.empty_like(attention)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    # no zeros for the outputs that only the backward reads
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *output[1:])


def _gradient(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple:
    if grad is None:
        return (None,) * 4
    return _loss_backward(grad, *ctx.saved_tensors), None, None, None


_loss.register_autograd(_gradient, setup_context=_save)


def _by_triton(attention: Tensor, prior: Tensor, offsets: Offsets, *, eps: float) -> Tensor:
    attention = dense(attention)
    return _loss(attention, dense_like(prior, attention), device_offsets(offsets, attention.device), eps)[0]


_dispatch.register_triton("attention_similarity_loss", _by_triton, tensors=2)
