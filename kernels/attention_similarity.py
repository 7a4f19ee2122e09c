"""Triton kernels of the attention similarity loss over ragged lists of earlier maps, forward and backward."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from fd2fast.kernels._common import (
    OPTIONS,
    Compilation,
    accumulator,
    accumulator_torch,
    divide,
    power_of_two,
    split_options,
    square_root,
)
from fd2fast.kernels._configs import SIMILARITY_BWD, SIMILARITY_FWD
from torch import Tensor


@triton.jit
def attention_similarity_fwd_kernel(
    p_attention,  # [N, L]
    p_prior,  # [P, L]
    p_offsets,  # [N+1]
    p_loss,  # [N]
    p_pull,  # [P] weight of a - p in the gradient
    p_shrink,  # [N] weight of a in the gradient
    L,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    begin = tl.load(p_offsets + n)
    end = tl.load(p_offsets + n + 1)
    o = tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], ACC)
    for start in range(0, L, BLOCK):
        b_a = tl.load(p_attention + n * L + start + o, mask=start + o < L, other=0).to(ACC)
        acc += b_a * b_a
    a_norm = square_root(tl.sum(acc), ACC)
    share = 1 / tl.maximum(end - begin, 1).to(ACC)
    loss = tl.where(end > begin, tl.full([], 1, ACC), tl.full([], 0, ACC))
    shrink = tl.full([], 0, ACC)
    for j in range(begin, end):
        # the interpreter's loops count in 32 bits
        p_map = p_prior + (tl.full([], 0, tl.int64) + j) * L
        acc = tl.zeros([BLOCK], ACC)
        acc_p = tl.zeros([BLOCK], ACC)
        for start in range(0, L, BLOCK):
            b_a = tl.load(p_attention + n * L + start + o, mask=start + o < L, other=0).to(ACC)
            b_p = tl.load(p_map + start + o, mask=start + o < L, other=0).to(ACC)
            acc += (b_a - b_p) * (b_a - b_p)
            acc_p += b_p * b_p
        distance = square_root(tl.sum(acc), ACC)
        total = a_norm + square_root(tl.sum(acc_p), ACC) + EPS
        quotient = divide(distance, total, ACC)
        loss -= share * quotient
        shrink += share * divide(quotient, total, ACC)
        # equal maps pull nowhere
        apart = tl.where(distance > 0, distance * total, 1.0)
        tl.store(p_pull + j, tl.where(distance > 0, -divide(share, apart, ACC), 0.0))
    tl.store(p_loss + n, loss)
    tl.store(p_shrink + n, tl.where(a_norm > 0, divide(shrink, tl.where(a_norm > 0, a_norm, 1.0), ACC), 0.0))


@triton.jit
def attention_similarity_bwd_kernel(
    p_grad,  # [N]
    p_attention,  # [N, L]
    p_prior,  # [P, L]
    p_offsets,  # [N+1]
    p_pull,  # [P]
    p_shrink,  # [N]
    p_grad_attention,  # [N, L]
    L,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = o < L
    begin = tl.load(p_offsets + n)
    end = tl.load(p_offsets + n + 1)
    b_a = tl.load(p_attention + n * L + o, mask=mask, other=0).to(ACC)
    acc = b_a * tl.load(p_shrink + n)
    for j in range(begin, end):
        p_map = p_prior + (tl.full([], 0, tl.int64) + j) * L
        b_p = tl.load(p_map + o, mask=mask, other=0).to(ACC)
        acc += tl.load(p_pull + j) * (b_a - b_p)
    grad = tl.load(p_grad + n).to(ACC)
    tl.store(p_grad_attention + n * L + o, (acc * grad).to(p_grad_attention.dtype.element_ty), mask=mask)


def attention_similarity_fwd(
    attention: Tensor, prior: Tensor, offsets: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [N], and what the backward needs: the weights of a - p [P] and of a [N], for a gradient of 1.

    attention [N, M, H, W] and prior [P, M, H, W], dense in one layout, both NCHW or both channels_last; offsets int64
    [N+1]. One program for each sample walks its list; a map stays in the cache between two earlier ones. Predicted on an
    H200 at N 100 and three earlier maps each: 7x7 maps, M 8 to 64: 0.1 to 1.3 MB, 4 us, the launch and three loads in a
    row; 28x28, M 32: 20 MB in bf16, 12 us, since one program reads 50 KB for each map.
    """
    n, length = attention.shape[0], attention[0:1].numel() if attention.shape[0] else 0
    acc, dtype = accumulator(attention, prior), accumulator_torch(attention, prior)
    loss = torch.empty(n, dtype=dtype, device=attention.device)
    pull = torch.empty(prior.shape[0], dtype=dtype, device=attention.device)
    shrink = torch.empty(n, dtype=dtype, device=attention.device)
    if n:
        constants = SIMILARITY_FWD | {"BLOCK": power_of_two(length, 128, SIMILARITY_FWD["BLOCK"])}
        attention_similarity_fwd_kernel[(n,)](
            attention, prior, offsets, loss, pull, shrink, length, EPS=eps, ACC=acc, **constants, **OPTIONS
        )
    return loss, pull, shrink


def attention_similarity_bwd(
    grad: Tensor, attention: Tensor, prior: Tensor, offsets: Tensor, pull: Tensor, shrink: Tensor
) -> Tensor:
    """Gradient to attention in its type and layout: grad_n (sum over j of pull[j] (a_n - p_j) + shrink[n] a_n).

    0 for an empty list. Each input is read once: 1.5 MB and 3 us at 7x7, M 32, N 100; 25 MB and 9 us at 28x28.
    """
    grad_attention = torch.empty_like(attention)
    if grad_attention.numel():
        length = attention[0].numel()
        constants = SIMILARITY_BWD | {"BLOCK": power_of_two(length, 128, SIMILARITY_BWD["BLOCK"])}
        attention_similarity_bwd_kernel[(attention.shape[0], triton.cdiv(length, constants["BLOCK"]))](
            grad.contiguous(),
            attention,
            prior,
            offsets,
            pull,
            shrink,
            grad_attention,
            length,
            ACC=accumulator(attention, prior),
            **constants,
            **OPTIONS,
        )
    return grad_attention


def compilations() -> Iterator[Compilation]:
    """Both kernels for the pipeline's types, at 7x7 maps (a block of a whole map) and larger ones."""
    fp32 = {"ACC": tl.float32}
    for kind in ("*fp32", "*bf16", "*fp16"):
        inputs = {"p_attention": kind, "p_prior": kind, "p_offsets": "*i64", "p_pull": "*fp32", "p_shrink": "*fp32"}
        for block in (512, SIMILARITY_FWD["BLOCK"]):
            constants, options = split_options(SIMILARITY_FWD | {"BLOCK": block})
            yield Compilation(
                attention_similarity_fwd_kernel,
                inputs | {"p_loss": "*fp32", "L": "i32"},
                fp32 | {"EPS": 1e-6} | constants,
                **options,
            )
        constants, options = split_options(SIMILARITY_BWD)
        yield Compilation(
            attention_similarity_bwd_kernel,
            inputs | {"p_grad": "*fp32", "p_grad_attention": kind, "L": "i32"},
            fp32 | constants,
            **options,
        )
