"""The report of a run: one table, its conditions and two pictures, read from manifests; nothing is computed anew."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fd2fast.artifacts import Dataset, Images, Metrics, TeacherArtifact, write_bytes, write_json
from fd2fast.data.pixels import read_image
from fd2fast.data.store import load_split
from fd2fast.errors import UserError
from fd2fast.pictures import figure, picture, plotting, png
from fd2fast.system.lock import own
from fd2fast.system.streams import plain

_GRID_CLASSES, _GRID_IDS, _GRID_SETS = 20, 3, 24
# Rows of the table that the picture of accuracies shows.
_BARS = 200
# Side of one image in the grid, output pixels: small images are repeated up to it, larger ones reduced to it.
_CELL = 112
_GAP, _SET_GAP = 3, 14
# Seconds to wait for another report of the same run: hours of work must not end in a refusal by it.
_PATIENCE = 120.0
_DPI = 100
_COLOURS = {"soft": "tab:blue", "hard": "tab:orange"}


def run(
    out: Path | str,
    *,
    dataset: Dataset,
    teachers: Sequence[TeacherArtifact],
    images: Sequence[Images],
    metrics: Sequence[Metrics],
) -> str:
    """Write table.json, report.md, grid.png and accuracy.png into the plain folder `out` (made anew every time).

    A picture that cannot be drawn is left out, with a warning and a line in report.md.
    Returns the Markdown table, one row for each of `metrics`, in their order. images: at least those that `metrics` tested;
    each distinct one is a group of columns of the grid.

    Raises UserError for artifacts of another kind, metrics of another data set or of images that are not given.
    """
    dataset, teachers = Dataset.of(dataset), [TeacherArtifact.of(teacher) for teacher in teachers]
    images, metrics = [Images.of(one) for one in images], [Metrics.of(one) for one in metrics]
    _check(dataset, images, metrics)
    out = Path(out)
    rows = [_row(m, images) for m in metrics]
    table = _table(rows)
    about = _about(dataset, teachers)
    pictures = {"grid.png": lambda: _grid(dataset, images), "accuracy.png": lambda: _bars(rows, about["chance"])}

    def write_document(left_out: Sequence[str] = ()) -> None:
        text = _document(about, rows, table, images, left_out)
        write_bytes(out / "report.md", text.encode("utf-8", "backslashreplace"))

    with own(out, patience=_PATIENCE):
        write_json(out / "table.json", {**about, "rows": rows})
        write_document()
        if left_out := [name for name, draw in pictures.items() if not picture(out / name, draw)]:
            write_document(left_out)
    return table


def _check(dataset: Dataset, images: Sequence[Images], metrics: Sequence[Metrics]) -> None:
    if not metrics:
        raise UserError("a report needs at least one metrics artifact")
    for artifact in (*images, *metrics):
        dataset.must_fit(artifact)
    for m in metrics:
        if m.parent_id("dataset") != dataset.id:
            raise UserError(f"{m.path} was tested on another data set than {dataset.path}: evaluate again")


def _images_of(metrics: Metrics, images: Sequence[Images]) -> Images:
    wanted = metrics.parent_id("images") or ""
    for artifact in images:
        if artifact.id == wanted:
            return artifact
    raise UserError(
        f"{metrics.path} tested images that are not among those given ({wanted[:12]}): evaluate again, or give their artifact"
    )


def set_name(images: Images) -> str:
    """What a set of images is called: its method, with the semantics where they are not the paper's."""
    semantics = images.facts.semantics
    return images.facts.method + ("" if semantics == "paper" else f" ({semantics})")


def _row(metrics: Metrics, images: Sequence[Images]) -> dict[str, Any]:
    """One row of table.json; the facts of the metrics with the images' and the times."""
    made = _images_of(metrics, images)
    facts = metrics.facts
    return {
        "method": set_name(made),
        "labels": facts.labels,
        "ipc": facts.ipc,
        "student": facts.student,
        "epochs": facts.epochs,
        "seeds": facts.seeds,
        "last_mean": facts.last_mean,
        "last_std": facts.last_std,
        "best_mean": facts.best_mean,
        "best_std": facts.best_std,
        "last": facts.last,
        "best": facts.best,
        "top5_mean": facts.top5_mean,
        "seconds_to_distil": made.seconds,
        "distilled_ipc": made.facts.ipc,
        "seconds_for_labels": metrics.measured.get("seconds_of_the_labels"),
        "seconds_for_students": metrics.seconds,
        "metrics": metrics.id,
        "images": made.id,
    }


