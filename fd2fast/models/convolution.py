"""The algorithms that a frozen convolution can run with on the CPU, forward and input gradient, and the choice among them."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fd2fast.models import packed_convolution, winograd
from fd2fast.ops.cpu import native

Pair = tuple[int, int]
Run = Callable[[], Tensor]

# Another algorithm replaces the first only where it is this much faster: near ties would be settled by noise.
_WORTH = 1.15
# A measurement ends after this many seconds, or calls, of every candidate.
_SECONDS, _CALLS = 0.03, 7


class Choices:
    """Which algorithm each kind of convolution uses; kinds that are not there use the first of their candidates.

    A kind is a text: direction, type, channels, window and map size. Layers of one kind share the choice, whatever the
    number of images. The choice changes the rounding, so the plan of a run keeps it.
    """

    def __init__(self, chosen: Mapping[str, str] | None = None):
        self._chosen = dict(chosen or {})
        self._earlier: Mapping[str, str] = {}
        self.measuring = False
        self.version = 0  # rises with every change

    @property
    def chosen(self) -> Mapping[str, str]:
        """The algorithm by kind."""
        return MappingProxyType(self._chosen)

    def take(self, chosen: Mapping[str, str]) -> None:
        """Add these, in place of what was chosen for the same kinds."""
        self._chosen.update(chosen)
        self.version += 1

    @contextlib.contextmanager
    def measure(self, earlier: Mapping[str, str] = MappingProxyType({})) -> Iterator[None]:
        """Within, kinds that are met for the first time are decided as `earlier` has them, else by time."""
        self.measuring, self._earlier = True, earlier
        try:
            yield
        finally:
            self.measuring, self._earlier = False, {}

    def pick(self, kind: str, candidates: Mapping[str, Run]) -> str:
        """The name of the candidate to use for this kind."""
        name = self._chosen.get(kind)
        if name in candidates:
            return name  # type: ignore[return-value]
        first = next(iter(candidates))
        if not self.measuring:
            return first
        if self._earlier.get(kind) in candidates:
            self.take({kind: self._earlier[kind]})
        else:
            seconds = _measured(candidates)
            best = min(seconds, key=seconds.__getitem__)
            self.take({kind: best if seconds[first] > _WORTH * seconds[best] else first})
        return self._chosen[kind]


def _measured(candidates: Mapping[str, Run]) -> dict[str, float]:
    """Median seconds of a call of each; they take turns, so that a busy moment meets all of them."""
    for run in candidates.values():
        run()  # packs
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    began = time.perf_counter()
    while len(next(iter(taken.values()))) < _CALLS and time.perf_counter() - began < _SECONDS * len(candidates):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            taken[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in taken.items()}


class Convolution:
    """A convolution with a frozen weight [C_out, C_in / groups, k_h, k_w], on CPU maps that `native.takes`; no autograd.

    Candidates, the first is the rule where nothing was measured:
    winograd  F(4 x 4, 3 x 3), for 3 x 3 windows with stride 1
    phases    input gradient by one convolution for each phase of the stride, for up to 4 input channels
    taps      input gradient of strided depthwise layers, one channel after the other
    packed    oneDNN with a packed weight
    plain     torch's own
    """

    def __init__(self, stride: Pair, padding: Pair, dilation: Pair, groups: int, choices: Choices | None = None):
        self.settings = stride, padding, dilation, groups
        self.choices = choices if choices is not None else Choices()
        self._packed = packed_convolution.PackedConv(stride, padding, dilation, groups)
        self._winograd = winograd.WinogradConv(padding)
        self._picked: dict[tuple[Any, ...], str] = {}
        self._picked_from: tuple[int, int] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the forms made so far, beside the weight itself."""
        return self._packed.nbytes + self._winograd.nbytes

    def forget(self) -> None:
        """Let go of the forms; those that are needed are made again."""
        self._packed.forget()
        self._winograd.forget()

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """F.conv2d of x [N, C_in, H, W] in the weight's type."""

        def run(name: str) -> Tensor:
            if name == "winograd":
                return self._winograd.forward(x, weight, bias)
            if name == "packed":
                return self._packed.forward(x, weight, bias)
            return F.conv2d(x, weight, bias, *self.settings)

        return run(self._pick("forward", x.shape[2:], weight, (), run))

    def input_gradient(
        self, grad: Tensor, weight: Tensor, shape: Sequence[int], phases: Tensor | None, taps: Tensor | None
    ) -> Tensor:
        """The input's gradient [shape] from that of the result, [N, C_out, H', W'] in the weight's type.

        phases: of `phase_weight`; taps: as native.depthwise_backward wants them; None where the layer has no such form.
        """
        stride, padding, dilation, _ = self.settings
        grad, size = grad.contiguous(memory_format=torch.channels_last), (shape[2], shape[3])

        def run(name: str) -> Tensor:
            if name == "phases":
                assert phases is not None
                return input_gradient_by_phases(grad, phases, stride, padding, shape)
            if name == "taps":
                assert taps is not None
                return native.depthwise_backward(grad, taps, (weight.shape[2:], stride, padding, dilation), shape)
            if name == "winograd":
                return self._winograd.input_gradient(grad, weight, size)
            if name == "packed":
                return self._packed.input_gradient(grad, weight, size)
            return plain_input_gradient(grad, weight, shape, *self.settings)

        own = [name for name, form in (("phases", phases), ("taps", taps)) if form is not None]
        return run(self._pick("gradient", size, weight, own, run))

    def _pick(
        self, direction: str, size: Sequence[int], weight: Tensor, own: Sequence[str], run: Callable[[str], Tensor]
    ) -> str:
        """The algorithm for maps of this size; own: candidates of this direction only."""
        source = id(self.choices), self.choices.version
        if source != self._picked_from:
            self._picked.clear()
            self._picked_from = source
        key = direction, *size, weight.dtype
        name = None if self.choices.measuring else self._picked.get(key)
        if name is None:
            names = [*own]
            names += ["winograd"] if self._by_winograd(weight) else []
            names += ["packed"] if packed_convolution.supports(weight.dtype) else []
            candidates = {n: functools.partial(run, n) for n in (*names, "plain")}
            name = self.choices.pick(self._kind(direction, size, weight), candidates)
            self._picked[key] = name
        return name

    def _by_winograd(self, weight: Tensor) -> bool:
        c_out, c_in, k_h, k_w = weight.shape
        return winograd.supports(weight.dtype, (k_h, k_w), *self.settings, (c_in, c_out))

    def _kind(self, direction: str, size: Sequence[int], weight: Tensor) -> str:
        c_out, c_in, k_h, k_w = weight.shape
        stride, padding, dilation, groups = (
            "x".join(map(str, p)) if isinstance(p, tuple) else p for p in self.settings
        )
        window = f"{k_h}x{k_w} stride {stride} padding {padding} dilation {dilation} groups {groups}"
        name = str(weight.dtype).removeprefix("torch.")
        return f"{direction} {name} {c_in * self.settings[3]} to {c_out}, {window}, {size[0]}x{size[1]} pixels"


