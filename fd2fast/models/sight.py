"""Which image sizes a network can see: passes over blank images, and the error that says which size it wants."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fd2fast.errors import UserError

# Side that most networks are made for, pixels.
USUAL = 224
# Passes spent on finding the size that an error names.
_PASSES = 12
# What torch, timm and torchvision raise for maps that become too small, do not divide or meet a table of another size.
REFUSALS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


def refusal(net: nn.Module, size: int, *, count: int = 1, training: bool = False) -> str | None:
    """Why `net` fails on `count` blank images [count, 3, size, size], one line; None if it does not.

    Its mode, its buffers and the random streams are as before.
    """
    first = next((p for p in net.parameters()), torch.zeros(1))
    try:
        with _untouched(net, first.device), torch.no_grad():
            net.train(training)
            net(torch.zeros(count, 3, size, size, device=first.device, dtype=first.dtype))
    except REFUSALS as error:
        return reason(error)
    return None


def reason(error: BaseException) -> str:
    """The beginning of the first line of what an error says, or its class."""
    told = str(error).strip().splitlines()
    return told[0][:120] if told else type(error).__name__


@contextlib.contextmanager
def _untouched(net: nn.Module, device: torch.device) -> Iterator[None]:
    modes = [(module, module.training) for module in net.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for module, training in modes:
            module.training = training


def must_see(
    name: str, net: nn.Module, size: int, *, native: int = USUAL, whose: str = "the data set has", training: int = 0
) -> None:
    """UserError unless `net` takes images of size x size, in eval mode and, with `training`, so many of them in train mode.

    name: what the model is called. native: a size that it is known to take. whose: whose images they are, for the message.
    """
    refused = refusal(net, size)
    if refused is not None:
        raise UserError(
            f"{name} {_wish(net, size, native)}, {whose} {size} ({refused}): choose another model or --size"
        )
    if training and (refused := refusal(net, size, count=training, training=True)) is not None:
        if "more than 1 value per channel" in refused or "more than 1 spatial element" in refused:
            raise UserError(
                f"{name} has one value per channel left for its BatchNorm from a batch of {training} image at {size} px: "
                "take larger batches (for students a lower accumulation, or more images per class)"
            )
        raise UserError(f"{name} cannot be trained on images of {size} px ({refused}): choose another model")


def _wish(net: nn.Module, size: int, native: int) -> str:
    """What the model wants instead of `size`, found by trial."""
    left = _PASSES

    def sees(side: int) -> bool:
        nonlocal left
        left -= 1
        return refusal(net, side) is None

    def found(sides: list[int]) -> int | None:
        return next((side for side in sides if side > 0 and side != size and left > 0 and sees(side)), None)

    near = [*(-(-size // side) * side for side in (32, 64, 128)), size // 32 * 32]
    if native > size and sees(native):
        low, high = size, native
        while high - low > 1 and left > 2:
            middle = (low + high) // 2
            low, high = (low, middle) if sees(middle) else (middle, high)
        if (sees(high + 1) or sees(high + 3)) and sees(native + 1):
            return f"needs images of at least {high} px"
        return f"takes images of {found(near) or native} px"
    side = found([*near, native])
    return f"takes images of {side} px" if side else "does not take such images"


def first_tensor(output: object) -> Tensor | None:
    """A network's main output: the tensor itself, or the first of a tuple or dict (auxiliary outputs follow it)."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, dict):
        named = next((output[key] for key in ("logits", "out", "output") if isinstance(output.get(key), Tensor)), None)
        return named if named is not None else first_tensor(list(output.values()))
    if isinstance(output, tuple | list):
        return next((found for item in output if (found := first_tensor(item)) is not None), None)
    return None


Builder = Callable[..., nn.Module]


def fitted(build: Builder, size: int | None, options: tuple[str, ...]) -> nn.Module:
    """`build()`, or where that cannot see `size`, `build(option=size)` with the first of `options` that makes it see it.

    The random stream of the weights begins at the same place each time.
    """
    random = torch.get_rng_state()
    net = build()
    if size is None or refusal(net, size) is None:
        return net
    after = torch.get_rng_state()
    for option in options:
        torch.set_rng_state(random)
        try:
            other = build(**{option: size})
        except (*REFUSALS, UserError):  # it has no such option, or no such size
            continue
        if refusal(other, size) is None:
            return other
    torch.set_rng_state(after)
    return net
