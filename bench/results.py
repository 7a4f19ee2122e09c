"""Result files of the benches: where and how a run was made and its rows, as JSON, Markdown and PNG."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from fd2fast import __version__, pictures
from fd2fast.artifacts import write_bytes, write_json
from fd2fast.errors import UserError
from fd2fast.system import isa

ROOT = Path(__file__).parents[1]
SCHEMA = 1


def about(device: torch.device, bench: str, arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Device, driver, clocks, load, versions, commit, command and date of a run that begins now."""
    given = sys.argv[1:] if arguments is None else arguments
    found: dict[str, Any] = {
        "schema": SCHEMA,
        "bench": bench,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["fd2fast", "bench", bench, *given]),
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD") or "unknown",
        "uncommitted changes": bool(_output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")),
        "versions": {"fd2fast": __version__, "python": platform.python_version(), **_versions()},
        "device": _processor(),
        "threads": torch.get_num_threads(),
        "instruction set": "; ".join(line.strip() for line in isa.describe()),
        "load before": round(os.getloadavg()[0], 2),
    }
    if device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
        found["versions"] |= {"cuda": torch.version.cuda}
        found["driver"] = _ask_gpu(device, "driver_version")
    return found | {"clocks": clocks(device)}


def clocks(device: torch.device) -> str:
    """Of a GPU those of now (multiprocessors, memory), the most and the power limit; of a CPU its cores' of now."""
    if device.type != "cuda":
        info = Path("/proc/cpuinfo")
        lines = info.read_text().splitlines() if info.is_file() else []
        now = sorted(float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz"))
        return f"{now[0]:.0f} to {now[-1]:.0f} MHz" if now else ""
    return _ask_gpu(device, "clocks.sm,clocks.mem,clocks.max.sm,power.limit")


def _ask_gpu(device: torch.device, query: str) -> str:
    # by its own name: torch may see fewer GPUs than there are
    name = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    return _output("nvidia-smi", f"--id={name}", f"--query-gpu={query}", "--format=csv,noheader")


def _versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "torchvision", "timm", "triton", "numpy"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def prepare(folder: Path) -> None:
    """Make the folder for the files; UserError where that cannot be written, before anything is measured."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"results cannot be written to {folder}: {error.strerror}") from error


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.is_file()
        else []
    )
    return names[0] if names else platform.processor() or platform.machine()


def markdown(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """A table; "-" where a row has no value."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = (_cell(row.get(column)) for column in columns)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write(folder: Path, place: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], text: str) -> Path:
    """BENCH-DATE.json and .md in the folder; the path of the first."""
    stamp = str(place["date"]).replace(":", "").replace("+0000", "")
    path = Path(folder) / f"{place['bench']}-{stamp}.json"
    write_json(path, {"about": dict(place), "rows": [dict(row) for row in rows]})
    head = "\n".join(f"{name}: {value}" for name, value in place.items())
    write_bytes(path.with_suffix(".md"), f"```\n{head}\n```\n\n{text}\n".encode())
    return path


def save(
    folder: Path,
    place: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    picture: Callable[[Sequence[Mapping[str, Any]], str], Any],
) -> Path:
    """Write the files, in place of those of the same run, then the picture as .png; the path of the JSON.

    picture: draws the rows under a title, a matplotlib Figure.
    """
    path = write(folder, place, rows, markdown(rows, columns))

    @pictures.plotting()
    def drawn() -> bytes:
        return pictures.png(picture(rows, f"{place['device']}: {place['work']}"), 110)

    pictures.picture(path.with_suffix(".png"), drawn)
    return path


def publish(
    folder: Path,
    place: Mapping[str, Any],
    rows: Sequence[Mapping[str, Any]],
    columns: Sequence[str],
    picture: Callable[[Sequence[Mapping[str, Any]], str], Any],
) -> None:
    """`save`, and print the table."""
    path = save(folder, place, rows, columns, picture)
    print(markdown(rows, columns))
    print(path)


def figure_of(width: float, height: float) -> Any:
    """An empty matplotlib Figure, in inches, that needs no display."""
    return pictures.figure(width, height, layout="constrained")


def read(path: Path | str) -> dict[str, Any]:
    """{"about": …, "rows": […]} of a result file; UserError for anything else."""
    try:
        found = json.loads(Path(path).read_text())
        if found["about"]["schema"] != SCHEMA:
            raise UserError(f"{path} has version {found['about']['schema']}, this bench reads {SCHEMA}")
        return {"about": dict(found["about"]), "rows": list(found["rows"])}
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a result file of a bench: {error}") from error
