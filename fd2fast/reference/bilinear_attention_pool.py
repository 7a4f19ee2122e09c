"""Plain-torch specification of bilinear attention pooling with sign-sqrt and unit norm."""

import torch
from torch import Tensor

from fd2fast.reference._offsets import accumulation_dtype


class _PlainGradient(torch.autograd.Function):
    """Identity with a contiguous gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad.contiguous()


def bilinear_attention_pool(features: Tensor, attention: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Unit-norm bilinear pooling vector z of each sample.

    features: [N, C, H, W]; attention: [N, M, H, W]. Returns [N, M*C] in float32 (float64 for float64 input),
    entry m*C + c. Differentiable in both. Source: the attention head (CAL) of the
    released code.

        G[n, m, c] = sum_hw attention[n, m] features[n, c] / (H W)
        s = sign(G) sqrt(|G| + eps), which is 0 at G = 0
        z = s / max(|s|, 1e-12), the norm over all M*C entries of a sample

    Gradient: with g = dL/dz and r = max(|s|, 1e-12): dL/ds = (g - z <z, g>) / r (without the projection where
    the norm is below 1e-12), dL/dG = dL/ds / (2 sqrt(|G| + eps)), and exactly 0 where G = 0.
    """
    dtype = accumulation_dtype(features, attention)
    if features.shape[0] == 1:
        # the product's gradient for one sample has odd strides, with which torch's CPU batch norm (eval mode, 2.15) gives
        # a wrong input gradient
        features, attention = _PlainGradient.apply(features), _PlainGradient.apply(attention)
    f = features.to(dtype).flatten(2)  # [N, C, HW]
    a = attention.to(dtype).flatten(2)  # [N, M, HW]
    gram = torch.bmm(a, f.transpose(1, 2)) / f.shape[2]  # [N, M, C]
    # sign is constant for autograd and abs has gradient 0 at 0, so entries with G = 0 pass no gradient
    root = torch.sign(gram) * torch.sqrt(gram.abs() + eps)
    return torch.nn.functional.normalize(root.flatten(1), dim=1, eps=1e-12)
