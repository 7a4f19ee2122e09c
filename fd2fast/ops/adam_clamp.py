"""The operation adam_clamp_: one Adam step and the per-channel clamp, in place."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fd2fast import reference
from fd2fast.ops import _checks, _dispatch


def _by_reference(
    image: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int | Tensor,
    lr: float | Tensor,
    **settings: Any,
) -> None:
    reference.adam_clamp_(image, grad, exp_avg, exp_avg_sq, step, lr=lr, **settings)


_dispatch.register("adam_clamp_", "reference", _dispatch.without_autocast(_by_reference))


def adam_clamp_(
    image: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int | Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    low: Tensor | Sequence[float],
    high: Tensor | Sequence[float],
    backend: str = "auto",
) -> None:
    """torch.optim.Adam's step number `step`, then the clamp of channel c to [low[c], high[c]], all in place.

    image, grad, exp_avg, exp_avg_sq: float [N, C, h, w] on one device; step: int >= 1, the step being taken;
    lr: float; both may be 0-d tensors on the device, so that a captured graph can follow them; low, high:
    [C]. Image and moments are overwritten, grad is not. Raises ValueError for shapes, types or devices that
    do not fit and for step < 1.
    """
    _checks.shape("image", image, ("N", "C", "h", "w"))
    _checks.floating("image", image)
    for name, tensor in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        _checks.shape(name, tensor, tuple(image.shape))
        _checks.floating(name, tensor)
        _checks.same_device(name, tensor, "image", image)
    if exp_avg_sq.dtype != exp_avg.dtype:
        raise ValueError(f"exp_avg_sq must be {exp_avg.dtype} as exp_avg, got {exp_avg_sq.dtype}")
    for name, value in (("step", step), ("lr", lr)):
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"{name} must be a number or hold one, got shape {list(value.shape)}")
            _checks.same_device(name, value, "image", image)
    if not isinstance(step, Tensor) and step < 1:
        raise ValueError(f"step must be >= 1 (the step being taken), got {step}")
    for name, bound in (("low", low), ("high", high)):
        given = bound.numel() if isinstance(bound, Tensor) else len(bound)
        if given != image.shape[1]:
            raise ValueError(f"{name} must be [C] = [{image.shape[1]}], got [{given}]")
    arguments = image, grad, exp_avg, exp_avg_sq, step, lr
    _dispatch.run("adam_clamp_", backend, *arguments, betas=betas, eps=eps, low=low, high=high)
