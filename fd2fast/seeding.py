"""Random streams as pure functions of (seed, what for, counters), so that a resumed run draws what an unbroken one drew."""

import hashlib
import random

import numpy as np
import torch


def derive(seed: int, *keys: str | int) -> int:
    """A 63-bit seed that depends on `seed` and every key; different keys give unrelated streams."""
    text = "/".join([str(int(seed)), *(str(key) for key in keys)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *keys: str | int) -> torch.Generator:
    """A CPU torch generator for this purpose."""
    return torch.Generator().manual_seed(derive(seed, *keys))


def numpy_generator(seed: int, *keys: str | int) -> np.random.Generator:
    """A numpy generator for this purpose."""
    return np.random.Generator(np.random.Philox(derive(seed, *keys)))


def seed_all(seed: int, *keys: str | int) -> None:
    """Seed the global generators of torch (all devices), numpy and random: for library code that takes no generator."""
    value = derive(seed, *keys)
    torch.manual_seed(value)
    np.random.seed(value % 2**32)
    random.seed(value)
