"""The operation activation: where a network has one that no BN is fused with."""

from torch import Tensor

from fd2fast import reference
from fd2fast.ops import _checks, _dispatch
from fd2fast.reference.activation import ACTIVATIONS

_dispatch.register("activation", "reference", reference.activation)


def activation(x: Tensor, name: str, *, backend: str = "auto") -> Tensor:
    """identity, relu or relu6 of x; see fd2fast.reference.activation.

    x: float, any shape; returns its shape, type and order of memory. Differentiable in x; the backward is left one bit for each
    element. Raises ValueError for another name and for what is not floating.
    """
    _checks.floating("x", x)
    if name not in ACTIVATIONS:
        raise ValueError(f'activation must be "relu", "relu6" or "identity", got {name!r}')
    y: Tensor = _dispatch.run("activation", backend, x, name)
    return y
