"""Triton kernels of the prototype loss: all distances by direct differences, the loss, the gradient to z."""

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
    split_options,
    square_root,
)
from fd2fast.kernels._configs import PROTOTYPE_BWD, PROTOTYPE_DISTANCE, PROTOTYPE_LOSS, PROTOTYPE_PROGRAMS
from torch import Tensor


@triton.jit
def prototype_distance_fwd_kernel(
    p_z,  # [N, D]
    p_prototypes,  # [K, D]
    p_square,  # [S, N+1, K+1]
    N,
    K,
    D,
    span,  # columns of one split, a multiple of BD
    stride_z,
    stride_k,
    ACC: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    STAGES: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    o_k = tl.program_id(1).to(tl.int64) * BK + tl.arange(0, BK)
    split = tl.program_id(2).to(tl.int64)
    # one sum for each lane and pair, added up after the loop: the loop is nothing but subtract and fused multiply-add
    acc = tl.zeros([BN, BK, BD], ACC)
    for start in tl.range(split * span, tl.minimum(split * span + span, D), BD, num_stages=STAGES):
        o_d = start + tl.arange(0, BD)
        m_d = (o_d < D)[None, :]
        # row N and column K read as zeros, so that their distances are the norms
        b_z = tl.load(p_z + o_n[:, None] * stride_z + o_d[None, :], mask=(o_n < N)[:, None] & m_d, other=0).to(ACC)
        b_k = tl.load(p_prototypes + o_k[:, None] * stride_k + o_d[None, :], mask=(o_k < K)[:, None] & m_d, other=0)
        b_difference = b_z[:, None, :] - b_k.to(ACC)[None, :, :]  # [BN, BK, BD]
        acc += b_difference * b_difference
    o_square = (split * (N + 1) + o_n[:, None]) * (K + 1) + o_k[None, :]
    tl.store(p_square + o_square, tl.sum(acc, axis=2), mask=(o_n <= N)[:, None] & (o_k <= K)[None, :])


@triton.jit
def prototype_loss_fwd_kernel(
    p_square,  # [S, N+1, K+1]
    p_labels,  # [N]
    p_loss,  # [N]
    p_pull,  # [K, N] weight of z - c in the gradient
    p_shrink,  # [N] weight of z in the gradient
    N,
    K,
    S,
    OWN: tl.constexpr,  # weight of the distance to the own class in the loss
    OTHER: tl.constexpr,  # weight of each other distance
    CONSTANT: tl.constexpr,
    EPS: tl.constexpr,
    ACC: tl.constexpr,
    BS: tl.constexpr,
    BK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BS)
    m_s = o_s < S
    label = tl.load(p_labels + n)
    p_split = p_square + o_s.to(tl.int64) * (N + 1) * (K + 1)  # [BS]
    b_z_norm = square_root(tl.sum(tl.load(p_split + n * (K + 1) + K, mask=m_s, other=0), axis=0), ACC)
    b_loss = tl.zeros([BK], ACC)
    b_shrink = tl.zeros([BK], ACC)
    for start in range(0, K, BK):
        o_k = start + tl.arange(0, BK)
        m_k = o_k < K
        m = m_s[:, None] & m_k[None, :]
        b_square = tl.sum(tl.load(p_split[:, None] + n * (K + 1) + o_k[None, :], mask=m, other=0), axis=0)
        p_norm = p_split[:, None] + tl.full([], N, tl.int64) * (K + 1) + o_k[None, :]
        b_k_norm = square_root(tl.sum(tl.load(p_norm, mask=m, other=0), axis=0), ACC)
        b_distance = square_root(b_square, ACC)
        b_sum = tl.where(m_k, b_z_norm + b_k_norm + EPS, 1.0)
        b_weight = tl.where(o_k == label, tl.full([BK], OWN, ACC), tl.full([BK], OTHER, ACC))
        b_weight = tl.where(m_k, b_weight, 0.0)
        b_quotient = divide(b_distance, b_sum, ACC)
        b_loss += b_weight * b_quotient
        b_shrink += b_weight * divide(b_quotient, b_sum, ACC)
        b_product = b_distance * b_sum
        b_pull = tl.where(b_distance > 0, divide(b_weight, tl.where(b_distance > 0, b_product, 1.0), ACC), 0.0)
        tl.store(p_pull + o_k.to(tl.int64) * N + n, b_pull, mask=m_k)
    tl.store(p_loss + n, tl.sum(b_loss, axis=0) + CONSTANT)
    b_total = tl.sum(b_shrink, axis=0)
    b_safe = tl.where(b_z_norm > 0, b_z_norm, 1.0)
    tl.store(p_shrink + n, tl.where(b_z_norm > 0, -divide(b_total, b_safe, ACC), 0.0))


@triton.jit
def prototype_loss_bwd_kernel(
    p_grad,  # [N]
    p_z,  # [N, D]
    p_prototypes,  # [K, D]
    p_pull,  # [K, N]
    p_shrink,  # [N]
    p_grad_z,  # [N, D]
    N,
    K,
    D,
    stride_z,
    stride_k,
    ACC: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
    STAGES: tl.constexpr,
):
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    o_d = tl.program_id(1).to(tl.int64) * BD + tl.arange(0, BD)
    m_n = o_n < N
    m_d = o_d < D
    m = m_n[:, None] & m_d[None, :]
    b_z = tl.load(p_z + o_n[:, None] * stride_z + o_d[None, :], mask=m, other=0).to(ACC)  # [BN, BD]
    acc = b_z * tl.load(p_shrink + o_n, mask=m_n, other=0)[:, None]
    for start in tl.range(0, K, BK, num_stages=STAGES):
        for i in tl.static_range(BK):
            k = start + tl.full([1], i, tl.int64)
            b_k = tl.load(p_prototypes + k * stride_k + o_d, mask=m_d & (k < K), other=0).to(ACC)
            b_pull = tl.load(p_pull + k * N + o_n, mask=m_n & (k < K), other=0)
            acc += b_pull[:, None] * (b_z - b_k[None, :])
    b_grad = tl.load(p_grad + o_n, mask=m_n, other=0).to(ACC)
    tl.store(p_grad_z + o_n[:, None] * D + o_d[None, :], acc * b_grad[:, None], mask=m)


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _weights(beta: float, classes: int) -> dict[str, float]:
    # with one class there is no other one and the second term of Eq. 9 is dropped
    others = classes > 1
    return {
        "OWN": float(beta),
        "OTHER": -(1.0 - beta) / (classes - 1) if others else 0.0,
        "CONSTANT": 1.0 - beta if others else 0.0,
    }


def _splits(n: int, k: int, d: int) -> tuple[int, int]:
    """How many parts D is cut into, and their length: enough programs for the GPU, the same on every device."""
    bd = PROTOTYPE_DISTANCE["BD"]
    tiles = triton.cdiv(n + 1, PROTOTYPE_DISTANCE["BN"]) * triton.cdiv(k + 1, PROTOTYPE_DISTANCE["BK"])
    wanted = max(1, min(PROTOTYPE_PROGRAMS // tiles, d // 256, 32))
    span = triton.cdiv(triton.cdiv(max(d, 1), wanted), bd) * bd
    return triton.cdiv(max(d, 1), span), span


def _loss_tile(splits: int) -> dict[str, int]:
    """Splits and classes in one tile of the second kernel: at most 32 numbers for each thread."""
    bs = triton.next_power_of_2(splits)
    return PROTOTYPE_LOSS | {"BS": bs, "BK": min(PROTOTYPE_LOSS["BK"], 4096 // bs)}


def prototype_loss_fwd(
    z: Tensor, prototypes: Tensor, labels: Tensor, beta: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [N], and what the backward needs: the weights of z - c [K, N] and of z [N], for a gradient of 1.

    z [N, D], prototypes [K, D], labels int [N]. Two kernels. The first sums (z - c)^2 for a tile of 32 x 32 pairs over
    one split of D, in float32 from the differences themselves, so that a sample next to a prototype keeps its digits;
    |z|^2 and |c|^2 come out of the same sums as distances to a zero row and column of the tile's padding. The second
    adds the splits in a fixed order, takes roots and quotients, and both terms of Eq. 9.

    Predicted on an H200, from the instructions of the compiled loop (2 of 2.4 are the subtraction and the fused
    multiply-add; 33.5 T lanes/s) at N 100, K 200: D 4096 10 us, 16384 41 us, 65536 160 us, and 3 us for the second;
    traffic (N K D 4 bytes / 16, mostly L2) stays below that. Compute bound: differences cannot use tensor
    cores, so that forward and backward together pass 0.1 ms above D of about 16384 (0.35 ms at 65536).
    """
    n, d = z.shape
    k = prototypes.shape[0]
    z, prototypes = _rows(z), _rows(prototypes)
    acc, dtype = accumulator(z, prototypes), accumulator_torch(z, prototypes)
    splits, span = _splits(n, k, d)
    square = torch.empty(splits, n + 1, k + 1, dtype=dtype, device=z.device)
    loss = torch.empty(n, dtype=dtype, device=z.device)
    pull = torch.empty(k, n, dtype=dtype, device=z.device)
    shrink = torch.empty(n, dtype=dtype, device=z.device)
    if n == 0:
        return loss, pull, shrink
    config = PROTOTYPE_DISTANCE
    grid = (triton.cdiv(n + 1, config["BN"]), triton.cdiv(k + 1, config["BK"]), splits)
    prototype_distance_fwd_kernel[grid](
        z, prototypes, square, n, k, d, span, z.stride(0), prototypes.stride(0), ACC=acc, **config, **OPTIONS
    )
    prototype_loss_fwd_kernel[(n,)](
        square,
        labels.contiguous(),
        loss,
        pull,
        shrink,
        n,
        k,
        splits,
        EPS=eps,
        ACC=acc,
        **_weights(beta, k),
        **_loss_tile(splits),
        **OPTIONS,
    )
    return loss, pull, shrink


def prototype_loss_bwd(grad: Tensor, z: Tensor, prototypes: Tensor, pull: Tensor, shrink: Tensor) -> Tensor:
    """Gradient [N, D] to z in z's type: grad_n (sum over k of pull[k, n] (z_n - c_k) + shrink[n] z_n).

    A pair at distance 0 has weight 0. Differences again, because the weight of a near prototype is large. Predicted on
    an H200 as the forward, at 62 % multiply-add slots instead of 82 %: N 100, K 200: D 4096 13 us, 16384 48 us,
    65536 190 us.
    """
    n, d = z.shape
    z, prototypes = _rows(z), _rows(prototypes)
    grad_z = torch.empty(n, d, dtype=z.dtype, device=z.device)
    if n == 0 or d == 0:
        return grad_z
    config = PROTOTYPE_BWD
    prototype_loss_bwd_kernel[(triton.cdiv(n, config["BN"]), triton.cdiv(d, config["BD"]))](
        grad.contiguous(),
        z,
        prototypes,
        pull,
        shrink,
        grad_z,
        n,
        prototypes.shape[0],
        d,
        z.stride(0),
        prototypes.stride(0),
        ACC=accumulator(z, prototypes),
        **config,
        **OPTIONS,
    )
    return grad_z


def compilations() -> Iterator[Compilation]:
    """The kernels at the pipeline's types: float32 z and prototypes, and bf16 ones."""
    sizes = {"N": "i32", "K": "i32", "D": "i32", "stride_z": "i32", "stride_k": "i32"}
    for kind in ("*fp32", "*bf16"):
        pointers = {"p_z": kind, "p_prototypes": kind}
        constants, options = split_options(PROTOTYPE_DISTANCE)
        yield Compilation(
            prototype_distance_fwd_kernel,
            pointers | {"p_square": "*fp32", "span": "i32"} | sizes,
            {"ACC": tl.float32} | constants,
            divisible=("D", "span", "stride_z", "stride_k"),
            **options,
        )
        constants, options = split_options(PROTOTYPE_BWD)
        yield Compilation(
            prototype_loss_bwd_kernel,
            pointers | {"p_grad": "*fp32", "p_pull": "*fp32", "p_shrink": "*fp32", "p_grad_z": kind} | sizes,
            {"ACC": tl.float32} | constants,
            divisible=("D", "stride_z", "stride_k"),
            **options,
        )
    for splits in (1, 8, 32):
        constants, options = split_options(_loss_tile(splits))
        yield Compilation(
            prototype_loss_fwd_kernel,
            {"p_square": "*fp32", "p_labels": "*i64", "p_loss": "*fp32", "p_pull": "*fp32", "p_shrink": "*fp32"}
            | {"N": "i32", "K": "i32", "S": "i32"},
            {"ACC": tl.float32, "EPS": 1e-6} | _weights(0.5, 200) | constants,
            **options,
        )
