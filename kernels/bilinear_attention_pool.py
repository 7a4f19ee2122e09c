"""Triton kernels of bilinear attention pooling with sign-sqrt and unit norm, forward and backward."""

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
from fd2fast.kernels._configs import (
    POOL_BWD,
    POOL_BWD_INNER,
    POOL_BWD_SUM,
    POOL_FWD,
    POOL_PROGRAMS,
    POOL_SCALE,
)
from torch import Tensor

# attention maps in one tile of the products
MAX_MAPS = 64


@triton.jit
def pool_root_fwd_kernel(
    p_features,  # [N, C, P] by strides
    p_attention,  # [N, M, P] by strides
    p_root,  # [N, M, C]
    p_square,  # [N, tiles of C]
    C,
    M,
    P,
    stride_fn,
    stride_fc,
    stride_fp,
    stride_an,
    stride_am,
    stride_ap,
    EPS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BM: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    o_c = tile.to(tl.int64) * BC + tl.arange(0, BC)
    o_m = tl.arange(0, BM).to(tl.int64)
    m_c = (o_c < C)[None, :]
    m_m = (o_m < M)[:, None]
    acc = tl.zeros([BM, BC], ACC)
    for start in range(0, P, BP):
        o_p = start + tl.arange(0, BP).to(tl.int64)
        p_a = p_attention + n * stride_an + o_m[:, None] * stride_am + o_p[None, :] * stride_ap
        b_a = tl.load(p_a, mask=m_m & (o_p < P)[None, :], other=0).to(ACC)
        p_f = p_features + n * stride_fn + o_p[:, None] * stride_fp + o_c[None, :] * stride_fc
        b_f = tl.load(p_f, mask=(o_p < P)[:, None] & m_c, other=0).to(ACC)
        acc = tl.dot(b_a, b_f, acc, input_precision=PRECISION, out_dtype=ACC)
    b_gram = acc / P
    b_size = square_root(tl.abs(b_gram) + EPS, ACC)
    # neither branch where the product is 0 or NaN
    b_root = tl.where(b_gram > 0, b_size, tl.where(b_gram < 0, -b_size, b_gram))
    tl.store(p_root + (n * M + o_m[:, None]) * C + o_c[None, :], b_root, mask=m_m & m_c)
    b_root = tl.where(m_m & m_c, b_root, 0.0)
    tl.store(p_square + n * tl.num_programs(1) + tile, tl.sum(b_root * b_root))


@triton.jit
def pool_scale_fwd_kernel(
    p_z,  # [N, L], in: roots, out: unit vectors
    p_square,  # [N, T]
    p_norm,  # [N]
    L,
    T,
    ACC: tl.constexpr,
    BT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    o_t = tl.arange(0, BT)
    norm = square_root(tl.sum(tl.load(p_square + n * T + o_t, mask=o_t < T, other=0)), ACC)
    if part == 0:
        tl.store(p_norm + n, norm)
    o = part * BLOCK + tl.arange(0, BLOCK)
    b_root = tl.load(p_z + n * L + o, mask=o < L, other=0)
    tl.store(p_z + n * L + o, divide(b_root, tl.maximum(norm, tl.full([], 1e-12, ACC)), ACC), mask=o < L)


@triton.jit
def pool_inner_bwd_kernel(
    p_z,  # [N, L]
    p_grad,  # [N, L]
    p_inner,  # [N, T]
    L,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    o = part * BLOCK + tl.arange(0, BLOCK)
    b_z = tl.load(p_z + n * L + o, mask=o < L, other=0).to(ACC)
    b_grad = tl.load(p_grad + n * L + o, mask=o < L, other=0).to(ACC)
    tl.store(p_inner + n * tl.num_programs(1) + part, tl.sum(b_z * b_grad))


@triton.jit
def pool_bwd_kernel(
    p_features,  # [N, C, P] by strides, as its gradient
    p_attention,  # [N, M, P] by strides
    p_z,  # [N, M, C]
    p_norm,  # [N]
    p_grad,  # [N, M, C]
    p_inner,  # [N, T]
    p_grad_features,
    p_part,  # [N, S, M, P]
    C,
    M,
    P,
    T,
    S,
    tiles_p,
    tiles_c,  # tiles of C in one split
    stride_fn,
    stride_fc,
    stride_fp,
    stride_an,
    stride_am,
    stride_ap,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    # programs of one sample are neighbours, so that its z and gradient come from the cache
    program = tl.program_id(0)
    o_p = (program % tiles_p).to(tl.int64) * BP + tl.arange(0, BP)
    split = (program // tiles_p) % S
    n = (program // tiles_p // S).to(tl.int64)
    o_m = tl.arange(0, BM).to(tl.int64)
    o_t = tl.arange(0, BT)
    m_m = (o_m < M)[:, None]
    m_p = o_p < P
    norm = tl.load(p_norm + n)
    inner = tl.sum(tl.load(p_inner + n * T + o_t, mask=o_t < T, other=0))
    # below the floor of the norm the scale is a constant and nothing is projected out
    floor = tl.full([], 1e-12, ACC)
    inner = tl.where(norm >= floor, inner, 0.0)
    norm = tl.maximum(norm, floor)
    scale = 0.5 / (norm * norm * P)
    p_a = p_attention + n * stride_an + o_m[:, None] * stride_am + o_p[None, :] * stride_ap
    b_a = tl.load(p_a, mask=m_m & m_p[None, :], other=0).to(ACC)  # [BM, BP]
    acc = tl.zeros([BM, BP], ACC)
    for tile in range(split * tiles_c, split * tiles_c + tiles_c):
        o_c = tile * BC + tl.arange(0, BC).to(tl.int64)
        m_c = (o_c < C)[None, :]
        o_z = (n * M + o_m[:, None]) * C + o_c[None, :]
        b_z = tl.load(p_z + o_z, mask=m_m & m_c, other=0).to(ACC)  # [BM, BC]
        b_grad = tl.load(p_grad + o_z, mask=m_m & m_c, other=0).to(ACC)
        # sqrt(|G| + eps) is |z| norm, and the root's own gradient is 0 at G = 0, where z is 0
        b_some = b_z != 0
        b_gram = tl.where(b_some, (b_grad - b_z * inner) * scale / tl.where(b_some, tl.abs(b_z), 1.0), 0.0)
        o_f = n * stride_fn + o_p[:, None] * stride_fp + o_c[None, :] * stride_fc
        m_f = m_p[:, None] & m_c
        b_f = tl.load(p_features + o_f, mask=m_f, other=0).to(ACC)  # [BP, BC]
        b_grad_f = tl.dot(tl.trans(b_a), b_gram, input_precision=PRECISION, out_dtype=ACC)
        tl.store(p_grad_features + o_f, b_grad_f.to(p_grad_features.dtype.element_ty), mask=m_f)
        acc = tl.dot(b_gram, tl.trans(b_f), acc, input_precision=PRECISION, out_dtype=ACC)
    o_part = ((n * S + split) * M + o_m[:, None]) * P + o_p[None, :]
    tl.store(p_part + o_part, acc, mask=m_m & m_p[None, :])


@triton.jit
def pool_sum_bwd_kernel(
    p_part,  # [N, S, M * P]
    p_grad_attention,  # [N, M, P] by strides
    M,
    P,
    S,
    stride_an,
    stride_am,
    stride_ap,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = o < M * P
    acc = tl.load(p_part + n * S * M * P + o, mask=mask, other=0)
    for split in range(1, S):
        acc += tl.load(p_part + (n * S + split) * M * P + o, mask=mask, other=0)
    p_out = p_grad_attention + n * stride_an + (o // P) * stride_am + (o % P) * stride_ap
    tl.store(p_out, acc.to(p_grad_attention.dtype.element_ty), mask=mask)


def _precision(features: Tensor, attention: Tensor) -> str:
    """TF32 holds bf16 and fp16 values exactly; float32 ones it would cut."""
    half = (torch.bfloat16, torch.float16)
    return "tf32" if features.dtype in half and attention.dtype in half else "ieee"


def _tiles(config: dict[str, int], maps: int, pixels: int) -> dict[str, int]:
    return config | {"BM": power_of_two(maps, 16, MAX_MAPS), "BP": power_of_two(pixels, 16, config["BP"])}


def _strides(tensor: Tensor) -> tuple[int, int, int]:
    """Strides of [N, C, pixel] of an NCHW or channels_last tensor."""
    # a dimension of size 1 may have any stride
    pixel = tensor.stride(3) if tensor.shape[3] > 1 else (tensor.stride(2) if tensor.shape[2] > 1 else 1)
    return tensor.stride(0), tensor.stride(1), pixel


def bilinear_attention_pool_fwd(features: Tensor, attention: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """z [N, M*C] and the norms [N] of its roots; features [N, C, H, W], attention [N, M, H, W], M <= 64.

    Both dense, NCHW or channels_last. Two kernels: one program for each sample and 128 channels makes the product over
    all pixels, its roots and their sum of squares, so that features are read once and every multiprocessor has work at
    N = 100; then the vector, still in the L2 cache, is scaled. One program for each sample would save that pass, and
    leave a quarter of the chip idle and the rest waiting for loads.

    Predicted on an H200 at N 100, 7x7, bf16 features, from bytes at 4.3 TB/s and 3 us for each launch: C 512, M 8:
    7 MB, 7 us; C 2048, M 8: 33 MB, 14 us; C 2048, M 32: 98 MB, half of them in the cache, 25 us. At 28x28 the features
    alone (321 MB at C 2048) are 75 us.
    """
    n, c, h, w = features.shape
    m = attention.shape[1]
    acc, dtype = accumulator(features, attention), accumulator_torch(features, attention)
    precision = _precision(features, attention)
    config = _tiles(POOL_FWD[precision], m, h * w)
    tiles = triton.cdiv(c, config["BC"])
    z = torch.empty(n, m * c, dtype=dtype, device=features.device)
    norm = torch.empty(n, dtype=dtype, device=features.device)
    if n == 0:
        return z, norm
    if m * c == 0:
        return z, norm.zero_()
    square = torch.empty(n, tiles, dtype=dtype, device=features.device)
    pool_root_fwd_kernel[(n, tiles)](
        features,
        attention,
        z,
        square,
        c,
        m,
        h * w,
        *_strides(features),
        *_strides(attention),
        EPS=eps,
        PRECISION=precision,
        ACC=acc,
        **config,
        **OPTIONS,
    )
    pool_scale_fwd_kernel[(n, triton.cdiv(m * c, POOL_SCALE["BLOCK"]))](
        z, square, norm, m * c, tiles, ACC=acc, BT=triton.next_power_of_2(tiles), **POOL_SCALE, **OPTIONS
    )
    return z, norm


def bilinear_attention_pool_bwd(
    grad: Tensor, features: Tensor, attention: Tensor, z: Tensor, norm: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients to features and attention, each in its tensor's type and layout.

    Three kernels: <z, grad> of each sample; then for each sample, tile of pixels and split of channels the gradient to
    the product, remade from z and grad, times attention (written) and times features (summed over channels); then the
    sum over splits, in a fixed order. Predicted on an H200 at N 100, 7x7, bf16: C 512, M 8: 16 MB, 12 us; C 2048, M 8:
    66 MB, 22 us; C 2048, M 32: 145 MB, 40 us; with the forward below 0.1 ms. At 28x28 the features are read and their
    gradient written: 150 us at C 2048.
    """
    n, c, h, w = features.shape
    m = attention.shape[1]
    grad = grad.contiguous()
    acc, dtype = accumulator(features, attention), accumulator_torch(features, attention)
    grad_features, grad_attention = torch.empty_like(features), torch.empty_like(attention)
    if n == 0 or m * c == 0:
        return grad_features.zero_(), grad_attention.zero_()
    parts = triton.cdiv(m * c, POOL_BWD_INNER["BLOCK"])
    inner = torch.empty(n, parts, dtype=dtype, device=features.device)
    pool_inner_bwd_kernel[(n, parts)](z, grad, inner, m * c, ACC=acc, **POOL_BWD_INNER, **OPTIONS)
    precision = _precision(features, attention)
    config = _tiles(POOL_BWD[precision], m, h * w)
    tiles_p, tiles_c = triton.cdiv(h * w, config["BP"]), triton.cdiv(c, config["BC"])
    per_split = triton.cdiv(tiles_c, max(1, min(tiles_c, POOL_PROGRAMS // (n * tiles_p))))
    splits = triton.cdiv(tiles_c, per_split)
    part = torch.empty(n, splits, m, h * w, dtype=dtype, device=features.device)
    pool_bwd_kernel[(n * splits * tiles_p,)](
        features,
        attention,
        z,
        norm,
        grad,
        inner,
        grad_features,
        part,
        c,
        m,
        h * w,
        parts,
        splits,
        tiles_p,
        per_split,
        *_strides(features),
        *_strides(attention),
        PRECISION=precision,
        ACC=acc,
        BT=triton.next_power_of_2(parts),
        **config,
        **OPTIONS,
    )
    pool_sum_bwd_kernel[(n, triton.cdiv(m * h * w, POOL_BWD_SUM["BLOCK"]))](
        part, grad_attention, m, h * w, splits, *_strides(attention), **POOL_BWD_SUM, **OPTIONS
    )
    return grad_features, grad_attention


def compilations() -> Iterator[Compilation]:
    """The pipeline's types and sizes: 7x7 maps, 8 to 64 of them, channels_last; NCHW in float32; maps of 4x4 pixels."""
    strides = {f"stride_{t}{s}": "i32" for t, s in ("fn", "fc", "fp", "an", "am", "ap")}
    sizes = {"C": "i32", "M": "i32", "P": "i32"}
    fp32 = {"ACC": tl.float32}
    last, first = {"stride_fc": 1, "stride_am": 1}, {"stride_fp": 1, "stride_ap": 1}
    for kind, precision, unit, pixels, numbers in (
        ("*bf16", "tf32", last, 49, (8, 32, 64)),
        ("*fp16", "tf32", last, 49, (32,)),
        ("*bf16", "tf32", first, 16, (64,)),
        ("*fp32", "ieee", last, 49, (8, 32, 64)),
        ("*fp32", "ieee", first, 49, (32, 64)),
    ):
        products = fp32 | {"PRECISION": precision} | unit
        inputs = {"p_features": kind, "p_attention": kind} | sizes | strides
        for maps in numbers:
            constants, options = split_options(_tiles(POOL_FWD[precision], maps, pixels))
            yield Compilation(
                pool_root_fwd_kernel,
                inputs | {"p_root": "*fp32", "p_square": "*fp32"},
                products | {"EPS": 1e-6} | constants,
                divisible=("C", "stride_fn", "stride_fp"),
                **options,
            )
            constants, options = split_options(_tiles(POOL_BWD[precision], maps, pixels))
            yield Compilation(
                pool_bwd_kernel,
                inputs
                | {name: "*fp32" for name in ("p_z", "p_norm", "p_grad", "p_inner", "p_part")}
                | {"p_grad_features": kind, "T": "i32", "S": "i32", "tiles_p": "i32", "tiles_c": "i32"},
                products | {"BT": 8} | constants,
                divisible=("C", "stride_fn", "stride_fp"),
                **options,
            )
    for kind in ("*bf16", "*fp32"):
        constants, options = split_options(POOL_BWD_SUM)
        yield Compilation(
            pool_sum_bwd_kernel,
            {"p_part": "*fp32", "p_grad_attention": kind, "M": "i32", "P": "i32", "S": "i32"}
            | {k: v for k, v in strides.items() if "_a" in k},
            constants,
            **options,
        )
    constants, options = split_options(POOL_SCALE)
    yield Compilation(
        pool_scale_fwd_kernel,
        {"p_z": "*fp32", "p_square": "*fp32", "p_norm": "*fp32", "L": "i32", "T": "i32"},
        fp32 | {"BT": 16} | constants,
        divisible=("L",),
        **options,
    )
    constants, options = split_options(POOL_BWD_INNER)
    yield Compilation(
        pool_inner_bwd_kernel,
        {"p_z": "*fp32", "p_grad": "*fp32", "p_inner": "*fp32", "L": "i32"},
        fp32 | constants,
        divisible=("L",),
        **options,
    )
