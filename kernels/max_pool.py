"""Triton kernels of max pooling: the maximum with its place in the window in one byte, and the gradient gathered from it."""

from collections.abc import Iterator, Sequence

import triton
import triton.language as tl
from fd2fast.kernels._common import OPTIONS, Compilation, accumulator, power_of_two
from fd2fast.kernels._configs import MAX_POOL_ELEMENTS, MAX_POOL_WARPS
from torch import Tensor


@triton.jit
def max_pool_fwd_kernel(
    p_x,  # [N, C, H, W] by strides
    p_y,  # [N, C, h, w] by strides
    p_places,  # uint8, laid out as y
    channels,
    height,
    width,
    rows,  # h
    columns,  # w
    x_n,
    x_c,
    x_y,
    x_x,
    y_n,
    y_c,
    y_y,
    y_x,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    ACC: tl.constexpr,
    BX: tl.constexpr,
    BC: tl.constexpr,
):
    image = tl.program_id(0) // rows
    row = tl.program_id(0) % rows
    column = tl.program_id(1) * BX + tl.arange(0, BX)
    o_c = tl.program_id(2) * BC + tl.arange(0, BC)
    m_out = (column < columns)[:, None] & (o_c < channels)[None, :]  # [BX, BC]
    p_image = p_x + image.to(tl.int64) * x_n
    b_best = tl.full([BX, BC], float("-inf"), ACC)
    b_place = tl.full([BX, BC], -1, tl.int32)
    for i in tl.static_range(KH):
        y = row * SH - PH + i * DH
        if (y >= 0) & (y < height):
            # 64 bits to get to a row of an image, 32 within it
            p_row = p_image + y.to(tl.int64) * x_y
            for j in tl.static_range(KW):
                x = column * SW - PW + j * DW
                m = ((x >= 0) & (x < width))[:, None] & m_out
                b_x = tl.load(p_row + (x * x_x)[:, None] + (o_c * x_c)[None, :], mask=m, other=float("-inf")).to(ACC)
                # the first pixel inside, a larger one, and any NaN
                take = m & ((b_place < 0) | (b_x > b_best) | (b_x != b_x))
                b_best = tl.where(take, b_x, b_best)
                b_place = tl.where(take, i * KW + j, b_place)
    o_out = image.to(tl.int64) * y_n + row.to(tl.int64) * y_y
    o_tile = (column * y_x)[:, None] + (o_c * y_c)[None, :]
    tl.store(p_y + o_out + o_tile, b_best.to(p_y.dtype.element_ty), mask=m_out)
    tl.store(p_places + o_out + o_tile, b_place.to(tl.uint8), mask=m_out)


@triton.jit
def max_pool_bwd_kernel(
    p_grad,  # [N, C, h, w] by strides
    p_places,  # uint8 [N, C, h, w] by strides
    p_grad_x,  # [N, C, H, W] by strides
    channels,
    height,
    width,
    rows,
    columns,
    y_n,
    y_c,
    y_y,
    y_x,
    place_n,
    place_c,
    place_y,
    place_x,
    x_n,
    x_c,
    x_y,
    x_x,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    PH: tl.constexpr,
    PW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    ACC: tl.constexpr,
    BX: tl.constexpr,
    BC: tl.constexpr,
):
    image = tl.program_id(0) // height
    y = tl.program_id(0) % height
    x = tl.program_id(1) * BX + tl.arange(0, BX)
    o_c = tl.program_id(2) * BC + tl.arange(0, BC)
    m_x = (x < width)[:, None] & (o_c < channels)[None, :]  # [BX, BC]
    p_image = p_grad + image.to(tl.int64) * y_n
    p_place = p_places + image.to(tl.int64) * place_n
    b_grad_x = tl.zeros([BX, BC], ACC)
    # each pixel asks the windows that hold it, in one order: no atomics, the same sum in every run
    for i in tl.static_range(KH):
        below = y + PH - i * DH
        row = below // SH
        if (below >= 0) & (below % SH == 0) & (row < rows):
            p_grad_row = p_image + row.to(tl.int64) * y_y
            p_place_row = p_place + row.to(tl.int64) * place_y
            for j in tl.static_range(KW):
                behind = x + PW - j * DW
                column = behind // SW
                m = ((behind >= 0) & (behind % SW == 0) & (column < columns))[:, None] & m_x
                o_place = (column * place_x)[:, None] + (o_c * place_c)[None, :]
                b_place = tl.load(p_place_row + o_place, mask=m, other=255).to(tl.int32)
                m = m & (b_place == i * KW + j)
                o_grad = (column * y_x)[:, None] + (o_c * y_c)[None, :]
                b_grad_x += tl.load(p_grad_row + o_grad, mask=m, other=0).to(ACC)
    o_x = image.to(tl.int64) * x_n + y.to(tl.int64) * x_y
    o_tile = (x * x_x)[:, None] + (o_c * x_c)[None, :]
    tl.store(p_grad_x + o_x + o_tile, b_grad_x.to(p_grad_x.dtype.element_ty), mask=m_x)


