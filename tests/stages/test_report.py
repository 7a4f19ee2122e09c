"""The report on made-up manifests: rows in order, conditions said, pictures pixel for pixel, refusals."""

import io
import json
import types
from pathlib import Path

import numpy as np
import pytest
from distill_tools import make_dataset, make_teacher
from PIL import Image

from fd2fast.artifacts import Artifact, open_stage, write_json
from fd2fast.data.pixels import save_image
from fd2fast.errors import UserError
from fd2fast.settings.config import DistillConfig, EvaluateConfig
from fd2fast.stages import report

CLASSES, SIZE = 3, 32


def make_images(path: Path, dataset: Artifact, method: str, ipc: int, semantics: str = "paper") -> Artifact:
    """Noise, each image with a colour of its own in its corner."""
    stage = open_stage(path, "images", DistillConfig(method=method, semantics=semantics, ipc=ipc), {"dataset": dataset})
    for label in range(len(dataset.classes)):
        for image_id in range(ipc):
            save_image(
                stage.path / f"images/new{label:03d}/class{label:03d}_id{image_id:03d}.png",
                noise(method, label, image_id),
            )
    return stage.finish(
        classes=dataset.classes,
        size=dataset.size,
        mean=dataset.mean,
        std=dataset.std,
        facts={"method": method, "semantics": semantics, "ipc": ipc, "teachers": ["ResNet18"]},
        measured={"seconds": 1234.4},
    )


def noise(method: str, label: int, image_id: int) -> np.ndarray:
    pixels = np.random.default_rng([len(method), label, image_id]).integers(0, 200, (3, SIZE, SIZE), dtype=np.uint8)
    pixels[:, 0, 0] = corner(method, label, image_id)
    return pixels


def corner(method: str, label: int, image_id: int) -> tuple[int, int, int]:
    return 201 + label, 201 + image_id, 201 + len(method)


