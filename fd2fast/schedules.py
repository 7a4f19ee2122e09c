"""How a rate falls."""

import math


def half_cosine(done: float, total: float) -> float:
    """From 1 at the beginning to 0 where `done` of `total` is all: (1 + cos(pi done / total)) / 2."""
    return 0.5 * (1 + math.cos(math.pi * done / total))
