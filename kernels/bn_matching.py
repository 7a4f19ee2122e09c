"""Triton kernels of the per-segment BN statistics, the matching loss, and eval-mode BN with activation."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from fd2fast.kernels import _configs
from fd2fast.kernels._common import (
    OPTIONS,
    Compilation,
    accumulator,
    accumulator_torch,
    divide,
    segment_part,
    square_root,
)
from torch import Tensor

IDENTITY, RELU, RELU6 = 0, 1, 2
ACTIVATIONS = {"identity": IDENTITY, "relu": RELU, "relu6": RELU6}
# how the backward learns where the activation was open: from x, or from a saved mask of bytes or bits
NO_MASK, BYTE_MASK, BIT_MASK = 0, 1, 2
# what the backward adds for the statistics: nothing, the matching loss, or given gradients of mean and variance
NO_STATISTICS, MATCHING, GIVEN = 0, 1, 2

_RELU: tl.constexpr = tl.constexpr(RELU)
_RELU6: tl.constexpr = tl.constexpr(RELU6)
_BYTES: tl.constexpr = tl.constexpr(BYTE_MASK)
_BITS: tl.constexpr = tl.constexpr(BIT_MASK)
_MATCHING: tl.constexpr = tl.constexpr(MATCHING)
_NO_STATISTICS: tl.constexpr = tl.constexpr(NO_STATISTICS)


@triton.jit
def _tile_offsets(
    start,  # first pixel row of the tile, int64
    o_c,  # [BC]
    channels,
    pixels,
    BR: tl.constexpr,
    LAST: tl.constexpr,
):
    """Offsets [BR, BC] of pixel rows x channels in a dense channels_last or NCHW tensor."""
    o_r = tl.arange(0, BR)
    if LAST:
        return start * channels + (o_r[:, None] * channels + o_c[None, :])
    row = start + o_r
    # pixel rows fit into 32 bits, where division is cheap
    image = (row.to(tl.int32) // pixels).to(tl.int64)
    return (image * (channels - 1) * pixels + row)[:, None] + (o_c.to(tl.int64) * pixels)[None, :]


@triton.jit
def _scale(p_weight, p_var, o_c, m_c, EPS: tl.constexpr, ACC: tl.constexpr):
    """weight / sqrt(running_var + eps), [BC]."""
    b_weight = tl.load(p_weight + o_c, mask=m_c, other=0).to(ACC)
    b_var = tl.load(p_var + o_c, mask=m_c, other=1).to(ACC)
    return divide(b_weight, square_root(b_var + EPS, ACC), ACC)


@triton.jit
def bn_fwd_kernel(
    p_x,  # [N, C, P] or [N, P, C]
    p_residual,  # as x
    p_weight,  # [C]
    p_bias,  # [C]
    p_mean,  # running, [C]
    p_var,  # running, [C]
    p_segments,  # int64 [S+1]
    p_y,  # as x
    p_mask,  # uint8: as x, or [N, P, C/8]
    p_delta,  # [S, parts, C]: mean of the part minus the running mean
    p_m2,  # [S, parts, C]: sum of squares around the part's mean
    groups,  # channels / UNIT
    pixels,
    parts,
    UNIT: tl.constexpr,
    EPS: tl.constexpr,
    NORMALISE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    MASK: tl.constexpr,
    STATISTICS: tl.constexpr,
    SHIFTED: tl.constexpr,
    LAST: tl.constexpr,
    ACC: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    # a product, so that the compiler knows what divides it and loads whole vectors
    channels = groups * UNIT
    o_s = tl.program_id(0) // parts
    o_p = tl.program_id(0) % parts
    first, count = segment_part(p_segments, o_s, o_p, parts, pixels, BR)
    c0 = tl.program_id(1) * BC
    o_c = c0 + tl.arange(0, BC)
    m_c = o_c < channels
    if SHIFTED:
        b_mean = tl.load(p_mean + o_c, mask=m_c, other=0).to(ACC)  # [BC]
    else:
        b_mean = tl.zeros([BC], ACC)
    if NORMALISE:
        b_scale = _scale(p_weight, p_var, o_c, m_c, EPS, ACC)
        b_bias = tl.load(p_bias + o_c, mask=m_c, other=0).to(ACC)
    if STATISTICS:
        # sums are taken around one value of the part, so that a large mean costs no digits
        if LAST:
            o_first = first * channels + o_c
        else:
            o_first = (first // pixels) * (channels - 1) * pixels + first + o_c.to(tl.int64) * pixels
        b_shift = tl.load(p_x + o_first, mask=o_c < tl.where(count > 0, channels, 0), other=0).to(ACC)  # [BC]
        b_sum = tl.zeros([BR, BC], ACC)
        b_square = tl.zeros([BR, BC], ACC)
    for r in range(0, count, BR):
        m = ((r + tl.arange(0, BR)) < count)[:, None] & m_c[None, :]
        offsets = _tile_offsets(first + r, o_c, channels, pixels, BR, LAST)
        b_x = tl.load(p_x + offsets, mask=m, other=0).to(ACC)  # [BR, BC]
        if STATISTICS:
            b_d = tl.where(m, b_x - b_shift[None, :], 0)
            b_sum += b_d
            b_square += b_d * b_d
        if NORMALISE:
            b_y = (b_x - b_mean[None, :]) * b_scale[None, :] + b_bias[None, :]
            if RESIDUAL:
                b_y += tl.load(p_residual + offsets, mask=m, other=0).to(ACC)
            if MASK == _BYTES:
                b_open = b_y > 0
                if ACTIVATION == _RELU6:
                    b_open = b_open & (b_y < 6)
                tl.store(p_mask + offsets, b_open.to(tl.uint8), mask=m)
            elif MASK == _BITS:
                b_open = b_y > 0
                if ACTIVATION == _RELU6:
                    b_open = b_open & (b_y < 6)
                o_bit = tl.arange(0, 8)
                b_bits = tl.reshape(b_open.to(tl.int32), [BR, BC // 8, 8]) << o_bit[None, None, :]
                b_byte = tl.sum(b_bits, axis=2)  # [BR, BC / 8]
                bytes_per_row = channels // 8
                o_byte = c0 // 8 + tl.arange(0, BC // 8)
                o_mask = (first + r) * bytes_per_row + tl.arange(0, BR)[:, None] * bytes_per_row + o_byte[None, :]
                m_byte = ((r + tl.arange(0, BR)) < count)[:, None] & (o_byte < bytes_per_row)[None, :]
                tl.store(p_mask + o_mask, b_byte.to(tl.uint8), mask=m_byte)
            # comparisons, not maximum: a NaN stays a NaN, as in torch
            if ACTIVATION == _RELU or ACTIVATION == _RELU6:
                b_y = tl.where(b_y < 0, 0, b_y)
            if ACTIVATION == _RELU6:
                b_y = tl.where(b_y > 6, 6, b_y)
            tl.store(p_y + offsets, b_y.to(p_y.dtype.element_ty), mask=m)
    if STATISTICS:
        n = tl.maximum(count, 1).to(ACC)
        b_total = tl.sum(b_sum, axis=0)  # [BC]
        b_m2 = tl.sum(b_square, axis=0) - b_total * b_total / n
        b_m2 = tl.where(b_m2 < 0, 0, b_m2)
        o_part = tl.program_id(0).to(tl.int64) * channels + o_c
        tl.store(p_delta + o_part, (b_shift - b_mean) + b_total / n, mask=m_c)
        tl.store(p_m2 + o_part, b_m2, mask=m_c)


@triton.jit
def bn_merge_kernel(
    p_delta,  # [S, parts, C]
    p_m2,  # [S, parts, C]
    p_segments,  # int64 [S+1]
    p_var,  # running, [C]
    p_dmean,  # [S, C]: mean - running mean
    p_dvar,  # [S, C]: biased variance - running variance
    p_squares,  # [S, blocks, 2]: sums of squares of the two over a block of channels
    channels,
    pixels,
    parts,
    blocks,
    MATCH: tl.constexpr,
    ACC: tl.constexpr,
    BR: tl.constexpr,
    BP: tl.constexpr,
    BC: tl.constexpr,
):
    o_s = tl.program_id(0).to(tl.int64)
    o_b = tl.program_id(1)
    o_c = o_b * BC + tl.arange(0, BC)
    m_c = o_c < channels
    rows = (tl.load(p_segments + o_s + 1) - tl.load(p_segments + o_s)).to(tl.int64) * pixels
    share = tl.cdiv(tl.cdiv(rows, parts), BR) * BR
    n = tl.maximum(rows, 1).to(ACC)
    b_sum = tl.zeros([BC], ACC)
    for p in range(0, parts, BP):
        o_p = p + tl.arange(0, BP)
        b_n = tl.minimum(tl.maximum(rows - o_p * share, 0), share).to(ACC)  # [BP]
        m = (o_p < parts)[:, None] & m_c[None, :]
        o_part = (o_s * parts + o_p)[:, None] * channels + o_c[None, :]
        b_delta = tl.load(p_delta + o_part, mask=m, other=0)  # [BP, BC]
        b_sum += tl.sum(tl.where(m, b_delta * b_n[:, None], 0), axis=0)
    b_mean = b_sum / n
    b_m2 = tl.zeros([BC], ACC)
    for p in range(0, parts, BP):
        o_p = p + tl.arange(0, BP)
        b_n = tl.minimum(tl.maximum(rows - o_p * share, 0), share).to(ACC)
        m = (o_p < parts)[:, None] & m_c[None, :]
        o_part = (o_s * parts + o_p)[:, None] * channels + o_c[None, :]
        b_off = tl.load(p_delta + o_part, mask=m, other=0) - b_mean[None, :]
        b_part = tl.load(p_m2 + o_part, mask=m, other=0)
        b_m2 += tl.sum(tl.where(m & (b_n > 0)[:, None], b_part + b_off * b_off * b_n[:, None], 0), axis=0)
    b_var = b_m2 / n
    if MATCH:
        b_var -= tl.load(p_var + o_c, mask=m_c, other=0).to(ACC)
        o_square = (o_s * blocks + o_b) * 2
        tl.store(p_squares + o_square, tl.sum(tl.where(m_c, b_mean * b_mean, 0), axis=0))
        tl.store(p_squares + o_square + 1, tl.sum(tl.where(m_c, b_var * b_var, 0), axis=0))
    tl.store(p_dmean + o_s * channels + o_c, b_mean, mask=m_c)
    tl.store(p_dvar + o_s * channels + o_c, b_var, mask=m_c)


@triton.jit
def bn_norm_kernel(
    p_squares,  # [S, blocks, 2]
    p_segments,  # int64 [S+1]
    p_norms,  # [S, 2]: of mean and variance difference; 0 for an empty segment
    p_loss,  # [S]
    blocks,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_s = tl.program_id(0).to(tl.int64)
    o_b = tl.arange(0, BLOCK)
    m = o_b < blocks
    filled = tl.load(p_segments + o_s + 1) > tl.load(p_segments + o_s)
    o_square = (o_s * blocks + o_b) * 2
    mean = square_root(tl.sum(tl.load(p_squares + o_square, mask=m, other=0), axis=0), ACC)
    var = square_root(tl.sum(tl.load(p_squares + o_square + 1, mask=m, other=0), axis=0), ACC)
    mean = tl.where(filled, mean, 0)
    var = tl.where(filled, var, 0)
    tl.store(p_norms + o_s * 2, mean)
    tl.store(p_norms + o_s * 2 + 1, var)
    tl.store(p_loss + o_s, mean + var)


@triton.jit
def bn_bwd_kernel(
    p_x,  # [N, C, P] or [N, P, C]
    p_grad_y,  # as x
    p_mask,  # uint8: as x, or [N, P, C/8]
    p_weight,  # [C]
    p_bias,  # [C]
    p_mean,  # running, [C]
    p_var,  # running, [C]
    p_segments,  # int64 [S+1]
    p_centre,  # [S, C]: mean - running mean (MATCHING) or mean (GIVEN)
    p_first,  # [S, C]: mean difference (MATCHING), or gradient of the mean (GIVEN)
    p_second,  # [S, C]: variance difference (MATCHING), or gradient of the variance (GIVEN)
    p_norms,  # [S, 2]
    p_grad_loss,  # [S]
    p_grad_x,  # as x
    p_grad_residual,  # as x
    groups,  # channels / UNIT
    pixels,
    parts,
    UNIT: tl.constexpr,
    EPS: tl.constexpr,
    NORMALISE: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    MASK: tl.constexpr,
    STATISTICS: tl.constexpr,
    LAST: tl.constexpr,
    ACC: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    # a product, so that the compiler knows what divides it and loads whole vectors
    channels = groups * UNIT
    o_s = (tl.program_id(0) // parts).to(tl.int64)
    o_p = tl.program_id(0) % parts
    first, count = segment_part(p_segments, o_s, o_p, parts, pixels, BR)
    c0 = tl.program_id(1) * BC
    o_c = c0 + tl.arange(0, BC)
    m_c = o_c < channels
    if NORMALISE:
        b_mean = tl.load(p_mean + o_c, mask=m_c, other=0).to(ACC)  # [BC]
        b_scale = _scale(p_weight, p_var, o_c, m_c, EPS, ACC)
        b_bias = tl.load(p_bias + o_c, mask=m_c, other=0).to(ACC)
    elif STATISTICS == _MATCHING:
        b_mean = tl.load(p_mean + o_c, mask=m_c, other=0).to(ACC)
    else:
        b_mean = tl.zeros([BC], ACC)
    if STATISTICS != _NO_STATISTICS:
        rows = (tl.load(p_segments + o_s + 1) - tl.load(p_segments + o_s)).to(tl.int64) * pixels
        n = tl.maximum(rows, 1).to(ACC)
        o_statistics = o_s * channels + o_c
        b_centre = tl.load(p_centre + o_statistics, mask=m_c, other=0).to(ACC)  # [BC]
        b_first = tl.load(p_first + o_statistics, mask=m_c, other=0).to(ACC) / n
        b_second = 2 * tl.load(p_second + o_statistics, mask=m_c, other=0).to(ACC) / n
        if STATISTICS == _MATCHING:
            grad = tl.load(p_grad_loss + o_s).to(ACC)
            norm_mean = tl.load(p_norms + o_s * 2).to(ACC)
            norm_var = tl.load(p_norms + o_s * 2 + 1).to(ACC)
            # the norm's gradient at 0 is 0
            b_first *= tl.where(norm_mean > 0, grad / tl.where(norm_mean > 0, norm_mean, 1), 0)
            b_second *= tl.where(norm_var > 0, grad / tl.where(norm_var > 0, norm_var, 1), 0)
    for r in range(0, count, BR):
        m_r = (r + tl.arange(0, BR)) < count
        m = m_r[:, None] & m_c[None, :]
        offsets = _tile_offsets(first + r, o_c, channels, pixels, BR, LAST)
        b_grad = tl.zeros([BR, BC], ACC)
        if STATISTICS != _NO_STATISTICS or (NORMALISE and MASK == 0 and ACTIVATION != 0):
            b_d = tl.load(p_x + offsets, mask=m, other=0).to(ACC) - b_mean[None, :]  # [BR, BC]
        if NORMALISE:
            b_h = tl.load(p_grad_y + offsets, mask=m, other=0).to(ACC)
            if ACTIVATION == _RELU or ACTIVATION == _RELU6:
                if MASK == _BYTES:
                    b_open = tl.load(p_mask + offsets, mask=m, other=0) != 0
                elif MASK == _BITS:
                    bytes_per_row = channels // 8
                    o_byte = c0 // 8 + tl.arange(0, BC // 8)
                    o_mask = (first + r) * bytes_per_row + tl.arange(0, BR)[:, None] * bytes_per_row + o_byte[None, :]
                    m_byte = m_r[:, None] & (o_byte < bytes_per_row)[None, :]
                    b_byte = tl.load(p_mask + o_mask, mask=m_byte, other=0).to(tl.int32)  # [BR, BC / 8]
                    b_bits = (b_byte[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
                    b_open = tl.reshape(b_bits, [BR, BC]) != 0
                else:
                    b_y = b_d * b_scale[None, :] + b_bias[None, :]
                    b_open = b_y > 0
                    if ACTIVATION == _RELU6:
                        b_open = b_open & (b_y < 6)
                b_h = tl.where(b_open, b_h, 0)
            if RESIDUAL:
                tl.store(p_grad_residual + offsets, b_h.to(p_grad_residual.dtype.element_ty), mask=m)
            b_grad += b_h * b_scale[None, :]
        if STATISTICS != _NO_STATISTICS:
            b_grad += b_first[None, :] + b_second[None, :] * (b_d - b_centre[None, :])
        tl.store(p_grad_x + offsets, b_grad.to(p_grad_x.dtype.element_ty), mask=m)


def is_last(x: Tensor) -> bool:
    """Whether a dense [N, C, H, W] tensor is channels_last."""
    return x.is_contiguous(memory_format=torch.channels_last)


def mask_kind(channels: int, last: bool, activation: str, residual: bool) -> int:
    """How the activation's mask is kept; without a residual it follows from x."""
    if not residual or activation == "identity":
        return NO_MASK
    return BIT_MASK if last and channels % 8 == 0 else BYTE_MASK