def make_metrics(
    path: Path,
    dataset: Artifact,
    images: Artifact,
    last: list[float],
    *,
    ipc: int,
    labels: str = "soft",
    epochs: int = 30,
) -> Artifact:
    stage = open_stage(path, "metrics", EvaluateConfig(labels=labels, ipc=ipc), {"dataset": dataset, "images": images})
    write_json(stage.path / "metrics.json", last)
    several = len(last) > 1
    facts = {
        "method": images.facts["method"],
        "ipc": ipc,
        "student": "ResNet18",
        "labels": labels,
        "epochs": epochs,
        "seeds": list(range(len(last))),
        "last": last,
        "last_mean": float(np.mean(last)),
        "last_std": float(np.std(last, ddof=1)) if several else None,
        "best": [v + 1 for v in last],
        "best_mean": float(np.mean(last)) + 1,
        "best_std": float(np.std(last, ddof=1)) if several else None,
        "top5_mean": None,
    }
    look = {"classes": dataset.classes, "size": dataset.size, "mean": dataset.mean, "std": dataset.std}
    return stage.finish(
        **look, facts=facts, measured={"seconds": 56.78, "seconds_of_the_labels": 9.05 if labels == "soft" else None}
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> types.SimpleNamespace:
    root = tmp_path_factory.mktemp("run")
    dataset = make_dataset(root / "dataset", CLASSES, SIZE, per_class=2)
    teacher = make_teacher(root / "teacher", dataset)
    fd2 = make_images(root / "fd2", dataset, "sre2l++_fd2", 4, semantics="released")
    random = make_images(root / "random", dataset, "random", 2)
    metrics = [
        make_metrics(root / "m0", dataset, random, [10.0, 12.0, 14.0], ipc=2, labels="hard"),
        make_metrics(root / "m1", dataset, fd2, [40.0, 41.0, 42.0], ipc=2),
        make_metrics(root / "m2", dataset, fd2, [50.5, 51.0, 51.5], ipc=4),
    ]
    given = {"dataset": dataset, "teachers": [teacher], "images": [fd2, random], "metrics": metrics}
    out = root / "report"
    table = report.run(out, **given)
    return types.SimpleNamespace(root=root, out=out, table=table, given=given, **given)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_a_row_for_each_metrics_in_their_order(run) -> None:
    header, rule, *lines = run.table.splitlines()
    wanted = [
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
    assert cells(header) == wanted
    assert set(rule) <= set("|-: ")
    assert [cells(line) for line in lines] == [
        ["random", "hard", "ResNet18", "2", "12.00 ± 2.00", "13.00 ± 2.00", "1234", "-", "56.8"],
        [
            "sre2l++_fd2 (released)",
            "soft",
            "ResNet18",
            "2",
            "41.00 ± 1.00",
            "42.00 ± 1.00",
            "1234 (IPC 4)",
            "9.1",
            "56.8",
        ],
        ["sre2l++_fd2 (released)", "soft", "ResNet18", "4", "51.00 ± 0.50", "52.00 ± 0.50", "1234", "9.1", "56.8"],
    ]
    assert len({len(line) for line in run.table.splitlines()}) == 1


def test_the_document_says_data_teachers_and_conditions(run) -> None:
    text = (run.out / "report.md").read_text()
    assert text.startswith("# Dataset distillation on smooth\n")
    assert run.table in text
    assert "6 training images, 2 of each class; 6 test images. Chance is 33.33 %." in text
    assert "Equal in all rows: 30 epochs, seeds 0, 1, 2." in text
    teacher = next(line for line in text.splitlines() if line.startswith("| timm:test_resnet"))
    assert cells(teacher)[1:3] == ["50.00", "unknown"]
    for picture in ("accuracy.png", "grid.png"):
        assert f"]({picture})" in text
        assert (run.out / picture).is_file()


def test_the_json_holds_what_the_manifests_hold(run) -> None:
    found = json.loads((run.out / "table.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found["chance"] == pytest.approx(100 / CLASSES, abs=1e-4)
    assert [t["backbone_accuracy"] for t in found["teachers"]] == [50.0]
    assert found["dataset"]["id"] == run.dataset.id
    for row, metrics in zip(found["rows"], run.metrics, strict=True):
        for key in (
            "labels",
            "ipc",
            "student",
            "epochs",
            "seeds",
            "last",
            "best",
            "last_mean",
            "last_std",
            "top5_mean",
        ):
            assert row[key] == metrics.facts[key]
        assert row["metrics"] == metrics.id
        assert row["images"] == metrics.manifest["parents"]["images"]["id"]


def test_the_grid_shows_every_pixel_as_a_square(run) -> None:
    """Ids 0 to 2 of every set lie below each other by class and beside each other by id, and no fourth."""
    with Image.open(run.out / "grid.png") as picture:
        sheet = np.array(picture.convert("RGB"))
    times = round(112 / SIZE)
    at = {}
    for method, held in (("sre2l++_fd2", 4), ("random", 2)):
        for label in range(CLASSES):
            for image_id in range(held):
                found = np.argwhere((sheet == corner(method, label, image_id)).all(-1))
                if image_id == 3:
                    assert len(found) == 0
                    continue
                y, x = found.min(0)
                wanted = noise(method, label, image_id).transpose(1, 2, 0).repeat(times, 0).repeat(times, 1)
                np.testing.assert_array_equal(sheet[y : y + len(wanted), x : x + len(wanted)], wanted)
                at[method, label, image_id] = (int(y), int(x))
    tops = [at["random", label, 0][0] for label in range(CLASSES)]
    assert tops == sorted(tops)
    for (method, label, image_id), (y, x) in at.items():
        assert y == tops[label]
        assert x == at[method, 0, image_id][1]
    assert at["sre2l++_fd2", 0, 2][1] < at["random", 0, 0][1]


def test_pictures_are_not_blank(run) -> None:
    picture = np.array(Image.open(io.BytesIO((run.out / "accuracy.png").read_bytes())).convert("RGB"))
    colours = {tuple(c) for c in picture.reshape(-1, 3)}
    assert {(31, 119, 180), (255, 127, 14)} <= colours  # a bar for soft and one for hard labels


def test_the_same_report_again_is_the_same_bytes(run, tmp_path: Path) -> None:
    assert report.run(tmp_path, **run.given) == run.table
    names = sorted(p.name for p in run.out.iterdir())
    assert (
        names == ["accuracy.png", "grid.png", "report.md", "table.json"] == sorted(p.name for p in tmp_path.iterdir())
    )
    for name in names:
        assert (tmp_path / name).read_bytes() == (run.out / name).read_bytes()


def test_one_seed_has_no_spread_and_other_conditions_become_columns(run, tmp_path: Path) -> None:
    one = make_metrics(tmp_path / "m", run.dataset, run.images[0], [47.25], ipc=4, epochs=60)
    table = report.run(tmp_path / "report", **{**run.given, "metrics": [run.metrics[0], one]})
    header, _, first, second = (cells(line) for line in table.splitlines())
    assert header[:8] == ["method", "labels", "student", "IPC", "seeds", "epochs", "last epoch %", "best epoch %"]
    assert (first[4:6], second[4:6]) == (["0 1 2", "30"], ["0", "60"])
    assert second[6] == "47.25"
    assert "Equal in all rows" not in (tmp_path / "report/report.md").read_text()
    report.run(tmp_path / "report", **{**run.given, "metrics": [one]})
    text = (tmp_path / "report/report.md").read_text()
    assert "One seed for each row" in text
    assert "standard deviation" not in text


def test_names_are_shown_as_they_are(run, tmp_path: Path) -> None:
    """A dollar is no formula, a bar no new column, a long name is cut."""
    dataset = make_dataset(tmp_path / "dataset", 2, SIZE, per_class=1)
    dataset.manifest["classes"][:] = ["$\\frac{1$ and $", "a name far too long to stand beside a small picture"]
    images = make_images(tmp_path / "images", dataset, "random", 1)
    metrics = make_metrics(tmp_path / "metrics", dataset, images, [50.0], ipc=1)
    metrics.manifest["facts"]["student"] = "a|b"
    table = report.run(tmp_path / "r", dataset=dataset, teachers=[], images=[images], metrics=[metrics])
    assert "a\\|b" in table
    with Image.open(tmp_path / "r/grid.png") as picture:
        assert picture.width < 700


def test_large_images_are_made_smaller(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "dataset", 2, 224, per_class=1)
    with Image.open(io.BytesIO(report._grid(dataset, []))) as picture:
        assert picture.height < 2 * 130 + 100


def test_what_does_not_belong_together_is_refused(run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one metrics"):
        report.run(tmp_path / "r", **{**run.given, "metrics": []})
    with pytest.raises(UserError, match="tested images that are not among those given"):
        report.run(tmp_path / "r", **{**run.given, "images": run.images[:1]})
    with pytest.raises(UserError, match="holds a images artifact; wanted a teacher"):
        report.run(tmp_path / "r", **{**run.given, "teachers": run.images})
    again = make_dataset(tmp_path / "dataset", CLASSES, SIZE, per_class=2, seed=1)
    with pytest.raises(UserError, match="tested on another data set"):
        report.run(tmp_path / "r", **{**run.given, "dataset": again})
    other = make_dataset(tmp_path / "other", CLASSES + 1, SIZE)
    with pytest.raises(UserError, match="classes"):
        report.run(tmp_path / "r", **{**run.given, "dataset": other})
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("broken", ["_grid", "_bars"])
def test_a_picture_that_fails_leaves_the_table(run, tmp_path: Path, monkeypatch, caplog, broken) -> None:
    def fail(*_: object) -> bytes:
        raise RuntimeError("In FT2Font: Can not load face")

    name, other = {"_grid": ("grid.png", "accuracy.png"), "_bars": ("accuracy.png", "grid.png")}[broken]
    monkeypatch.setattr(report, broken, fail)
    assert report.run(tmp_path, **run.given) == run.table
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([other, "report.md", "table.json"])
    text = (tmp_path / "report.md").read_text()
    assert f"({name} could not be drawn)" in text
    assert f"]({other})" in text
    assert f"{name} is left out" in caplog.text
    assert (tmp_path / "table.json").read_bytes() == (run.out / "table.json").read_bytes()


def test_class_names_that_are_no_text_are_drawn(run, tmp_path: Path) -> None:
    names = [b"mes\xe2nge".decode("utf-8", "surrogateescape"), "\x1b[2J\n", "$\\alpha_{", "กา 🐦", "عصفور"]
    dataset = make_dataset(tmp_path / "dataset", len(names), SIZE, per_class=1)
    dataset.manifest["classes"][:] = names
    images = make_images(tmp_path / "images", dataset, "random", 1)
    metrics = make_metrics(tmp_path / "metrics", dataset, images, [50.0], ipc=1)
    metrics.manifest["facts"]["student"] = names[0]
    table = report.run(tmp_path / "r", dataset=dataset, teachers=[], images=[images], metrics=[metrics])
    assert r"mes\xe2nge" in table
    assert sorted(p.name for p in (tmp_path / "r").iterdir()) == ["accuracy.png", "grid.png", "report.md", "table.json"]
