"""Triton kernel of one Adam step with per-channel clamp, in place."""

import math
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from fd2fast.kernels._common import OPTIONS, Compilation, accumulator, divide, square_root
from fd2fast.kernels._configs import ADAM_BLOCK, ADAM_WARPS
from torch import Tensor


@triton.jit
def adam_clamp_kernel(
    p_image,  # [N, C, P] or [N, P, C] dense, as all four
    p_grad,
    p_exp_avg,
    p_exp_avg_sq,
    p_low,  # [C]
    p_high,  # [C]
    p_step,  # one value, read where FROM_TENSOR
    p_lr,
    step_size,  # lr / (1 - beta1^step), otherwise
    root,  # sqrt(1 - beta2^step)
    elements,
    inner,  # elements between two channels: P, or 1 for channels_last
    CHANNELS: tl.constexpr,
    ONE_MINUS_BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    LOG2_BETA1: tl.constexpr,
    LOG2_BETA2: tl.constexpr,
    EPS: tl.constexpr,
    FROM_TENSOR: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    local = tl.arange(0, BLOCK)
    offsets = start + local
    mask = offsets < elements
    if FROM_TENSOR:
        # in float64: 1 - beta2^t loses its digits in float32 at small t
        step = tl.load(p_step).to(tl.float64)
        rate = tl.load(p_lr).to(tl.float64)
        b_step_size = (rate / (1 - tl.exp2(step * LOG2_BETA1))).to(ACC)
        b_root = tl.sqrt(1 - tl.exp2(step * LOG2_BETA2)).to(ACC)
    else:
        b_step_size = tl.cast(step_size, ACC)
        b_root = tl.cast(root, ACC)
    b_g = tl.load(p_grad + offsets, mask=mask, other=0).to(ACC)
    b_m = tl.load(p_exp_avg + offsets, mask=mask, other=0).to(ACC)
    b_v = tl.load(p_exp_avg_sq + offsets, mask=mask, other=0).to(ACC)
    b_x = tl.load(p_image + offsets, mask=mask, other=0).to(ACC)
    b_m += (b_g - b_m) * ONE_MINUS_BETA1
    b_v = b_v * BETA2 + b_g * b_g * (1 - BETA2)
    b_x -= b_step_size * divide(b_m, divide(square_root(b_v, ACC), b_root, ACC) + EPS, ACC)
    # in 32 bits: a 64-bit division for each element would cost as much as the memory
    channel = ((start // inner) % CHANNELS).to(tl.int32) + ((start % inner).to(tl.int32) + local) // inner
    channel = channel % CHANNELS
    b_low = tl.load(p_low + channel, mask=mask, other=0).to(ACC)
    b_high = tl.load(p_high + channel, mask=mask, other=0).to(ACC)
    # a NaN stays a NaN, as in torch.clamp
    b_x = tl.where(b_x < b_low, b_low, b_x)
    b_x = tl.where(b_x > b_high, b_high, b_x)
    tl.store(p_image + offsets, b_x.to(p_image.dtype.element_ty), mask=mask)
    tl.store(p_exp_avg + offsets, b_m.to(p_exp_avg.dtype.element_ty), mask=mask)
    tl.store(p_exp_avg_sq + offsets, b_v.to(p_exp_avg_sq.dtype.element_ty), mask=mask)


def adam_clamp(
    image: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int | Tensor,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    low: Tensor,
    high: Tensor,
    block: int = ADAM_BLOCK,
) -> None:
    """Write one step into image and moments, all dense in one layout [N, C, h, w]; low, high: [C] on the device.

    A step or rate given as a tensor is read by the kernel, so that a captured graph follows it.
    """
    inner = 1 if image.stride(1) == 1 else image.shape[2] * image.shape[3]
    beta1, beta2 = betas
    # a float argument would reach the interpreter's float64 kernel in float32
    from_tensor = isinstance(step, Tensor) or isinstance(lr, Tensor) or image.dtype == torch.float64
    if from_tensor:
        exact = {"dtype": torch.float64, "device": image.device}
        p_step = step if isinstance(step, Tensor) else torch.full((), step, **exact)
        p_lr = lr if isinstance(lr, Tensor) else torch.full((), lr, **exact)
        step_size = root = 0.0
    else:
        p_step = p_lr = image
        step_size, root = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
    elements = image.numel()
    adam_clamp_kernel[(triton.cdiv(elements, block),)](
        image,
        grad,
        exp_avg,
        exp_avg_sq,
        low,
        high,
        p_step,
        p_lr,
        step_size,
        root,
        elements,
        inner,
        CHANNELS=image.shape[1],
        EPS=eps,
        FROM_TENSOR=from_tensor,
        ACC=accumulator(image),
        BLOCK=block,
        num_warps=ADAM_WARPS,
        **OPTIONS,
        **_beta_constants(betas),
    )


def _beta_constants(betas: tuple[float, float]) -> dict[str, float]:
    beta1, beta2 = betas
    return {
        "ONE_MINUS_BETA1": 1 - beta1,
        "BETA2": beta2,
        # 0 to the power of t is 0 for t >= 1; the exponent of a large negative number is too
        "LOG2_BETA1": math.log2(beta1) if beta1 > 0 else -1e30,
        "LOG2_BETA2": math.log2(beta2) if beta2 > 0 else -1e30,
    }


def compilations() -> Iterator[Compilation]:
    """The configurations of the pipeline: float32 images, gradients in three types, moments in float32 or bf16."""
    for grad, moment, from_tensor in [
        ("fp32", "fp32", False),
        ("fp32", "fp32", True),
        ("bf16", "fp32", True),
        ("fp16", "fp32", True),
        ("fp32", "bf16", True),
    ]:
        yield Compilation(
            adam_clamp_kernel,
            {
                "p_image": "*fp32",
                "p_grad": f"*{grad}",
                "p_exp_avg": f"*{moment}",
                "p_exp_avg_sq": f"*{moment}",
                "p_low": "*fp32",
                "p_high": "*fp32",
                "p_step": "*i64" if from_tensor else "*fp32",
                "p_lr": "*fp32",
                "step_size": "fp32",
                "root": "fp32",
                "elements": "i32",
                "inner": "i32",
            },
            {
                "CHANNELS": 3,
                "EPS": 1e-8,
                "FROM_TENSOR": from_tensor,
                "ACC": tl.float32,
                "BLOCK": ADAM_BLOCK,
                **_beta_constants((0.5, 0.9)),
            },
            num_warps=ADAM_WARPS,
            divisible=("elements", "inner"),
        )