def plain_input_gradient(
    grad: Tensor, weight: Tensor, shape: Sequence[int], stride: Pair, padding: Pair, dilation: Pair, groups: int
) -> Tensor:
    """The input's gradient [shape] by torch."""
    # only the shape of the input is read
    shape_only = grad.new_empty(1).expand(shape)
    no_output_padding, wanted = (0, 0), (True, False, False)
    settings = stride, padding, dilation, False, no_output_padding, groups, wanted
    return torch.ops.aten.convolution_backward(grad, shape_only, weight, None, *settings)[0]


def phase_weight(weight: Tensor, stride: Pair) -> Tensor:
    """The weight [s_h s_w C_in, C_out, t_h, t_w] of `input_gradient_by_phases` from [C_out, C_in, k_h, k_w]."""
    c_out, c_in, *kernel = weight.shape
    (s_h, s_w), (k_h, k_w) = stride, kernel
    t_h, t_w = -(-k_h // s_h), -(-k_w // s_w)
    parts = F.pad(weight, (0, t_w * s_w - k_w, 0, t_h * s_h - k_h)).view(c_out, c_in, t_h, s_h, t_w, s_w)
    flat = parts.flip(2, 4).permute(3, 5, 1, 0, 2, 4).reshape(s_h * s_w * c_in, c_out, t_h, t_w)
    return flat.contiguous(memory_format=torch.channels_last)


def input_gradient_by_phases(grad: Tensor, phases: Tensor, stride: Pair, padding: Pair, shape: Sequence[int]) -> Tensor:
    """Input gradient of a strided convolution as one forward convolution whose phases are then put side by side.

    Input pixel u = s q + r - p receives sum_t grad[q - t] w[r + s t]: for each phase r an ordinary convolution of grad. For
    few input channels this keeps the multiplier full: measured on an EPYC with AVX-512, ResNet's first layer, 10 images of
    224 x 224, one thread: bf16 59 -> 23 ms, fp32 114 -> 43 ms (float64 is slower this way: 115 -> 814 ms). Padding the 3 input
    channels to 4, 8 or 16 instead leaves the gradient at 59 to 60 ms and makes the forward pass slower (14, 14, 28, 54 ms).
    """
    t_h, t_w = phases.shape[-2:]
    s_h, s_w = stride
    parts = F.conv2d(grad, phases, None, 1, (t_h - 1, t_w - 1)).permute(0, 2, 3, 1)
    n, rows, columns, _ = parts.shape
    # runs of s_w C_in values stay together; F.pixel_shuffle, value by value, takes 2 to 4 times as long
    runs = parts.reshape(n, rows, columns, s_h, s_w * shape[1]).transpose(2, 3)
    found = runs.reshape(n, rows * s_h, columns * s_w, shape[1]).permute(0, 3, 1, 2)
    (p_h, p_w), (h, w) = padding, shape[-2:]
    # rows beyond the last window have no gradient
    short = max(p_h + h - found.shape[2], 0), max(p_w + w - found.shape[3], 0)
    if any(short):
        found = F.pad(found, (0, short[1], 0, short[0]))
    return found[:, :, p_h : p_h + h, p_w : p_w + w]