def _about(dataset: Dataset, teachers: Sequence[TeacherArtifact]) -> dict[str, Any]:
    facts = dataset.facts
    return {
        "dataset": {
            "name": facts.name or dataset.path.name,
            "classes": len(dataset.classes),
            "size": dataset.size,
            "train": facts.train,
            "test": facts.test,
            "train_per_class": facts.per_class.get("train", []),
            "skipped": len(facts.skipped),
            "id": dataset.id,
        },
        "chance": round(100 / len(dataset.classes), 4),
        "teachers": [
            {
                "model": t.facts.model,
                "backbone_accuracy": _finite(t.facts.backbone_accuracy),
                "cal_accuracy": _finite(t.facts.cal_accuracy),
                "attention_maps": t.facts.attention_maps,
                "seconds": _finite(t.seconds),
                "id": t.id,
            }
            for t in teachers
        ],
    }


def _finite(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _percent(mean: float | None, std: float | None = None) -> str:
    if mean is None:
        return "unknown"
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"


def _seconds(value: Any) -> str:
    # times are not part of an artifact's identity: they may have been changed to anything
    if type(value) not in (int, float):
        return "unknown"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]], left: int) -> str:
    """A Markdown table, padded so that it reads well as plain text; the first `left` columns are text, the others figures."""
    cells = [[plain(cell).replace("|", "\\|") for cell in line] for line in (header, *lines)]
    widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(header))]

    def joined(line: Sequence[str]) -> str:
        padded = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if i < left else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    return "\n".join([joined(cells[0]), joined(rule), *(joined(line) for line in cells[1:])])


def _table(rows: Sequence[dict[str, Any]]) -> str:
    header = [
        "method",
        "labels",
        "student",
        "IPC",
        "last epoch %",
        "best epoch %",
        "distil s",
        "labels s",
        "students s",
    ]
    lines = []
    for row in rows:
        seconds = _seconds(row["seconds_to_distil"])
        if row["distilled_ipc"] != row["ipc"]:
            seconds += f" (IPC {row['distilled_ipc']})"
        lines.append(
            [
                row["method"],
                row["labels"],
                row["student"],
                str(row["ipc"]),
                _percent(row["last_mean"], row["last_std"]),
                _percent(row["best_mean"], row["best_std"]),
                seconds,
                "-" if row["seconds_for_labels"] is None else _seconds(row["seconds_for_labels"]),
                _seconds(row["seconds_for_students"]),
            ]
        )
    # what differs between rows becomes a column; what is equal is said once below the table
    for key, title in (("epochs", "epochs"), ("seeds", "seeds")):
        if len({_condition(row, key) for row in rows}) > 1:
            header.insert(4, title)
            for line, row in zip(lines, rows, strict=True):
                line.insert(4, _condition(row, key))
    return _markdown(header, lines, left=3)


def _condition(row: dict[str, Any], key: str) -> str:
    return " ".join(str(seed) for seed in row["seeds"]) if key == "seeds" else str(row[key])