def mask_shape(x: Tensor, activation: str, residual: bool) -> tuple[int, ...]:
    """The shape of the uint8 mask that the forward saves for the backward."""
    n, c, h, w = x.shape
    kind = mask_kind(c, is_last(x), activation, residual)
    return (0,) if kind == NO_MASK else (n * h * w * c // 8,) if kind == BIT_MASK else (n * c * h * w,)


def _grid(x: Tensor, segments: int, br: int, bc: int) -> tuple[int, int, int]:
    """Parts of a segment, blocks of channels, and programs of the first grid axis."""
    n, c, h, w = x.shape
    blocks = triton.cdiv(c, bc)
    wanted = triton.cdiv(_configs.BN_PROGRAMS, max(1, segments * blocks))
    parts = max(1, min(wanted, triton.cdiv(n * h * w, br * max(1, segments))))
    return parts, blocks, segments * parts


def bn_fwd(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    segments: Tensor,
    *,
    affine: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    activation: str = "identity",
    eps: float = 0.0,
    statistics: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One pass over x [N, C, H, W] (dense, either layout); residual in the same layout, segments int64 [S+1].

    Returns (y, loss, dmean, dvar, norms, mask); what was not asked for has no elements. With running statistics dmean
    and dvar [S, C] are differences from them, loss [S] is the matching loss and norms [S, 2] its two terms; without
    they are the statistics themselves. y needs affine = (weight, bias) and the running statistics.
    """
    last = is_last(x)
    n, c, h, w = x.shape
    pixels = h * w
    count = segments.numel() - 1
    matching = statistics and running_mean is not None
    br, bc, warps = _configs.bn_tile(c, last)
    unit = 8 if c % 8 == 0 else 1
    parts, blocks, programs = _grid(x, count, br, bc)
    wide = {"dtype": accumulator_torch(x), "device": x.device}
    y = torch.empty_like(x) if affine is not None else x.new_empty(0)
    mask = torch.empty(mask_shape(x, activation, residual is not None), dtype=torch.uint8, device=x.device)
    partial = (count, parts, c) if statistics else (0,)
    delta, m2 = torch.empty(partial, **wide), torch.empty(partial, **wide)
    weight, bias = affine if affine is not None else (x, x)
    if n and programs:
        bn_fwd_kernel[(programs, blocks)](
            x,
            x if residual is None else residual,
            weight,
            bias,
            x if running_mean is None else running_mean,
            x if running_var is None else running_var,
            segments,
            y,
            mask,
            delta,
            m2,
            c // unit,
            pixels,
            parts,
            UNIT=unit,
            EPS=eps,
            NORMALISE=affine is not None,
            RESIDUAL=residual is not None,
            ACTIVATION=ACTIVATIONS[activation],
            MASK=mask_kind(c, last, activation, residual is not None),
            STATISTICS=statistics,
            SHIFTED=running_mean is not None,
            LAST=last,
            ACC=accumulator(x),
            BR=br,
            BC=bc,
            num_warps=warps,
            **OPTIONS,
        )
    shape = (count, c) if statistics else (0,)
    dmean, dvar = torch.empty(shape, **wide), torch.empty(shape, **wide)
    norms = torch.empty((count, 2) if matching else (0,), **wide)
    loss = torch.empty(count if matching else 0, **wide)
    if not statistics or not count:
        return y, loss, dmean, dvar, norms, mask
    if not n:
        delta.zero_()
        m2.zero_()
    merge_c = min(_configs.BN_MERGE_CHANNELS, triton.next_power_of_2(c))
    merge_blocks = triton.cdiv(c, merge_c)
    squares = torch.empty((count, merge_blocks, 2) if matching else (0,), **wide)
    bn_merge_kernel[(count, merge_blocks)](
        delta,
        m2,
        segments,
        x if running_var is None else running_var,
        dmean,
        dvar,
        squares,
        c,
        pixels,
        parts,
        merge_blocks,
        MATCH=matching,
        ACC=accumulator(x),
        BR=br,
        BP=_configs.BN_MERGE_PARTS,
        BC=merge_c,
        num_warps=_configs.BN_MERGE_WARPS,
        **OPTIONS,
    )
    if matching:
        bn_norm_kernel[(count,)](
            squares,
            segments,
            norms,
            loss,
            merge_blocks,
            ACC=accumulator(x),
            BLOCK=triton.next_power_of_2(merge_blocks),
            num_warps=1,
            **OPTIONS,
        )
    return y, loss, dmean, dvar, norms, mask


def bn_bwd(
    x: Tensor,
    segments: Tensor,
    *,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    affine: tuple[Tensor, Tensor] | None = None,
    grad_y: Tensor | None = None,
    mask: Tensor | None = None,
    residual_dtype: torch.dtype | None = None,
    activation: str = "identity",
    eps: float = 0.0,
    matching: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    given: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the residual (no elements without one), x and grad_y dense in one layout.

    matching: (dmean, dvar, norms, grad_loss) of the matching loss; given: (mean, grad_mean, grad_var) [S, C] of the
    statistics; affine and grad_y: of y. A residual needs the forward's mask unless the activation is the identity.
    """
    last = is_last(x)
    c = x.shape[1]
    pixels = x.shape[2] * x.shape[3]
    normalise = grad_y is not None
    residual = residual_dtype is not None and normalise
    br, bc, warps = _configs.bn_tile(c, last)
    unit = 8 if c % 8 == 0 else 1
    parts, blocks, programs = _grid(x, segments.numel() - 1, br, bc)
    grad_x = torch.empty_like(x)
    grad_residual = torch.empty_like(x, dtype=residual_dtype) if residual else x.new_empty(0)
    weight, bias = affine if affine is not None else (x, x)
    if matching is not None:
        dmean, dvar, norms, grad_loss = matching
        centre, first, second, statistics = dmean, dmean, dvar, MATCHING
    elif given is not None:
        centre, first, second = given
        norms, grad_loss, statistics = x, x, GIVEN
    else:
        centre = first = second = norms = grad_loss = x
        statistics = NO_STATISTICS
    if x.numel():
        bn_bwd_kernel[(programs, blocks)](
            x,
            grad_y if normalise else x,
            x if mask is None else mask,
            weight,
            bias,
            x if running_mean is None else running_mean,
            x if running_var is None else running_var,
            segments,
            centre,
            first,
            second,
            norms,
            grad_loss,
            grad_x,
            grad_residual,
            c // unit,
            pixels,
            parts,
            UNIT=unit,
            EPS=eps,
            NORMALISE=normalise,
            RESIDUAL=residual,
            ACTIVATION=ACTIVATIONS[activation],
            MASK=mask_kind(c, last, activation, residual_dtype is not None),
            STATISTICS=statistics,
            LAST=last,
            ACC=accumulator(x),
            BR=br,
            BC=bc,
            num_warps=warps,
            **OPTIONS,
        )
    return grad_x, grad_residual


def compilations() -> Iterator[Compilation]:
    """The pipeline's configurations: both layouts, each tile shape, input types, and each combination of results."""
    for x_type in ("bf16", "fp16", "fp32"):
        for channels, last in ((3, True), (8, True), (16, True), (24, True), (512, True), (512, False)):
            yield from _forward_backward(x_type, channels, last, RELU, residual=True, matching=True)
        yield from _forward_backward(x_type, 512, True, IDENTITY, residual=True, matching=True)
        yield from _forward_backward(x_type, 512, True, RELU6, residual=False, matching=True)
        yield from _forward_backward(x_type, 512, True, RELU, residual=False, matching=False)
        yield from _forward_backward(x_type, 512, True, None, residual=False, matching=True)
        yield from _forward_backward(x_type, 512, True, None, residual=False, matching=False)
    for match in (True, False):
        yield Compilation(
            bn_merge_kernel,
            {
                **dict.fromkeys(("p_delta", "p_m2", "p_var", "p_dmean", "p_dvar", "p_squares"), "*fp32"),
                "p_segments": "*i64",
                **dict.fromkeys(("channels", "pixels", "parts", "blocks"), "i32"),
            },
            {
                "MATCH": match,
                "ACC": tl.float32,
                "BR": 64,
                "BP": _configs.BN_MERGE_PARTS,
                "BC": _configs.BN_MERGE_CHANNELS,
            },
            num_warps=_configs.BN_MERGE_WARPS,
            divisible=("channels",),
        )
    for block in (1, 32):
        yield Compilation(
            bn_norm_kernel,
            {
                **dict.fromkeys(("p_squares", "p_norms", "p_loss"), "*fp32"),
                "p_segments": "*i64",
                "blocks": "i32",
            },
            {"ACC": tl.float32, "BLOCK": block},
            num_warps=1,
        )


def _forward_backward(
    x_type: str, channels: int, last: bool, activation: int | None, *, residual: bool, matching: bool
) -> Iterator[Compilation]:
    br, bc, warps = _configs.bn_tile(channels, last)
    normalise = activation is not None
    name = {None: "identity", IDENTITY: "identity", RELU: "relu", RELU6: "relu6"}[activation]
    shared = {
        "UNIT": 8 if channels % 8 == 0 else 1,
        "EPS": 1e-5,
        "NORMALISE": normalise,
        "RESIDUAL": residual,
        "ACTIVATION": activation or IDENTITY,
        "MASK": mask_kind(channels, last, name, residual),
        "LAST": last,
        "ACC": tl.float32,
        "BR": br,
        "BC": bc,
    }
    channel_pointers = dict.fromkeys(("p_weight", "p_bias", "p_mean", "p_var"), "*fp32")
    sizes = dict.fromkeys(("groups", "pixels", "parts"), "i32")
    yield Compilation(
        bn_fwd_kernel,
        {
            **dict.fromkeys(("p_x", "p_residual", "p_y"), f"*{x_type}"),
            **channel_pointers,
            "p_segments": "*i64",
            "p_mask": "*u8",
            **dict.fromkeys(("p_delta", "p_m2"), "*fp32"),
            **sizes,
        },
        {**shared, "STATISTICS": matching or not normalise, "SHIFTED": matching or normalise},
        num_warps=warps,
    )
    yield Compilation(
        bn_bwd_kernel,
        {
            **dict.fromkeys(("p_x", "p_grad_y", "p_grad_x", "p_grad_residual"), f"*{x_type}"),
            **channel_pointers,
            "p_segments": "*i64",
            "p_mask": "*u8",
            **dict.fromkeys(("p_centre", "p_first", "p_second", "p_norms", "p_grad_loss"), "*fp32"),
            **sizes,
        },
        {**shared, "STATISTICS": MATCHING if matching else NO_STATISTICS if normalise else GIVEN},
        num_warps=warps,
    )
