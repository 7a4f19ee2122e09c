"""The operation prototype_loss (L_F, Eq. 9)."""

from torch import Tensor

from fd2fast import reference
from fd2fast.ops import _checks, _dispatch

_dispatch.register("prototype_loss", "reference", _dispatch.without_autocast(reference.prototype_loss))


def prototype_loss(
    z: Tensor,
    prototypes: Tensor,
    labels: Tensor,
    *,
    beta: float = 0.5,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """L_F of each sample (paper Eq. 9); see fd2fast.reference.prototype_loss.

    z: float [N, D]; prototypes: float [K, D]; labels: int [N] in [0, K); returns [N] in float32 (float64 for
    float64). Differentiable in z. With K = 1 only the own-class term remains. Raises ValueError for shapes,
    types or devices that do not fit, prototypes that require a gradient, and labels out of range (on a GPU
    only with FD2FAST_CHECK_VALUES=1).
    """
    _checks.shape("z", z, ("N", "D"))
    n, d = z.shape
    _checks.shape("prototypes", prototypes, ("K", d))
    if prototypes.shape[0] == 0:
        raise ValueError("prototypes must be [K, D] with K >= 1, got K = 0")
    _checks.floating("z", z)
    _checks.floating("prototypes", prototypes)
    _checks.same_device("prototypes", prototypes, "z", z)
    _checks.labels("labels", labels, n, prototypes.shape[0])
    _checks.same_device("labels", labels, "z", z)
    _checks.constant("prototypes", prototypes)
    loss: Tensor = _dispatch.run("prototype_loss", backend, z, prototypes, labels, beta=beta, eps=eps)
    return loss
