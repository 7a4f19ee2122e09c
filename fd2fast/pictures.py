"""Pictures beside results: drawn alike whatever the user's matplotlib, and left out with a warning where that fails."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fd2fast.artifacts import write_bytes
from fd2fast.system.streams import plain

log = logging.getLogger("fd2fast")

# Longest side of a figure, pixels; a drawing of more is no picture any more.
_MOST_SIDE = 12000
# Settings that choose windows and their programs, not looks.
_NOT_LOOKS = ("backend", "backend_fallback", "interactive", "toolbar")


def picture(path: Path, draw: Callable[[], bytes]) -> bool:
    """Write the PNG that `draw` makes to `path`; whether that went well.

    Whatever goes wrong is said in the log with the picture's name and the cause, and the picture (an older one, too) is not
    there: no result hangs on it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # characters that the font lacks, say
            data = draw()
        write_bytes(path, data)
    except Exception as error:
        with contextlib.suppress(OSError):
            path.unlink()
        log.warning("the picture %s is left out, the results are not touched: %s", plain(path), _cause(error))
        return False
    return True


def _cause(error: Exception) -> str:
    told = str(error).strip().splitlines()
    return f"{type(error).__name__}: {plain(told[0], 200)}" if told else type(error).__name__


@contextlib.contextmanager
def plotting() -> Iterator[None]:
    """matplotlib as it comes, within the block: no user's matplotlibrc, style or backend; also a decorator."""
    matplotlib = _matplotlib()
    looks = {key: value for key, value in matplotlib.rcParamsDefault.items() if key not in _NOT_LOOKS}
    with matplotlib.rc_context(looks):
        yield


def _matplotlib() -> Any:
    """The module; its import ends in an error for a backend that it does not know."""
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return matplotlib


def figure(width: float, height: float, *, dpi: float = 100, **settings: Any) -> Any:
    """An empty Figure of width x height inches, at most 12,000 pixels a side, that needs no display; settings: Figure's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    most = _MOST_SIDE / dpi
    made = Figure(figsize=(min(width, most), min(height, most)), dpi=dpi, **settings)
    FigureCanvasAgg(made)
    return made


def png(figure: Any, dpi: float) -> bytes:
    """The figure as a PNG file without date or version: equal figures give equal bytes."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=dpi, metadata={"Software": None})
    return file.getvalue()


def font_folder() -> Path:
    """The folder of typefaces that come with matplotlib, found without importing it."""
    found = importlib.util.find_spec("matplotlib")
    if found is not None and found.submodule_search_locations:
        folder = Path(next(iter(found.submodule_search_locations))) / "mpl-data" / "fonts" / "ttf"
        if folder.is_dir():
            return folder
    return Path(_matplotlib().get_data_path()) / "fonts" / "ttf"
