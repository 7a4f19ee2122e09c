"""The operation attention_similarity_loss (L_S, Eq. 10)."""

from torch import Tensor

from fd2fast import reference
from fd2fast.ops import _checks, _dispatch
from fd2fast.reference._offsets import Offsets

_dispatch.register(
    "attention_similarity_loss", "reference", _dispatch.without_autocast(reference.attention_similarity_loss)
)


def attention_similarity_loss(
    attention: Tensor, prior: Tensor, offsets: Offsets, *, eps: float = 1e-6, backend: str = "auto"
) -> Tensor:
    """L_S of each sample (paper Eq. 10); see fd2fast.reference.attention_similarity_loss.

    attention: float [N, M, H, W]; prior: float [P, M, H, W]; offsets: int [N+1] (tensor, list or tuple) from
    0 to P; sample n is compared with prior[offsets[n]:offsets[n+1]]. Returns [N] in float32 (float64 for
    float64), 0 and no gradient where that is empty. Differentiable in attention. Raises ValueError for
    shapes, types, devices or offsets that do not fit, and a prior that requires a gradient.
    """
    _checks.shape("attention", attention, ("N", "M", "H", "W"))
    n, m, h, w = attention.shape
    _checks.shape("prior", prior, ("P", m, h, w))
    _checks.floating("attention", attention)
    _checks.floating("prior", prior)
    _checks.same_device("prior", prior, "attention", attention)
    offsets = _checks.offsets("offsets", offsets, prior.shape[0], "the rows of prior", n + 1)
    _checks.constant("prior", prior)
    loss: Tensor = _dispatch.run("attention_similarity_loss", backend, attention, prior, offsets, eps=eps)
    return loss