def _document(
    about: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    table: str,
    images: Sequence[Images],
    left_out: Sequence[str] = (),
) -> str:
    def shown(title: str, name: str) -> str:
        return f"({name} could not be drawn)" if name in left_out else f"![{title}]({name})"

    data = about["dataset"]
    counts = data["train_per_class"]
    each = f", {min(counts)} to {max(counts)} of each class" if counts and min(counts) != max(counts) else ""
    each = f", {counts[0]} of each class" if counts and not each else each
    skipped = f" Skipped as unreadable: {data['skipped']}." if data["skipped"] else ""
    teachers = _markdown(
        ["teacher", "backbone %", "CAL %", "attention maps", "pretrain s"],
        [
            [
                t["model"],
                _percent(t["backbone_accuracy"]),
                _percent(t["cal_accuracy"]),
                str(t["attention_maps"] or "unknown"),
                _seconds(t["seconds"]),
            ]
            for t in about["teachers"]
        ],
        left=1,
    )
    made = _markdown(
        ["images", "semantics", "teachers given", "IPC", "distil s"],
        [
            [
                a.facts.method,
                a.facts.semantics,
                ", ".join(a.facts.teachers) or "none",
                str(a.facts.ipc),
                _seconds(a.seconds),
            ]
            for a in _distinct(images)
        ],
        left=3,
    )
    return f"""# Dataset distillation on {plain(data["name"])}

{data["classes"]} classes, {data["size"]} x {data["size"]} pixels. {data["train"]} training images{each}; \
{data["test"]} test images. Chance is {about["chance"]:.2f} %.{skipped}

## Result

{table}

{shown("Accuracy of the students", "accuracy.png")}

{_how_to_read(rows, data["test"])}

## Teachers

Accuracy on the same test images.

{teachers}

## Images

{made}

{shown("A real training image of each class, then the images of each method", "grid.png")}

{_grid_rows(data["classes"])}: one real training image, then the first ids of each set.
"""


def _grid_rows(classes: int) -> str:
    return f"The first {_GRID_CLASSES} of {classes} classes" if classes > _GRID_CLASSES else "Every class"


def _how_to_read(rows: Sequence[dict[str, Any]], test: int) -> str:
    epochs = {row["epochs"] for row in rows}
    seeds = {tuple(row["seeds"]) for row in rows}
    same = []
    if len(epochs) == 1:
        same.append(f"{next(iter(epochs))} epochs")
    if len(seeds) == 1:
        one = next(iter(seeds))
        same.append(f"seed{'s' if len(one) > 1 else ''} {', '.join(map(str, one))}")
    several = any(len(one) > 1 for one in seeds)
    points = [
        f"Each row: students trained from scratch on IPC images of each class, tested on all {test} test images "
        "(correct / all)." + (f" Equal in all rows: {', '.join(same)}." if same else ""),
        (
            "± is the standard deviation over the students' seeds (n - 1). The images were made once, so it holds no "
            "spread of the distillation."
            if several
            else "One seed for each row: no spread is known, so small differences mean nothing."
        ),
        "Compare the last epoch. The best epoch was picked on the test images themselves and flatters.",
        "Compare rows of equal labels, IPC and student. Soft labels are a teacher's answers for every view of every epoch and "
        "hold far more than the images do; hard labels are only the class.",
        "Seconds are wall-clock time on the machine of each stage: of the whole set of images (in brackets: its IPC where the "
        "row uses its first ids only) without the teacher and patches, of the soft labels, and of the students of all seeds.",
    ]
    return "\n".join(f"- {point}" for point in points)


def _distinct(images: Sequence[Images]) -> list[Images]:
    return list({artifact.id: artifact for artifact in images}.values())


def _cell(pixels: np.ndarray) -> np.ndarray:
    """uint8 [3,S,S] as [side,side,3]: whole repeats of small images, so that each pixel stays a crisp square."""
    image = np.ascontiguousarray(pixels.transpose(1, 2, 0))
    size = len(image)
    if size > _CELL:
        return np.asarray(Image.fromarray(image).resize((_CELL, _CELL), Image.Resampling.BOX))
    times = max(1, round(_CELL / size))
    return image.repeat(times, 0).repeat(times, 1)


def _columns(dataset: Dataset, images: Sequence[Images], classes: int) -> list[tuple[str, list[list[np.ndarray]]]]:
    """(title, columns of one cell for each class) of the real images and of every distinct set."""
    train = load_split(dataset, "train")
    train.require(1, "the report")
    first = train.pixels([int(train.of_class(k)[0]) for k in range(classes)]).numpy()
    groups = [("real", [[_cell(pixels) for pixels in first]])]
    for artifact in _distinct(images)[:_GRID_SETS]:
        files = artifact.image_names()
        columns = [
            [
                _cell(read_image(artifact.file(files[label, image_id]), artifact.size).numpy())
                for label in range(classes)
            ]
            for image_id in range(min(_GRID_IDS, artifact.per_class()))
        ]
        groups.append((plain(set_name(artifact), 60).replace(" ", "\n"), columns))
    return groups


