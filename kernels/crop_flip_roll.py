"""Triton kernels of the shared crop, resize, flip and roll of each segment, and of their adjoint."""

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from fd2fast.kernels import _configs
from fd2fast.kernels._common import Compilation, accumulator, accumulator_torch, divide, power_of_two
from torch import Tensor

# a fused multiply-add would move the taps from where torch's resize has them, by up to 8e-6 of a pixel
OPTIONS = {"enable_fp_fusion": False}


@triton.jit
def _segment_of(image, p_segments, segments, BS: tl.constexpr):
    """The segment an image belongs to: how many segments end at or before it."""
    o_s = tl.arange(0, BS)
    ends = tl.load(p_segments + 1 + o_s, mask=o_s < segments, other=0)
    return tl.sum(((ends <= image) & (o_s < segments)).to(tl.int32), axis=0)


@triton.jit
def _unrolled(o, roll, size):
    """Where output position o was before the roll."""
    shift = roll % size
    shift = tl.where(shift < 0, shift + size, shift)
    source = o - shift
    return tl.where(source < 0, source + size, source)


@triton.jit
def _rolled(source, roll, size):
    """Where the roll takes position `source`."""
    shift = roll % size
    shift = tl.where(shift < 0, shift + size, shift)
    o = source + shift
    return tl.where(o >= size, o - size, o)


@triton.jit
def _scale(length, size, ACC: tl.constexpr):
    """Crop pixels for one resized pixel. `full` also takes a size of 1, which a launch turns into a constant."""
    return divide(length.to(ACC), tl.full([], size, ACC), ACC)


@triton.jit
def _centre(source, scale, ACC: tl.constexpr):
    """Centre of a resized pixel in crop pixels, rounded as torch's resize rounds it."""
    return scale * (source.to(ACC) + 0.5)


@triton.jit
def _lower_tap(centre, length, ACC: tl.constexpr):
    """First of two neighbours of an upsampled pixel, and the share of the second."""
    t = tl.maximum(centre - 0.5, 0.0)
    t = tl.minimum(t, (length - 1).to(ACC))
    lower = t.to(tl.int32)
    return lower, t - lower.to(ACC)


@triton.jit
def _triangle(pixel, centre, support, length, ACC: tl.constexpr):
    """Weight, before it is divided by the sum, of a crop pixel in a resized pixel; its support grows with the scale."""
    weight = 1 - tl.abs(pixel.to(ACC) + 0.5 - centre) / support
    return tl.where((pixel >= 0) & (pixel < length) & (weight > 0), weight, 0)


@triton.jit
def _weight(pixel, source, norm, centre, support, length, UPSAMPLE: tl.constexpr, ACC: tl.constexpr):
    """Weight of a crop pixel in resized pixel `source`, both forward and backward."""
    if UPSAMPLE:
        lower, share = _lower_tap(centre, length, ACC)
        return tl.where(pixel == lower, 1 - share, tl.where(pixel == lower + 1, share, 0))
    return _triangle(pixel, centre, support, length, ACC) / norm


