"""prototype_loss by Triton's kernels."""

from typing import Any

import torch
from torch import Tensor

from fd2fast.ops import _dispatch
from fd2fast.reference._offsets import accumulation_dtype


def _kernels() -> Any:
    return _dispatch.kernels("prototype_loss")


@torch.library.custom_op("fd2fast::prototype_loss", mutates_args=())
def _loss(z: Tensor, prototypes: Tensor, labels: Tensor, beta: float, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """loss [N] and, for the backward, the weights of z - c [K, N] and of z [N]."""
    return _kernels().prototype_loss_fwd(z, prototypes, labels, beta, eps)


@_loss.register_fake
def _(z, prototypes, labels, beta, eps):
    n, dtype = z.shape[0], accumulation_dtype(z, prototypes)
    return z.new_empty(n, dtype=dtype), z.new_empty(prototypes.shape[0], n, dtype=dtype), z.new_empty(n, dtype=dtype)


@torch.library.custom_op("fd2fast::prototype_loss_backward", mutates_args=())
def _loss_backward(grad: Tensor, z: Tensor, prototypes: Tensor, pull: Tensor, shrink: Tensor) -> Tensor:
    return _kernels().prototype_loss_bwd(grad, z, prototypes, pull, shrink)


@_loss_backward.register_fake
def _(grad, z, prototypes, pull, shrink):
    return z.new_empty(z.shape)


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    # no zeros for the outputs that only the backward reads
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2], *output[1:])


def _gradient(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple:
    if grad is None:
        return (None,) * 5
    return _loss_backward(grad, *ctx.saved_tensors), None, None, None, None


_loss.register_autograd(_gradient, setup_context=_save)


def _by_triton(z: Tensor, prototypes: Tensor, labels: Tensor, *, beta: float, eps: float) -> Tensor:
    return _loss(z, prototypes, labels, beta, eps)[0]


_dispatch.register_triton("prototype_loss", _by_triton, tensors=2)
