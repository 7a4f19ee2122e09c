"""Pictures: the same whatever the user's matplotlib, left out with a warning where they fail, bounded in pixels."""

import io
import logging
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from fd2fast import pictures
from fd2fast.data import pixels
from fd2fast.methods import resolve
from fd2fast.pictures import figure, font_folder, picture, png
from fd2fast.settings.config import DistillConfig, EvaluateConfig
from fd2fast.stages import distill, evaluate, pretrain, report

STRANGE = [
    "$\\frac{1",
    b"caf\xe9".decode("utf-8", "surrogateescape"),
    "นกกระจอก 🐦",
    "עפרוני السنونو",
    "two\nlines\x1b[31m\x00",
    "a_b^c\\d{e}",
    "long " * 2000,
    "",
]
ROW = {"ipc": 1, "student": "ResNet18", "labels": "soft", "method": "random", "last_mean": 50.0, "last_std": None}
RESULT = {"losses": [1.0, 0.5], "tests": [{"epoch": 2, "top1": 50.0}]}
# Draws a picture; what failed is on standard error.
DRAW = """
from pathlib import Path
from fd2fast.pictures import figure, picture, plotting, png

@plotting()
def draw():
    drawn = figure(3, 2, layout="constrained")
    axes = drawn.subplots()
    axes.plot([1, 2, 3], [3.5, 1, 2], label="a line")
    axes.plot([1, 2, 3], [1.5, 1, 4], marker=".", label="another")
    axes.set_title("of a $ and a name")
    axes.legend()
    return png(drawn, 100)

result = picture(Path(PATH), draw)
"""


def size_of(data: bytes) -> tuple[int, int]:
    with Image.open(io.BytesIO(data)) as shown:
        return shown.size


@pytest.mark.parametrize(
    "fault", [ValueError("two\nlines"), MemoryError(), OSError(28, "No space left on device"), ImportError("no Agg")]
)
def test_a_picture_that_fails_is_left_out(tmp_path, caplog, fault):
    def draw() -> bytes:
        raise fault

    path = tmp_path / "curves.png"
    path.write_bytes(b"of an earlier epoch")
    with caplog.at_level(logging.WARNING, logger="fd2fast"):
        assert not picture(path, draw)
    assert not path.exists()
    assert len(caplog.records) == 1
    assert "curves.png is left out" in caplog.text
    assert type(fault).__name__ in caplog.text
    assert "\n" not in caplog.records[0].getMessage()


def test_a_picture_that_cannot_be_written_is_left_out(tmp_path, caplog):
    (tmp_path / "file").write_bytes(b"")
    with caplog.at_level(logging.WARNING, logger="fd2fast"):
        assert not picture(tmp_path / "file/curves.png", lambda: b"png")
    assert "curves.png is left out" in caplog.text
    assert picture(tmp_path / "new/curves.png", lambda: b"png")
    assert (tmp_path / "new/curves.png").read_bytes() == b"png"


def test_an_interrupt_is_no_fault_of_the_picture(tmp_path):
    def draw() -> bytes:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        picture(tmp_path / "a.png", draw)


