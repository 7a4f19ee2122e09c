"""The operation prototype_loss (L_F, Eq. 9)."""

from typing import Any

import torch
from torch import Tensor

from fd2fast import reference
from fd2fast.ops import _checks, _dispatch
from fd2fast.reference._offsets import accumulation_dtype

_dispatch.register("prototype_loss", "fd2fast.kernels.prototype_loss")


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


def prototype_loss(
    z: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    *,
    beta: float = 0.5,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """L_F of each sample (paper Eq. 9); see fd2fast.reference.prototype_loss.

    z: float [N, D]; prototypes: float [K, D]; labels: int [N] in [0, K); returns [N] in float32 (float64 for
    float64). Differentiable in z. With K = 1 only the own-class term remains. Raises ValueError for shapes,
    types or devices that do not fit, prototypes that require a gradient, and labels out of range (on a GPU
    only with FD2FAST_CHECK_VALUES=1).
    """
    _checks.shape("z", z, ("N", "D"))
    n, d = z.shape
    _checks.shape("prototypes", prototypes, ("K", d))
    if prototypes.shape[0] == 0:
        raise ValueError("prototypes must be [K, D] with K >= 1, got K = 0")
    _checks.floating("z", z)
    _checks.floating("prototypes", prototypes)
    _checks.same_device("prototypes", prototypes, "z", z)
    _checks.labels("labels", labels, n, prototypes.shape[0])
    _checks.same_device("labels", labels, "z", z)
    _checks.constant("prototypes", prototypes)
    if _dispatch.choose("prototype_loss", (z, prototypes), backend) == "triton":
        return _loss(z, prototypes, labels, beta, eps)[0]
    with torch.autocast(z.device.type, enabled=False):
        return reference.prototype_loss(z, prototypes, labels, beta=beta, eps=eps)
