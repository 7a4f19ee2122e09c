"""The specification of max pooling: places lead back to the maxima, sizes are torch's."""

import pytest
import torch
import torch.nn.functional as F

from fd2fast import reference
from fd2fast.reference.max_pool import pooled_size

WINDOWS = [
    ((3, 3), (2, 2), (1, 1), (1, 1), False),
    ((3, 3), (2, 2), (1, 1), (1, 1), True),
    ((2, 4), (1, 3), (1, 2), (1, 1), True),
    ((3, 2), (2, 1), (1, 0), (2, 3), False),
    ((1, 1), (2, 3), (0, 0), (1, 1), False),
]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("side", [(7, 8), (13, 6)])
def test_places_lead_back_to_the_maxima(window, side):
    kernel, stride, padding, dilation, ceil_mode = window
    x = torch.randn(2, 3, *side)
    y, places = reference.max_pool(x, *window)
    assert torch.equal(y, F.max_pool2d(x, *window))
    assert places.dtype == torch.uint8
    rows, columns = places // kernel[1], places % kernel[1]
    down = torch.arange(y.shape[2])[:, None] * stride[0] - padding[0] + rows.long() * dilation[0]
    right = torch.arange(y.shape[3]) * stride[1] - padding[1] + columns.long() * dilation[1]
    index = (down * side[1] + right).flatten(2)
    assert torch.equal(x.flatten(2).gather(2, index).view_as(y), y)
    assert pooled_size(side, *window) == list(y.shape[2:])


def test_the_first_of_equal_maxima_and_the_last_nan():
    x = torch.tensor([[0.0, 5.0, 5.0], [5.0, 1.0, 0.0], [0.0, 0.0, 0.0]])[None, None]
    assert reference.max_pool(x, (3, 3), (1, 1), (0, 0), (1, 1), False)[1].item() == 1
    x[0, 0, 1, 1] = x[0, 0, 2, 0] = torch.nan
    assert reference.max_pool(x, (3, 3), (1, 1), (0, 0), (1, 1), False)[1].item() == 6