def drawn_elsewhere(tmp_path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MPL", "MATPLOTLIB", "XDG_", "DISPLAY"))}
    root = os.path.dirname(os.path.dirname(pictures.__file__))
    return subprocess.run(
        [sys.executable, "-c", "import logging; logging.basicConfig(); PATH = 'there.png'\n" + DRAW],
        env={**clean, "PYTHONPATH": root, **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("backend", ["no_such_backend", "TkAgg", "module://nowhere.to.be.found"])
def test_no_setting_of_the_user_changes_a_picture(tmp_path, backend):
    """A backend that is none, settings that want LaTeX, other fonts and sizes, and nowhere to keep a cache."""
    (tmp_path / "matplotlibrc").write_text(
        "backend: QtAgg\ntext.usetex: True\nfont.family: No Such Font\nfigure.dpi: 7\nsavefig.dpi: 9\n"
        "savefig.bbox: tight\nlines.linewidth: 9\nthis is no line\naxes.prop_cycle: cycler('color', ['g'])\n"
    )
    (tmp_path / "home").write_text("a file")
    nowhere = str(tmp_path / "home")
    found = drawn_elsewhere(tmp_path, MPLBACKEND=backend, HOME=nowhere, MPLCONFIGDIR=nowhere)
    assert found.returncode == 0, found.stderr
    assert "left out" not in found.stderr
    exec(DRAW, {"PATH": str(tmp_path / "here.png")})
    assert (tmp_path / "there.png").read_bytes() == (tmp_path / "here.png").read_bytes()


def test_a_matplotlib_that_cannot_be_imported_leaves_pictures_out(tmp_path):
    (tmp_path / "matplotlibrc").write_bytes(b"font.family: \xff\xfe\n")
    found = drawn_elsewhere(tmp_path)
    assert found.returncode == 0, found.stderr
    assert found.stderr.count("is left out") == 1
    assert not (tmp_path / "there.png").exists()


def test_the_builtin_typefaces_are_found_without_matplotlib():
    code = "import sys; from fd2fast.pictures import font_folder; print(font_folder(), 'matplotlib' in sys.modules)"
    environment = {**os.environ, "MPLBACKEND": "nonsense"}
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert found.stdout.split() == [*str(font_folder()).split(), "False"], found.stderr
    assert (font_folder() / "DejaVuSans.ttf").is_file()


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.filterwarnings("ignore:Matplotlib currently does not support")
@pytest.mark.parametrize("name", STRANGE, ids=range(len(STRANGE)))
def test_names_of_any_kind_can_be_drawn(name):
    assert size_of(evaluate._curves({"0": RESULT}, EvaluateConfig(model=name), 5)) == (990, 385)
    assert size_of(report._bars([{**ROW, "method": name, "student": name}], 5.0))[0] == 800
    assert size_of(pretrain._curves([{"epoch": 1, "loss": 1.0, "train_accuracy": 5.0}], name)) == (900, 340)
    images = np.zeros((2, 3, 16, 16), np.uint8)
    assert size_of(pixels.grid(images, 1, titles=[name, "other"]))[0] < 600
    assert size_of(pixels.grid(images, 2, titles=[name, "other"]))[0] < 600


def test_figures_stay_bounded(monkeypatch):
    monkeypatch.setattr(report, "_BARS", 20)
    rows = [{**ROW, "method": f"method {n}"} for n in range(50)]
    assert size_of(report._bars(rows, 5.0)) == size_of(report._bars(rows[:20], 5.0))
    curves = evaluate._curves({str(seed): RESULT for seed in range(100)}, EvaluateConfig(), 5)
    assert size_of(curves) == (990, 385)
    assert size_of(png(figure(1e6, 1, dpi=100), 100)) == (12000, 100)


def test_losses_of_nothing_can_be_drawn():
    assert size_of(distill._losses([], resolve(DistillConfig(), classes=20, size=64)))[0] > 100


@pytest.mark.parametrize(
    ("count", "side", "columns", "scale"), [(200, 64, 1, 1), (500, 16, 500, 1), (4000, 8, 40, 1), (80, 8, 8, 30)]
)
def test_sheets_stay_bounded(monkeypatch, count, side, columns, scale):
    monkeypatch.setattr(pixels, "_SHEET_PIXELS", 1_000_000)
    monkeypatch.setattr(pixels, "_SHEET_SIDE", 2000)
    images = np.broadcast_to(np.uint8(77), (count, 3, side, side))
    rows = -(-count // columns)
    data = pixels.grid(images, columns, titles=[f"class {n}" for n in range(rows)], scale=scale)
    width, height = size_of(data)
    assert max(width, height) <= 2_200
    assert width * height <= 1_200_000


def test_sheets_of_usual_size_keep_every_pixel():
    images = np.random.default_rng(0).integers(0, 255, (220, 3, 24, 24), dtype=np.uint8)
    with Image.open(io.BytesIO(pixels.grid(images, 11))) as shown:
        sheet = np.asarray(shown)
    assert sheet.shape == (2 + 20 * 26, 2 + 11 * 26, 3)
    np.testing.assert_array_equal(sheet[2 + 26 : 26 + 26, 2:26], images[11].transpose(1, 2, 0))
