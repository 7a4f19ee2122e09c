"""Plain-torch specification of one Adam step on the images followed by the per-channel clamp."""

from collections.abc import Sequence

import torch
from torch import Tensor


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
    g = grad.to(exp_avg.dtype)
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    if isinstance(step, Tensor) or isinstance(lr, Tensor):
        # tensors on the device, in double: a replayed graph follows them without waiting for the host
        t = torch.as_tensor(step, device=image.device).double()
        step_size = (torch.as_tensor(lr, device=image.device).double() / (1 - beta1**t)).to(exp_avg.dtype)
        root = (1 - beta2**t).sqrt().to(exp_avg.dtype)
        image.sub_(step_size * exp_avg / ((exp_avg_sq.sqrt() / root).add_(eps)))
    else:
        denominator = (exp_avg_sq.sqrt() / (1 - beta2**step) ** 0.5).add_(eps)
        image.addcdiv_(exp_avg.to(image.dtype), denominator.to(image.dtype), value=-(lr / (1 - beta1**step)))
    lowest = torch.as_tensor(low, device=image.device, dtype=image.dtype).view(1, -1, 1, 1)
    highest = torch.as_tensor(high, device=image.device, dtype=image.dtype).view(1, -1, 1, 1)
    torch.clamp(image, lowest, highest, out=image)