def _tile(channels: int, columns: int, last: bool) -> tuple[int, int]:
    """Columns and channels of a tile: neighbours in memory first."""
    if not last:
        return power_of_two(columns, 16, MAX_POOL_ELEMENTS), 1
    wide = power_of_two(channels, 8, 64)
    return power_of_two(columns, 1, MAX_POOL_ELEMENTS // wide), wide


def _window(
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> dict[str, int]:
    names = ("KH", "KW", "SH", "SW", "PH", "PW", "DH", "DW")
    return dict(zip(names, (*kernel, *stride, *padding, *dilation), strict=True))


def max_pool_fwd(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    y: Tensor,
    places: Tensor,
) -> None:
    """Fill y [N, C, h, w] and places (uint8, with the strides of y) from x [N, C, H, W], any strides.

    Reads x once but for rows that windows share (from the L2 cache). Predicted on an H200 for ResNet's first map, 100 x 64 x
    112 x 112 in bf16: 220 MB, 51 us at 4.3 TB/s; torch's pooling with indices moves 361 MB and another 160 MB for each pass
    that makes a byte of an index.
    """
    n, channels, height, width = x.shape
    rows, columns = y.shape[2:]
    if y.numel() == 0:
        return
    bx, bc = _tile(channels, columns, x.stride(1) == 1)
    max_pool_fwd_kernel[(n * rows, triton.cdiv(columns, bx), triton.cdiv(channels, bc))](
        x,
        y,
        places,
        channels,
        height,
        width,
        rows,
        columns,
        *x.stride(),
        *y.stride(),
        **_window(kernel, stride, padding, dilation),
        ACC=accumulator(x),
        BX=bx,
        BC=bc,
        num_warps=MAX_POOL_WARPS,
        **OPTIONS,
    )


def max_pool_bwd(
    grad: Tensor,
    places: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    grad_x: Tensor,
) -> None:
    """Fill grad_x [N, C, H, W] from the gradient and the places [N, C, h, w], any strides.

    Predicted on an H200 as the forward: 40 + 20 MB in, 160 MB out, 51 us.
    """
    n, channels, height, width = grad_x.shape
    rows, columns = grad.shape[2:]
    if grad_x.numel() == 0:
        return
    bx, bc = _tile(channels, width, grad_x.stride(1) == 1)
    max_pool_bwd_kernel[(n * height, triton.cdiv(width, bx), triton.cdiv(channels, bc))](
        grad,
        places,
        grad_x,
        channels,
        height,
        width,
        rows,
        columns,
        *grad.stride(),
        *places.stride(),
        *grad_x.stride(),
        **_window(kernel, stride, padding, dilation),
        ACC=accumulator(grad),
        BX=bx,
        BC=bc,
        num_warps=MAX_POOL_WARPS,
        **OPTIONS,
    )


def compilations() -> Iterator[Compilation]:
    """The windows of the teachers' first pooling layers, in both memory orders."""
    axes = ("n", "c", "y", "x")
    sizes = dict.fromkeys(("channels", "height", "width", "rows", "columns"), "i32")
    strides = dict.fromkeys((f"{name}_{axis}" for name in ("x", "y", "place") for axis in axes), "i32")
    for kind in ("*bf16", "*fp16", "*fp32"):
        for (kernel, stride, padding), last in (
            (((3, 3), (2, 2), (1, 1)), True),
            (((3, 3), (2, 2), (1, 1)), False),
            (((2, 2), (2, 2), (0, 0)), True),
        ):
            bx, bc = _tile(64, 112, last)
            constants = _window(kernel, stride, padding, (1, 1)) | {"ACC": tl.float32, "BX": bx, "BC": bc}
            for function, pointers in (
                (max_pool_fwd_kernel, {"p_x": kind, "p_y": kind, "p_places": "*u8"}),
                (max_pool_bwd_kernel, {"p_grad": kind, "p_places": "*u8", "p_grad_x": kind}),
            ):
                yield Compilation(
                    function,
                    pointers | sizes | strides,
                    constants,
                    num_warps=MAX_POOL_WARPS,
                    divisible=("channels", "x_n", "x_y", "y_n", "y_y", "place_n", "place_y"),
                )
