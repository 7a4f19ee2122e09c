"""Plain-torch specification of the attention similarity loss L_S (Eq. 10) over ragged lists."""

import torch
from torch import Tensor

from fd2fast.reference._offsets import Offsets, accumulation_dtype, device_offsets, row_owner
from fd2fast.reference.normalized_l2 import normalized_l2


def attention_similarity_loss(attention: Tensor, prior: Tensor, offsets: Offsets, *, eps: float = 1e-6) -> Tensor:
    """L_S of each sample: far from the attention of the same class's earlier samples (paper Eq. 10).

    attention: [N, M, H, W]; prior: [P, M, H, W]; offsets: int [N+1], 0 = offsets[0] <= ... <= offsets[N] = P.
    Returns [N] in float32 (float64 for float64 input):

        L[n] = 1 - mean over j in [offsets[n], offsets[n+1]) of normalized_l2(attention[n], prior[j])

    with all M*H*W entries of a map as one vector, and 0 with no gradient where the range is empty.
    """
    dtype = accumulation_dtype(attention, prior)
    a = attention.to(dtype).flatten(1)  # [N, MHW]
    p = prior.to(dtype).flatten(1)  # [P, MHW]
    bounds = device_offsets(offsets, a.device)
    counts = bounds.diff()  # [N]
    owner = row_owner(bounds, p.shape[0])  # [P]
    distance = normalized_l2(a.index_select(0, owner), p, eps=eps) / counts.index_select(0, owner)
    mean = torch.zeros_like(a[:, 0]).index_add(0, owner, distance)
    return torch.where(counts > 0, 1 - mean, 0.0)
