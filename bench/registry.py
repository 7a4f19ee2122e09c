"""What is measured of each operation: its inputs at a size, the call, the gradients and the bytes it must move."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.numerics import check_kernel
from fd2fast import ops


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
        """AssertionError where the kernel fails a gate of bench/numerics.py against the float64 reference."""
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


def _maps(device: torch.device, n: int, c: int, size: int) -> tuple[Tensor, list[Tensor]]:
    """A layer's bf16 input in channels_last, and weight, bias, running mean and variance in fp32."""
    x = torch.randn(n, c, size, size, device=device, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    channels = [torch.randn(c, device=device) for _ in range(3)] + [torch.rand(c, device=device) + 0.5]
    return x, channels


def _even_segments(n: int, segments: int) -> list[int]:
    return [n * s // segments for s in range(segments + 1)]


def _matching(device: torch.device, n: int, c: int, size: int, segments: int) -> Problem:
    x, (_, _, mean, var) = _maps(device, n, c, size)
    bounds = _even_segments(n, segments)

    def call(x: Tensor, backend: str) -> Tensor:
        return ops.bn_matching(x, mean.to(_wide(x)), var.to(_wide(x)), bounds, backend=backend)

    return Problem(call, (x,), (0,), torch.bfloat16, _bytes(x), 2 * _bytes(x))


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fused(device: torch.device, n: int, c: int, size: int, segments: int, residual: int) -> Problem:
    x, channels = _maps(device, n, c, size)
    bounds = _even_segments(n, segments)
    inputs = (x, torch.randn_like(x)) if residual else (x,)

    def call(x: Tensor, residual: Tensor | None = None, *, backend: str) -> tuple[Tensor, Tensor]:
        return ops.bn_act_matching(x, *(c.to(_wide(x)) for c in channels), bounds, residual=residual, backend=backend)

    # forward: x (and residual) in, y out; backward: x and the gradient (and an eighth of a byte) in, gradients out
    moved = _bytes(*inputs)
    return Problem(
        call,
        inputs,
        tuple(range(len(inputs))),
        torch.bfloat16,
        moved + _bytes(x),
        moved + 2 * _bytes(x) if not residual else 4 * _bytes(x) + x.numel() // 8,
    )


def _crop(device: torch.device, n: int, size: int, out: int, segments: int) -> Problem:
    images = torch.randn(n, 3, size, size, device=device).to(memory_format=torch.channels_last)
    bounds = _even_segments(n, segments)
    side = max(1, size * 2 // 3)
    rows = [[s % (size - side + 1), 0, side, max(1, size // 2), s % 2, 5, 9] for s in range(segments)]
    params = torch.tensor(rows, device=device)

    def call(images: Tensor, backend: str) -> Tensor:
        return ops.crop_flip_roll(images, params, bounds, out, backend=backend)

    crop = 4 * 3 * n * side * max(1, size // 2)
    grad = 4 * 3 * n * out * out
    return Problem(call, (images,), (0,), torch.float32, crop + grad, grad + _bytes(images))


def _adam(device: torch.device, n: int, size: int, moments: str = "float32") -> Problem:
    state = [torch.randn(n, 3, size, size, device=device).to(memory_format=torch.channels_last) for _ in range(4)]
    state[3] = state[3].square()
    state[2:] = [t.to(getattr(torch, moments)) for t in state[2:]]
    low, high = torch.tensor([-2.1, -2.0, -1.8], device=device), torch.tensor([2.2, 2.4, 2.6], device=device)

    def call(image: Tensor, grad: Tensor, m: Tensor, v: Tensor, *, backend: str) -> tuple[Tensor, ...]:
        settings = {"lr": 0.25, "betas": (0.5, 0.9), "eps": 1e-8, "low": low, "high": high}
        ops.adam_clamp_(image, grad, m, v, 3, **settings, backend=backend)
        return image, m, v

    # all four in, all but the gradient out
    moved = 2 * _bytes(*state) - _bytes(state[1])
    # the image too carries the rounding of its moments
    dtype = torch.float32 if state[2].dtype == torch.float32 else torch.bfloat16
    return Problem(call, tuple(state), (), dtype, moved, 0)


def _max_pool(device: torch.device, n: int, c: int, size: int, kernel: int, stride: int) -> Problem:
    # after a ReLU half of the pixels tie at 0
    x = torch.randn(n, c, size, size, device=device).relu().to(torch.bfloat16).to(memory_format=torch.channels_last)

    def call(x: Tensor, backend: str) -> Tensor:
        return ops.max_pool(x, (kernel,) * 2, (stride,) * 2, (kernel // 2,) * 2, backend=backend)

    y = call(x, "reference")
    # forward: x in, y and a byte each out; backward: gradient and bytes in, gradient of x out
    moved = _bytes(x) + _bytes(y) + y.numel()
    return Problem(call, (x,), (0,), torch.bfloat16, moved, moved)


# operation -> its problem at the sizes of bench/shapes.py
REGISTRY: dict[str, Callable[..., Problem]] = {
    "bilinear_attention_pool": _pool,
    "prototype_loss": _prototypes,
    "attention_similarity_loss": _similarity,
    "bn_matching": _matching,
    "bn_act_matching": _fused,
    "crop_flip_roll": _crop,
    "adam_clamp_": _adam,
    "max_pool": _max_pool,
}
