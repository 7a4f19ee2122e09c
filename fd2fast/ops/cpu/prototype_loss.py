"""prototype_loss by the C++ kernels: distances to all prototypes, and the pull towards them."""

from typing import Any

import torch
from torch import Tensor

from fd2fast.ops import _dispatch
from fd2fast.ops.cpu import native


class _Distances(torch.autograd.Function):
    """|z_n - c_k| [N, K] of z [N, D] and prototypes [K, D], from differences in C++; the gradient is 0 where it is 0."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, prototypes: Tensor) -> Tensor:
        distances = native.distances(z, prototypes)
        ctx.save_for_backward(z, prototypes, distances)
        return distances

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _dispatch.only_once()
        z, prototypes, distances = ctx.saved_tensors
        return native.pull(z, prototypes, torch.where(distances > 0, grad / distances, 0.0)), None


def _off_cpu(z: Tensor, prototypes: Tensor, labels: Tensor, **settings: Any) -> str | None:
    reason = _dispatch.off_cpu((z, prototypes), (torch.float32,))
    if reason is not None:
        return reason
    if len(prototypes) == 1:
        return "there is no other class"
    if z.numel() == 0:
        return "z has no elements"
    for name, tensor in (("z", z), ("prototypes", prototypes)):
        if not tensor.is_contiguous():
            return f"{name} has strides {list(tensor.stride())}, not contiguous"
    return None


def _by_cpu(z: Tensor, prototypes: Tensor, labels: Tensor, *, beta: float, eps: float) -> Tensor:
    """Measured on an EPYC with AVX-512, 10 rows, 200 prototypes of 4096, one thread, forward and backward: torch.cdist
    without products 10 ms, this 2 ms.
    """
    norm = torch.linalg.vector_norm
    apart = _Distances.apply(z, prototypes) / (norm(z, dim=1, keepdim=True) + norm(prototypes, dim=1) + eps)
    own_column = labels.long()[:, None]
    own = apart.gather(1, own_column)
    others = apart.scatter(1, own_column, 0.0).sum(dim=1) / (len(prototypes) - 1)
    loss: Tensor = beta * own[:, 0] + (1 - beta) * (1 - others)
    return loss


_dispatch.register("prototype_loss", "cpu", _by_cpu, _off_cpu, native.missing)