@plotting()
def _grid(dataset: Dataset, images: Sequence[Images]) -> bytes:
    """One row per class; the real image, then each set's first ids, under their titles."""
    classes = min(_GRID_CLASSES, len(dataset.classes))
    names = [plain(name, 28) for name in dataset.classes[:classes]]
    groups = _columns(dataset, images, classes)
    side = len(groups[0][1][0][0])
    left, above = 18 + 9 * max(len(name) for name in names), 62
    width = left + sum(len(columns) * (side + _GAP) + _SET_GAP for _, columns in groups)
    height = above + classes * (side + _GAP) + _GAP
    sheet = np.full((height, width, 3), 255, np.uint8)
    drawn = figure(width / _DPI, height / _DPI, dpi=_DPI)
    x = left
    for title, columns in groups:
        middle = x + (len(columns) * (side + _GAP) - _GAP) / 2
        size = 13 if len(columns) > 1 else 10  # as wide as its column
        at = (middle / width, 1 - 22 / height)
        drawn.text(*at, title, ha="center", va="center", size=size, weight="bold", parse_math=False)
        for image_id, column in enumerate(columns):
            if title != "real":
                at = ((x + side / 2) / width, 1 - 52 / height)
                drawn.text(*at, f"id {image_id}", ha="center", va="center", size=10, color="dimgrey")
            for row, cell in enumerate(column):
                y = above + row * (side + _GAP)
                sheet[y : y + side, x : x + side] = cell
            x += side + _GAP
        x += _SET_GAP
    for row, name in enumerate(names):
        centre = above + row * (side + _GAP) + side / 2
        drawn.text((left - 8) / width, 1 - centre / height, name, ha="right", va="center", size=11, parse_math=False)
    drawn.figimage(sheet, origin="upper", zorder=-1)  # pixel for pixel, no resampling
    return png(drawn, _DPI)


@plotting()
def _bars(rows: Sequence[dict[str, Any]], chance: float) -> bytes:
    """Accuracy of the last epoch, a panel for each IPC and student, a bar for each row; of the first 200 rows."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    rows = rows[:_BARS]
    panels: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        panels.setdefault((row["ipc"], row["student"]), []).append(row)
    heights = [len(panel) + 1.2 for panel in panels.values()]
    drawn = figure(8, 0.9 + 0.36 * sum(heights), layout="constrained")
    axes = drawn.subplots(len(panels), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    end = max(row["last_mean"] + (row["last_std"] or 0) for row in rows)
    for ax, ((ipc, student), panel) in zip(axes, panels.items(), strict=True):
        for y, row in enumerate(panel):
            mean, std = row["last_mean"], row["last_std"] or 0.0
            ax.barh(y, mean, xerr=std or None, height=0.7, color=_COLOURS[row["labels"]], capsize=3)
            ax.annotate(
                _percent(mean, row["last_std"]),
                (mean + std, y),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                size=9,
            )
        ax.axvline(chance, color="black", linestyle=":", linewidth=1)
        ax.set_yticks(range(len(panel)), [plain(row["method"], 60) for row in panel], parse_math=False)
        ax.set_ylim(len(panel) - 0.4, -0.6)
        title = f"{ipc} image{'s' if ipc > 1 else ''} per class, student {plain(student, 60)}"
        ax.set_title(title, size=10, loc="left", parse_math=False)
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlim(0, max(end, chance) * 1.22)
    axes[-1].set_xlabel("test accuracy after the last epoch (%)")
    used = [label for label in _COLOURS if any(row["labels"] == label for row in rows)]
    handles: list[Any] = [Patch(color=_COLOURS[label], label=f"{label} labels") for label in used]
    handles.append(Line2D([], [], color="black", linestyle=":", label="chance"))
    drawn.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False, fontsize=9)
    return png(drawn, _DPI)
