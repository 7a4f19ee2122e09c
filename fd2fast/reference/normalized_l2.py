"""Plain-torch specification of the symmetrically normalised Euclidean distance."""

import torch
from torch import Tensor

from fd2fast.reference._offsets import accumulation_dtype


def normalized_l2(u: Tensor, v: Tensor, *, eps: float = 1e-6) -> Tensor:
    """Distance d = |u - v| / (|u| + |v| + eps) over the last dimension.

    u, v: [..., D], shapes that broadcast. Returns [...] in float32 (float64 for float64 input); in [0, 1).
    Source: paper, text under Eq. 9; eps from the released code.

    Gradient, with s = |u| + |v| + eps: dd/du = (u - v) / (|u - v| s) - d u / (|u| s), where a quotient whose
    denominator is zero counts as 0, so that it is finite at u = v and at zero vectors.
    """
    dtype = accumulation_dtype(u, v)
    u, v = u.to(dtype), v.to(dtype)
    # vector_norm's gradient at the zero vector is 0, which is the convention above
    norm = torch.linalg.vector_norm
    return norm(u - v, dim=-1) / (norm(u, dim=-1) + norm(v, dim=-1) + eps)
