"""Shared by the kernel modules: the accumulation type, exact roots, rows of segments, what to compile."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
import triton
import triton.language as tl

# every launch says so: what triton takes by default is about to change
OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Compilation:
    """One kernel in one configuration, enough to compile it without a GPU and without tensors.

    signature: argument name -> Triton type ("*bf16", "i32", "fp32"), constexprs left out; constexprs: name -> value.
    divisible: arguments that are multiples of 16 (pointers count by themselves), as the launcher would find; fp_fusion: whether
    products and sums may be fused.
    """

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    divisible: tuple[str, ...] = field(default=())
    fp_fusion: bool = True

    @property
    def title(self) -> str:
        values = ", ".join(f"{k}={v}" for k, v in self.constexprs.items() if not isinstance(v, tl.dtype))
        pointers = " ".join(dict.fromkeys(t for t in self.signature.values() if t.startswith("*")))
        return f"{self.kernel.__name__}[{pointers}; {values}; {self.num_warps} warps]"


def with_ones(compilation: Compilation) -> Compilation:
    """The same with 1 for every integer argument, which a launch makes a constant of the kernel."""
    whole = {name: kind for name, kind in compilation.signature.items() if kind not in ("i32", "i64")}
    ones = {name: 1 for name in compilation.signature if name not in whole and name in compilation.kernel.arg_names}
    return replace(compilation, signature=whole, constexprs={**compilation.constexprs, **ones}, divisible=())


def accumulator(*tensors: torch.Tensor) -> tl.dtype:
    """The type that kernels sum in: float64 for float64 input (interpreter only), else float32."""
    return tl.float64 if any(t.dtype == torch.float64 for t in tensors) else tl.float32


def accumulator_torch(*tensors: torch.Tensor) -> torch.dtype:
    """The torch type of accumulator()."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def power_of_two(n: int, low: int, high: int) -> int:
    """The smallest power of two >= n, held between low and high."""
    return max(low, min(high, triton.next_power_of_2(n)))


def split_options(config: dict[str, int]) -> tuple[dict[str, int], dict[str, int]]:
    """A committed configuration as the kernel's own constants and the compiler's options (warps, stages)."""
    options = {name: config[name] for name in ("num_warps", "num_stages") if name in config}
    return {name: value for name, value in config.items() if name not in options}, options


@triton.jit
def square_root(x, ACC: tl.constexpr):
    """The correctly rounded root; plain tl.sqrt is approximate in float32."""
    if ACC == tl.float32:
        return tl.sqrt_rn(x)
    return tl.sqrt(x)


@triton.jit
def divide(a, b, ACC: tl.constexpr):
    """The correctly rounded quotient; plain division is approximate in float32."""
    if ACC == tl.float32:
        return tl.div_rn(a, b)
    return a / b


@triton.jit
def segment_part(
    p_segments,  # int64 [S+1] row offsets
    segment,
    part,
    parts,
    pixels,
    BR: tl.constexpr,
):
    """First pixel row (row * pixels + pixel, int64) of one of `parts` even shares of a segment, and its length."""
    begin = tl.load(p_segments + segment).to(tl.int64) * pixels
    end = tl.load(p_segments + segment + 1).to(tl.int64) * pixels
    share = tl.cdiv(tl.cdiv(end - begin, parts), BR) * BR
    first = begin + part * share
    # an empty or short segment leaves its last parts without rows
    count = tl.minimum(tl.maximum(end - first, 0), share)
    return first, count.to(tl.int32)
