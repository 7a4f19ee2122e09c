"""The backend eager: torch's own operations on any device, with backward passes that keep no more than they need.

Autograd keeps the input and the result of nearly every operation. Here a BN with addition and activation keeps its input (and one
bit for each element where a ReLU follows an addition), a max pooling one byte for each output.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fd2fast.reference._offsets import host_offsets


def why_not(first: Tensor | Sequence[Tensor], *arguments: Any, **settings: Any) -> str | None:
    """Why the backend cannot take an operation's arguments: offsets on a device, or no elements."""
    tensors = (first,) if isinstance(first, Tensor) else first
    if any(t.numel() == 0 for t in tensors):
        return "a map has no elements"
    for value in arguments:
        if (
            isinstance(value, Tensor)
            and value.ndim == 1
            and not value.is_floating_point()
            and host_offsets(value) is None
        ):
            return "the offsets are not host numbers"
    return None


from fd2fast.ops.eager import activation, bilinear_attention_pool, bn_matching, max_pool  # noqa: E402

__all__ = ["activation", "bilinear_attention_pool", "bn_matching", "max_pool", "why_not"]