@triton.jit
def axis_norm_kernel(
    p_params,  # int [S, 7]
    p_norm,  # [S, 2, size]: sum of the weights of each resized row (0) and column (1)
    size,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    o_s = tl.program_id(0)
    axis = tl.program_id(1)
    source = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    length = tl.load(p_params + o_s * 7 + 2 + axis).to(tl.int32)
    scale = _scale(length, size, ACC)
    support = tl.maximum(scale, 1.0)
    centre = _centre(source, scale, ACC)  # [BLOCK]
    first = (centre - support).to(tl.int32) - 1
    b_norm = tl.zeros([BLOCK], ACC)
    for t in range(0, (2 * support).to(tl.int32) + 4):
        b_norm += _triangle(first + t, centre, support, length, ACC)
    o_norm = (o_s * 2 + axis).to(tl.int64) * size + source
    tl.store(p_norm + o_norm, b_norm, mask=source < size)


@triton.jit
def crop_fwd_kernel(
    p_images,  # [N, C, h, w] by strides
    p_params,  # int [S, 7]
    p_segments,  # int64 [S+1]
    p_norm,  # [S, 2, size], read where not UPSAMPLE
    p_out,  # [N, C, size, size] by strides
    segments,
    channels,
    size,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    out_n,
    out_c,
    out_y,
    out_x,
    UPSAMPLE: tl.constexpr,
    ACC: tl.constexpr,
    BS: tl.constexpr,
    BX: tl.constexpr,
    BC: tl.constexpr,
):
    image = tl.program_id(0)
    row = tl.program_id(1)
    o_s = _segment_of(image, p_segments, segments, BS)
    p_row = p_params + o_s * 7
    top, left = tl.load(p_row).to(tl.int32), tl.load(p_row + 1).to(tl.int32)
    height, width = tl.load(p_row + 2).to(tl.int32), tl.load(p_row + 3).to(tl.int32)
    flip = tl.load(p_row + 4)
    column = tl.program_id(2) * BX + tl.arange(0, BX)
    source_y = _unrolled(row, tl.load(p_row + 5).to(tl.int32), size)
    source_x = _unrolled(column, tl.load(p_row + 6).to(tl.int32), size)  # [BX]
    source_x = tl.where(flip != 0, size - 1 - source_x, source_x)
    scale_y = _scale(height, size, ACC)
    scale_x = _scale(width, size, ACC)
    centre_y = _centre(source_y, scale_y, ACC)
    centre_x = _centre(source_x, scale_x, ACC)
    o_c = tl.arange(0, BC)
    m = (column < size)[:, None] & (o_c < channels)[None, :]  # [BX, BC]
    p_base = p_images + image.to(tl.int64) * stride_n + (o_c.to(tl.int64) * stride_c)[None, :]
    if UPSAMPLE:
        y0, share_y = _lower_tap(centre_y, height, ACC)
        x0, share_x = _lower_tap(centre_x, width, ACC)
        # the second neighbour of the last pixel has no share; it must still be inside
        y1 = tl.minimum(y0 + 1, height - 1) + top
        x1 = tl.minimum(x0 + 1, width - 1) + left
        p_upper = p_base + (y0 + top).to(tl.int64) * stride_y
        p_lower = p_base + y1.to(tl.int64) * stride_y
        o_x0 = ((x0 + left).to(tl.int64) * stride_x)[:, None]
        o_x1 = (x1.to(tl.int64) * stride_x)[:, None]
        share_x = share_x[:, None]
        upper = tl.load(p_upper + o_x0, mask=m, other=0).to(ACC) * (1 - share_x)
        upper += tl.load(p_upper + o_x1, mask=m, other=0).to(ACC) * share_x
        lower = tl.load(p_lower + o_x0, mask=m, other=0).to(ACC) * (1 - share_x)
        lower += tl.load(p_lower + o_x1, mask=m, other=0).to(ACC) * share_x
        b_out = upper * (1 - share_y) + lower * share_y
    else:
        support_y = tl.maximum(scale_y, 1.0)
        support_x = tl.maximum(scale_x, 1.0)
        o_norm = o_s.to(tl.int64) * 2 * size
        norm_y = tl.load(p_norm + o_norm + source_y).to(ACC)
        norm_x = tl.load(p_norm + o_norm + size + source_x, mask=column < size, other=1).to(ACC)
        first_y = tl.maximum((centre_y - support_y).to(tl.int32) - 1, 0)
        first_x = tl.maximum((centre_x - support_x).to(tl.int32) - 1, 0)
        b_out = tl.zeros([BX, BC], ACC)
        for ty in range(0, (2 * support_y).to(tl.int32) + 4):
            y = first_y + ty
            weight_y = _weight(y, source_y, norm_y, centre_y, support_y, height, UPSAMPLE, ACC)
            if weight_y > 0:
                for tx in range(0, (2 * support_x).to(tl.int32) + 4):
                    x = first_x + tx
                    weight_x = _weight(x, source_x, norm_x, centre_x, support_x, width, UPSAMPLE, ACC)
                    o_yx = (y + top).to(tl.int64) * stride_y + (x + left).to(tl.int64) * stride_x
                    b_x = tl.load(p_base + o_yx[:, None], mask=m & (weight_x > 0)[:, None], other=0).to(ACC)
                    b_out += (weight_y * weight_x)[:, None] * b_x
    o_out = image.to(tl.int64) * out_n + row.to(tl.int64) * out_y
    o_tile = (column.to(tl.int64) * out_x)[:, None] + (o_c.to(tl.int64) * out_c)[None, :]
    tl.store(p_out + o_out + o_tile, b_out.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def crop_bwd_kernel(
    p_grad,  # [N, C, size, size] by strides
    p_params,  # int [S, 7]
    p_segments,  # int64 [S+1]
    p_norm,  # [S, 2, size], read where not UPSAMPLE
    p_out,  # [N, C, h, w] by strides
    segments,
    channels,
    size,
    columns,
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    out_n,
    out_c,
    out_y,
    out_x,
    UPSAMPLE: tl.constexpr,
    ACC: tl.constexpr,
    BS: tl.constexpr,
    BX: tl.constexpr,
    BC: tl.constexpr,
):
    image = tl.program_id(0)
    row = tl.program_id(1)
    o_s = _segment_of(image, p_segments, segments, BS)
    p_row = p_params + o_s * 7
    top, left = tl.load(p_row).to(tl.int32), tl.load(p_row + 1).to(tl.int32)
    height, width = tl.load(p_row + 2).to(tl.int32), tl.load(p_row + 3).to(tl.int32)
    flip = tl.load(p_row + 4)
    down, right = tl.load(p_row + 5).to(tl.int32), tl.load(p_row + 6).to(tl.int32)
    scale_y = _scale(height, size, ACC)
    scale_x = _scale(width, size, ACC)
    support_y = tl.maximum(scale_y, 1.0)
    support_x = tl.maximum(scale_x, 1.0)
    column = tl.program_id(2) * BX + tl.arange(0, BX)
    y = row - top
    x = column - left  # [BX]
    m_x = (column < columns) & (x >= 0) & (x < width)
    o_c = tl.arange(0, BC)
    m_c = (o_c < channels)[None, :]
    # resized pixels whose support holds this one, with one to spare on each side for rounding
    first_y = ((y.to(ACC) + 0.5 - support_y) / scale_y - 0.5).to(tl.int32) - 1
    first_x = ((x.to(ACC) + 0.5 - support_x) / scale_x - 0.5).to(tl.int32) - 1
    taps_y = (2 * support_y / scale_y).to(tl.int32) + 4
    taps_x = (2 * support_x / scale_x).to(tl.int32) + 4
    # a row outside the crop has no gradient
    taps_y = tl.where((y >= 0) & (y < height), taps_y, 0)
    p_base = p_grad + image.to(tl.int64) * stride_n + (o_c.to(tl.int64) * stride_c)[None, :]
    o_norm = o_s.to(tl.int64) * 2 * size
    b_out = tl.zeros([BX, BC], ACC)
    for ty in range(0, taps_y):
        source_y = first_y + ty
        inside_y = (source_y >= 0) & (source_y < size)
        source_y = tl.where(inside_y, source_y, 0)
        if UPSAMPLE:
            norm_y = 1.0
        else:
            norm_y = tl.load(p_norm + o_norm + source_y).to(ACC)
        weight_y = _weight(y, source_y, norm_y, _centre(source_y, scale_y, ACC), support_y, height, UPSAMPLE, ACC)
        weight_y = tl.where(inside_y, weight_y, 0)
        if weight_y > 0:
            out_row = _rolled(source_y, down, size).to(tl.int64)
            for tx in range(0, taps_x):
                source_x = first_x + tx
                inside_x = m_x & (source_x >= 0) & (source_x < size)
                source_x = tl.where(inside_x, source_x, 0)
                if UPSAMPLE:
                    norm_x = 1.0
                else:
                    norm_x = tl.load(p_norm + o_norm + size + source_x).to(ACC)
                centre_x = _centre(source_x, scale_x, ACC)
                weight_x = _weight(x, source_x, norm_x, centre_x, support_x, width, UPSAMPLE, ACC)
                weight_x = tl.where(inside_x, weight_x, 0)
                out_column = _rolled(tl.where(flip != 0, size - 1 - source_x, source_x), right, size)
                o_yx = out_row * stride_y + out_column.to(tl.int64) * stride_x
                b_g = tl.load(p_base + o_yx[:, None], mask=(weight_x > 0)[:, None] & m_c, other=0).to(ACC)
                b_out += (weight_y * weight_x)[:, None] * b_g
    o_out = image.to(tl.int64) * out_n + row.to(tl.int64) * out_y
    o_tile = (column.to(tl.int64) * out_x)[:, None] + (o_c.to(tl.int64) * out_c)[None, :]
    tl.store(p_out + o_out + o_tile, b_out.to(p_out.dtype.element_ty), mask=(column < columns)[:, None] & m_c)


def _norms(images: Tensor, params: Tensor, size: int, upsample: bool) -> Tensor:
    if upsample:
        return images
    norm = torch.empty(params.shape[0], 2, size, dtype=accumulator_torch(images), device=images.device)
    block = power_of_two(size, 16, 256)
    axis_norm_kernel[(params.shape[0], 2, triton.cdiv(size, block))](
        params, norm, size, ACC=accumulator(images), BLOCK=block, num_warps=4, **OPTIONS
    )
    return norm


def _launch(kernel, source: Tensor, params: Tensor, segments: Tensor, out: Tensor, size: int, upsample: bool) -> None:
    n, channels, rows, columns = out.shape
    bx = power_of_two(columns, 16, _configs.CROP_COLUMNS)
    extra = (columns,) if kernel is crop_bwd_kernel else ()
    if out.numel() == 0:
        return
    kernel[(n, rows, triton.cdiv(columns, bx))](
        source,
        params,
        segments,
        _norms(source, params, size, upsample),
        out,
        segments.numel() - 1,
        channels,
        size,
        *extra,
        *source.stride(),
        *out.stride(),
        UPSAMPLE=upsample,
        ACC=accumulator(source),
        BS=triton.next_power_of_2(max(1, segments.numel() - 1)),
        BX=bx,
        BC=triton.next_power_of_2(channels),
        num_warps=_configs.CROP_WARPS,
        **OPTIONS,
    )


def crop_fwd(images: Tensor, params: Tensor, segments: Tensor, out: Tensor) -> Tensor:
    """Fill out [N, C, size, size] from images [N, C, h, w], any strides; params int [S, 7], segments int64 [S+1]."""
    size = out.shape[2]
    upsample = images.shape[2] <= size and images.shape[3] <= size
    _launch(crop_fwd_kernel, images, params, segments, out, size, upsample)
    return out


def crop_bwd(grad: Tensor, params: Tensor, segments: Tensor, out: Tensor) -> Tensor:
    """Fill out [N, C, h, w], the images' gradient, from grad [N, C, size, size], any strides: the adjoint of crop_fwd."""
    size = grad.shape[2]
    upsample = out.shape[2] <= size and out.shape[3] <= size
    _launch(crop_bwd_kernel, grad, params, segments, out, size, upsample)
    return out


def compilations() -> Iterator[Compilation]:
    """Three channels in three types, upsampling only or any scale, one segment or a step of many."""
    pointers = {"p_params": "*i64", "p_segments": "*i64", "p_norm": "*fp32"}
    strides = dict.fromkeys(("stride_n", "stride_c", "stride_y", "stride_x", "out_n", "out_c", "out_y", "out_x"), "i32")
    sizes = dict.fromkeys(("segments", "channels", "size", "columns"), "i32")
    for image_type in ("fp32", "bf16", "fp16"):
        for upsample, segments, bx in ((True, 1, 256), (True, 128, 32), (False, 16, 256)):
            for kernel, source in ((crop_fwd_kernel, "p_images"), (crop_bwd_kernel, "p_grad")):
                yield Compilation(
                    kernel,
                    {source: f"*{image_type}", "p_out": f"*{image_type}", **pointers, **sizes, **strides},
                    {"UPSAMPLE": upsample, "ACC": tl.float32, "BS": segments, "BX": bx, "BC": 4},
                    num_warps=_configs.CROP_WARPS,
                    divisible=("size", "columns", "stride_n", "out_n"),
                    fp_fusion=False,
                )
    yield Compilation(
        axis_norm_kernel,
        {"p_params": "*i64", "p_norm": "*fp32", "size": "i32"},
        {"ACC": tl.float32, "BLOCK": 256},
        fp_fusion=False,
    )
