"""The recover stand-ins, through their command lines, against images that the published scripts computed.

Checkpoints, patches and draws are written in those scripts' formats from what was recorded of them; see tests/test_released.py.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dropin_tools import CASES, Laid, lay_out
from numpy.typing import NDArray
from torch import Tensor

from fd2fast.distillation import runner

# Relative L2. Measured: 2e-15 (sre2l) and 6e-12 (fadrm).
IMAGE_BOUND = 1e-8


@pytest.fixture(scope="module", params=list(CASES))
def made(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Laid, dict[tuple[int, int], NDArray[np.float64]]]:
    """A case, and the images before they were rounded."""
    laid = lay_out(request.param, tmp_path_factory.mktemp(request.param))
    passed: list[NDArray[np.float64]] = []

    def watched(images: Tensor, *rest: Any) -> Tensor:
        passed.extend(images.double().contiguous().numpy())
        return quantize(images, *rest)

    quantize = runner.quantize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "quantize", watched)
        assert importlib.import_module(f"fd2fast.dropin.{laid.script}").main(laid.arguments) == 0
    keys = [(label, image_id) for image_id in range(laid.case["ipc"]) for label in range(laid.case["classes"])]
    return laid, dict(zip(keys, passed, strict=True))


def test_images_are_the_released(made: tuple[Laid, dict[tuple[int, int], NDArray[np.float64]]]) -> None:
    laid, found = made
    errors = {
        key: float(np.linalg.norm(found[key] - wanted) / np.linalg.norm(wanted)) for key, wanted in laid.wanted.items()
    }
    assert max(errors.values()) < IMAGE_BOUND, errors


def test_files_are_the_released(made: tuple[Laid, Any]) -> None:
    """Byte for byte, in the published folders, and nothing beside them."""
    laid, _ = made
    for label, image_id in laid.wanted:
        assert laid.image(label, image_id).read_bytes() == laid.jpeg(label, image_id), (label, image_id)
    there = {path for path in (laid.folder / "syn").rglob("*") if path.is_file()}
    assert there == {laid.image(*key) for key in laid.wanted}


@pytest.mark.slow
def test_as_a_program_of_its_own(tmp_path: Path) -> None:
    laid = lay_out("sre2l", tmp_path)
    command = [sys.executable, "-m", f"fd2fast.dropin.{laid.script}", *laid.arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for key in laid.wanted:
        assert laid.image(*key).read_bytes() == laid.jpeg(*key), key
    assert "-------ipcID:1,class:2_3,iteration:59-------" in done.stdout
