"""Set-up shared by all tests: interpreter without a GPU, seeds, threads, gpu marker."""

import os
import random

# before torch: one thread, also in the processes that tests start; they say so where they want more
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

# independent runs are compared byte for byte: no choice by time
os.environ.setdefault("FD2FAST_TUNE", "0")
# nor one that an earlier run left with the user
os.environ.setdefault("FD2FAST_CACHE", "")

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # read by triton when it is imported, which nothing has done yet
    os.environ.setdefault("TRITON_INTERPRET", "1")

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked gpu where there is none; where there is one, mark what takes the device it finds."""
    if HAS_GPU:
        for item in items:
            if "device" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.gpu)
        return
    skip = pytest.mark.skip(reason="no NVIDIA GPU is visible")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if HAS_GPU else "cpu")
