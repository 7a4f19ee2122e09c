"""adam_clamp_ by the C++ kernel."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fd2fast.ops import _dispatch
from fd2fast.ops.cpu.extension import load

_native, WHY_NOT = load("_adam")


def _off_cpu(
    image: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int | Tensor,
    lr: float | Tensor,
    **settings: Any,
) -> str | None:
    if isinstance(step, Tensor) or isinstance(lr, Tensor):
        return "step and lr must be numbers"
    for name, tensor in (("image", image), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if not tensor.is_contiguous():
            return f"{name} has strides {list(tensor.stride())}, not contiguous"
    return _dispatch.off_cpu((image, grad, exp_avg, exp_avg_sq), (torch.float32,))


def _by_cpu(
    image: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    lr: float,
    *,
    betas: tuple[float, float],
    eps: float,
    low: Tensor | Sequence[float],
    high: Tensor | Sequence[float],
) -> None:
    """Measured on an EPYC with AVX-512, 10 images of 224 x 224, two threads: 3.4 ms by torch's operations, 0.4 ms here."""
    assert _native is not None
    n, c, h, w = image.shape
    beta1, beta2 = betas
    rates = 1 - beta1, beta2, 1 - beta2, lr / (1 - beta1**step), (1 - beta2**step) ** 0.5, eps
    bounds = [bound.tolist() if isinstance(bound, Tensor) else bound for bound in (low, high)]
    grad = grad.contiguous()
    pointers = (t.data_ptr() for t in (grad, image, exp_avg, exp_avg_sq))
    _native.step_clamp(n * c, h * w, rates, *bounds, *pointers, torch.get_num_threads())
    for tensor in (image, exp_avg, exp_avg_sq):
        torch.autograd.graph.increment_version(tensor)


_dispatch.register("adam_clamp_", "cpu", _by_cpu, _off_cpu, lambda: WHY_NOT)
