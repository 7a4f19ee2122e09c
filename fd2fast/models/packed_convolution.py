"""A frozen convolution by oneDNN with its weight packed once for each shape, forward and input gradient; no autograd.

Ordinary calls put the weight in oneDNN's order each time, and torch's input gradient makes the input that it never reads
contiguous first; 1 x 1 convolutions with a stride have a slow kernel of their own there. The transposed convolution with a
packed weight does none of that and gives the same bits. Measured on an EPYC with AVX-512, 10 images, bf16, two threads, input
gradient: 512 -> 512, 3 x 3 on 7 x 7 pixels 6.0 -> 4.8 ms; 64 -> 128, 1 x 1 with stride 2 on 56 x 56 2.9 -> 0.5 ms; depthwise
144, 3 x 3 on 56 x 56 6.0 -> 1.3 ms; 256 -> 64, 1 x 1 on 56 x 56 7.2 -> 2.5 ms.

The order is oneDNN's choice for one shape of input. With a weight in another shape's order it reorders at each call or falls
to a slow kernel (measured with AVX2, fp32, 512 -> 512, 3 x 3 on 7 x 7 pixels: 26 -> 240 ms), so a form serves its shape only.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from fd2fast.models.weight_forms import Held

Pair = tuple[int, int]

_OPERATIONS = (
    "_convolution_pointwise",
    "_convolution_transpose_pointwise",
    "_reorder_convolution_weight",
    "_reorder_convolution_transpose_weight",
)
# Shapes whose forms are held for one direction: the sizes of a method's phases, the last step of fewer images.
_MOST_SHAPES = 8


@cache
def supports(dtype: torch.dtype) -> bool:
    """Whether this torch and processor can convolve CPU tensors of this type so."""
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in _OPERATIONS):
        return False
    # the compiler's own entry points; without such an instruction set oneDNN has no bf16
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PackedConv:
    """Packed forms of one weight [C_out, C_in / groups, k_h, k_w], each made at first use for one shape and used with it only.

    Forward and gradient want different orders: a frozen network holds its weights three times (ResNet-18 in bf16: 67 MB), and
    twice more for each further shape whose order differs.
    """

    def __init__(self, stride: Pair, padding: Pair, dilation: Pair, groups: int):
        self._settings = stride, padding, dilation, groups
        self._forward, self._gradient = Held(_MOST_SHAPES), Held(_MOST_SHAPES)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed forms made so far, beside the weight itself."""
        forms = {id(form): form for held in (self._forward, self._gradient) for form in held.values()}
        return sum(form.numel() * form.element_size() for form in forms.values())

    def forget(self) -> None:
        """Let go of the packed forms; they are made again when they are needed."""
        self._forward.clear()
        self._gradient.clear()

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """F.conv2d of x [N, C_in, H, W], dense channels_last, in the weight's type."""
        stride, padding, dilation, groups = self._settings
        shape = list(x.shape)

        def make() -> Tensor:
            form = torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, shape)
            return _shared(form, self._forward)

        packed = self._forward.get(weight, tuple(shape), make)
        return torch.ops.mkldnn._convolution_pointwise(
            x, packed, bias, padding, stride, dilation, groups, "none", [], ""
        )

    def input_gradient(self, grad: Tensor, weight: Tensor, size: Pair) -> Tensor:
        """[N, C_in, *size] from that of the result, [N, C_out, H', W'] in the weight's type."""
        stride, padding, dilation, groups = self._settings
        kernel, rest = weight.shape[2:], []
        for axis, side in enumerate(size):
            window = dilation[axis] * (kernel[axis] - 1) + 1
            rest.append(side + 2 * padding[axis] - window - (grad.shape[2 + axis] - 1) * stride[axis])
        grad = grad.contiguous(memory_format=torch.channels_last)
        shape = list(grad.shape)

        def make() -> Tensor:
            form = torch.ops.mkldnn._reorder_convolution_transpose_weight(
                weight, padding, rest, stride, dilation, groups, shape
            )
            return _shared(form, self._gradient)

        packed = self._gradient.get(weight, (*shape, *rest), make)
        return torch.ops.mkldnn._convolution_transpose_pointwise(
            grad, packed, None, padding, rest, stride, dilation, groups, "none", [], ""
        )


def _shared(form: Tensor, held: Held) -> Tensor:
    """A form already held in the very same order, or this one: most shapes agree in it."""
    describe = getattr(torch.ops.mkldnn, "_get_mkldnn_serialized_md", None)
    if describe is None:
        return form
    order = describe(form)
    return next((other for other in held.values() if torch.equal(describe(other), order)), form)
