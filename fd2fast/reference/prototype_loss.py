"""Plain-torch specification of the prototype loss L_F (Eq. 9)."""

import torch
from torch import Tensor

from fd2fast.reference._offsets import accumulation_dtype

# elements of the [N, chunk, D] difference that one step of the backward may hold (64 MiB in float32)
_CHUNK_ELEMENTS = 1 << 24


def prototype_loss(z: Tensor, prototypes: Tensor, labels: Tensor, *, beta: float = 0.5, eps: float = 1e-6) -> Tensor:
    """L_F of each sample: close to its own prototype, far from the others (paper Eq. 9).

    z: [N, D]; prototypes: [K, D]; labels: int [N] in [0, K). Returns [N] in float32 (float64 for float64
    input).

        d[n, k] = |z_n - c_k| / (|z_n| + |c_k| + eps)
        L[n] = beta d[n, y_n] + (1 - beta) (1 - mean_{k != y_n} d[n, k])

    With K = 1 there is no other class and the second term is dropped: L[n] = beta d[n, 0].
    Gradient: sum over k of w[n, k] dd[n, k]/dz (see normalized_l2), w = beta at the own class and
    -(1 - beta) / (K - 1) elsewhere. Distances are sums of squared differences, never expanded into
    |z|^2 + |c|^2 - 2<z, c>, so a sample next to its prototype keeps its digits; [N, K, D] is never held
    whole.
    """
    dtype = accumulation_dtype(z, prototypes)
    z, prototypes = z.to(dtype), prototypes.to(dtype)
    classes = prototypes.shape[0]
    chunk = max(1, _CHUNK_ELEMENTS // max(1, z.numel()))
    direct = "donot_use_mm_for_euclid_dist"
    parts = [torch.cdist(z, part, compute_mode=direct) for part in prototypes.split(chunk)]
    distance = torch.cat(parts, dim=1)  # [N, K]
    norm = torch.linalg.vector_norm
    distance = distance / (norm(z, dim=1, keepdim=True) + norm(prototypes, dim=1) + eps)
    own_column = labels.long().unsqueeze(1)  # [N, 1]
    own = distance.gather(1, own_column).squeeze(1)
    if classes == 1:
        return beta * own
    others = distance.scatter(1, own_column, 0.0).sum(dim=1) / (classes - 1)
    return beta * own + (1 - beta) * (1 - others)
