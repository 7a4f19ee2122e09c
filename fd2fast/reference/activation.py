"""The activations that frozen networks are fused with."""

from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = ("identity", "relu", "relu6")


def activation(x: Tensor, name: str) -> Tensor:
    """identity, relu or relu6 of x, any shape. Its slope at the kinks is 0. Raises ValueError for another name."""
    if name == "relu":
        return F.relu(x)
    if name == "relu6":
        return F.relu6(x)
    if name == "identity":
        return x
    raise ValueError(f'activation must be "relu", "relu6" or "identity", got {name!r}')
