"""What is measured of each operation: its inputs at a size, the call, the gradients and the bytes it must move."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fd2fast import ops

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from numerics import check_kernel  # noqa: E402


@dataclass(frozen=True)
class Problem:
    """One operation at one size.

    call(*inputs, backend=...): the operation with everything else bound; grads: the inputs that get a gradient;
    forward_bytes, backward_bytes: inputs read once and results written once, which no implementation can undercut.
    """

    call: Callable[..., Tensor]
    inputs: Sequence[Tensor]
    grads: tuple[int, ...]
    dtype: torch.dtype
    forward_bytes: int
    backward_bytes: int

    def check(self) -> None:
        """AssertionError where the kernel fails a gate of tests/numerics.py against the float64 reference."""
        check_kernel(self.call, self.inputs, self.dtype, grads=self.grads)


def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _pool(device: torch.device, n: int, c: int, m: int, size: int) -> Problem:
    options = {"device": device, "dtype": torch.bfloat16}
    features = torch.rand(n, c, size, size, **options).to(memory_format=torch.channels_last)
    attention = torch.rand(n, m, size, size, **options).to(memory_format=torch.channels_last)
    z = 4 * n * m * c
    read = _bytes(features, attention)
    return Problem(
        ops.bilinear_attention_pool, (features, attention), (0, 1), torch.bfloat16, read + z, 2 * read + 2 * z
    )


def _prototypes(device: torch.device, n: int, k: int, d: int) -> Problem:
    # as in the step: unit vectors without negative entries, half of the samples next to their prototypes
    prototypes = torch.nn.functional.normalize(torch.rand(k, d, device=device))
    labels = torch.arange(n, device=device) % k
    near = torch.where(torch.arange(n, device=device)[:, None] % 2 == 0, 1e-3, 1.0)
    z = prototypes[labels] + near * torch.rand(n, d, device=device) / d**0.5
    read = _bytes(z, prototypes)
    return Problem(
        ops.prototype_loss,
        (torch.nn.functional.normalize(z), prototypes, labels),
        (0,),
        torch.float32,
        read,
        read + _bytes(z),
    )


def _similarity(device: torch.device, n: int, m: int, size: int, priors: int) -> Problem:
    options = {"device": device, "dtype": torch.bfloat16}
    attention = torch.rand(n, m, size, size, **options).to(memory_format=torch.channels_last)
    prior = torch.rand(n * priors, m, size, size, **options).to(memory_format=torch.channels_last)
    offsets = torch.arange(0, n * priors + 1, priors, device=device)
    read = _bytes(attention, prior)
    return Problem(
        ops.attention_similarity_loss,
        (attention, prior, offsets),
        (0,),
        torch.bfloat16,
        read,
        read + _bytes(attention),
    )


# operation -> its problem at the sizes of bench/shapes.py
REGISTRY: dict[str, Callable[..., Problem]] = {
    "bilinear_attention_pool": _pool,
    "prototype_loss": _prototypes,
    "attention_similarity_loss": _similarity,
}
