"""Plain-torch specification of one Adam step on the images followed by the per-channel clamp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fd2fast.reference._offsets import accumulation_dtype, constant_tensor


def channel_bounds(bound: Tensor | Sequence[float], image: Tensor) -> Tensor:
    """One bound for each channel, [C], in the image's type and on its device."""
    if isinstance(bound, Tensor):
        return bound.to(device=image.device, dtype=image.dtype)
    return constant_tensor(bound, image.dtype, image.device)


@torch.no_grad()
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
) -> None:
    """Take Adam step number `step` on the image, then clamp channel c to [low[c], high[c]]; all in place.

    image, grad, exp_avg, exp_avg_sq: [N, C, h, w]; step: int >= 1 (or a tensor holding it, for captured
    graphs); lr: float (or such a tensor); low, high: [C]. Equals torch.optim.Adam (no weight decay, no
    amsgrad) and clamp:

        m = m + (1 - b1) (g - m);  v = b2 v + (1 - b2) g^2
        x = x - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps);  x = min(max(x, low), high)
    """
    beta1, beta2 = betas
    dtype = accumulation_dtype(exp_avg)
    # moments kept in half are taken to float32 for the step; otherwise these are the tensors themselves
    g, m, v = grad.to(dtype), exp_avg.to(dtype), exp_avg_sq.to(dtype)
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    if isinstance(step, Tensor) or isinstance(lr, Tensor):
        # tensors on the device, in double: a replayed graph follows them without waiting for the host
        t = torch.as_tensor(step, device=image.device).double()
        step_size = (torch.as_tensor(lr, device=image.device).double() / (1 - beta1**t)).to(dtype)
        root = (1 - beta2**t).sqrt().to(dtype)
        image.sub_(step_size * m / ((v.sqrt() / root).add_(eps)))
    else:
        denominator = (v.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
        image.addcdiv_(m.to(image.dtype), denominator.to(image.dtype), value=-(lr / (1 - beta1**step)))
    if m.dtype != exp_avg.dtype:
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)
    lowest, highest = (channel_bounds(bound, image).view(1, -1, 1, 1) for bound in (low, high))
    torch.clamp(image, lowest, highest, out=image)
