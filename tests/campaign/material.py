"""A tiny data set and one small command for each stage, with the bytes that each makes when nothing disturbs it."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from . import forks, layer

CLASSES = ("ant", "bee", "fly")
MODEL = "timm:test_resnet"
RUN = f"""
methods = ["random", "sre2l++_fd2"]
teachers = ["{MODEL}"]
students = ["{MODEL}"]
ipc = [2]
[data]
classes = 2
size = 32
train_per_class = 4
test_per_class = 2
[pretrain]
epochs = 2
batch_size = 8
attention_maps = 2
device = "cpu"
[patches]
per_class = 2
crops = 2
pool = 4
[distill]
iterations = [4]
save_every = 2
group_size = 2
segments_per_step = 1
precision = "fp32"
[relabel]
epochs = 2
[evaluate]
seeds = [0]
eval_every = 1
"""


@dataclass(frozen=True)
class Stage:
    """A command without its output folder; `shared`: torchrun may run it; `within`: it works inside a copy of this folder."""

    name: str
    arguments: tuple[str, ...]
    shared: bool = False
    within: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, out: Path) -> list[str]:
        """Its arguments for this output."""
        if self.within is not None:
            return [*self.arguments, str(out / self.within.name)]
        return [*self.arguments, str(out / "result")]

    def begin(self, out: Path) -> None:
        """Make the folder that a trial works in."""
        if out.exists():
            shutil.rmtree(out)
        out.mkdir(parents=True)
        if self.within is not None:
            shutil.copytree(self.within, out / self.within.name)


@dataclass(frozen=True)
class Expected:
    """What an undisturbed run leaves (`found`), its file operations in order (kind and `layer.site`), and its seconds."""

    found: dict[str, str]
    operations: list[str]
    seconds: float


def draw_folder(root: Path, train: int = 4, test: int = 2, size: int = 24) -> None:
    """A folder data set of smooth random images, some JPEG and one grey."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("test", test)):
        for name in CLASSES:
            folder = root / split / name
            folder.mkdir(parents=True, exist_ok=True)
            for number in range(count):
                coarse = Image.fromarray((rng.random((4, 4, 3)) * 255).astype(np.uint8))
                image = coarse.resize((size, size), Image.Resampling.BILINEAR)
                if number == 0:
                    image = image.convert("L")
                image.save(folder / f"{number}.{'png' if number % 2 == 0 else 'jpg'}")


def stages(folder: Path) -> list[Stage]:
    """The commands, each reading the results of those before from FOLDER/made."""
    made, data = folder / "made", folder / "data"
    if not data.is_dir():
        draw_folder(data)
        (folder / "run.toml").write_text(RUN, encoding="utf-8")

    def at(name: str) -> str:
        return str(made / name / "result")

    cpu, one = ("--device", "cpu"), ("--dataset", at("datasets"))
    distill = ("distill", *one, "--ipc", "2", "--precision", "fp32", *cpu)
    small = ("--group-size", "2", "--segment-size", "2", "--segments-per-step", "1", "--iterations", "4")
    evaluate = ("evaluate", *one, "--images", at("distill"), "--soft-labels", at("relabel"), "--model", MODEL) + (
        "--seeds",
        "0",
        "1",
        "--eval-every",
        "1",
        *cpu,
        "--out",
    )
    return [
        Stage("datasets", ("datasets", "--dataset", "folder", "--root", str(data), "--size", "32", "--out")),
        Stage(
            "typefaces",
            ("datasets", "--classes", "2", "--size", "32", "--train-per-class", "3", "--test-per-class", "2", "--out"),
        ),
        Stage(
            "pretrain",
            ("pretrain", *one, "--model", MODEL, "--epochs", "2", "--batch-size", "8", "--attention-maps", "2")
            + ("--eval-every", "1", *cpu, "--out"),
        ),
        Stage(
            "patches",
            ("patches", *one, "--teacher", at("pretrain"), "--factor", "1", "--per-class", "2", "--crops", "2")
            + (*cpu, "--out"),
        ),
        Stage(
            "distill",
            (*distill, "--teachers", at("pretrain"), "--patches", at("patches"), *small, "--save-every", "2", "--out"),
            shared=True,
        ),
        Stage("random", (*distill, "--method", "random", "--out"), shared=True),
        Stage(
            "relabel",
            ("relabel", "--images", at("distill"), "--teachers", at("pretrain"), "--epochs", "3", *cpu, "--out"),
        ),
        Stage("evaluate", evaluate),
        # each student in a process of its own
        Stage("students", evaluate, environment={"OMP_NUM_THREADS": "2"}),
        Stage("run", ("run", "--config", str(folder / "run.toml"), "--out"), shared=True),
        Stage("report", ("report", "--run"), within=made / "run" / "result"),
        Stage("export", ("export", "--artifact", at("distill"), "--out")),
    ]


def found_below(folder: Path) -> dict[str, str]:
    """Every file with the hash of what must be the same in each run: manifests without times, of a report names and pictures.

    Logs of unexpected errors, which are meant to stay, are left out.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or path.match("fd2fast-error-*.log"):
            continue
        content = path.read_bytes()
        if path.name == "manifest.json":
            manifest = json.loads(content)
            content = json.dumps({k: v for k, v in manifest.items() if k not in ("measured", "places")}).encode()
        timed = path.parent.name == "report" and path.suffix in (".md", ".json")  # seconds of each stage
        if timed or path.name == "stamps.json":  # when its sources were changed
            content = b""
        found[name] = hashlib.sha256(content).hexdigest()[:16]
    return found


def difference(found: dict[str, str], wanted: dict[str, str]) -> str:
    """What is missing, too much or other; empty where nothing is."""
    parts = {
        "missing": sorted(wanted.keys() - found.keys()),
        "left over": sorted(found.keys() - wanted.keys()),
        "other bytes": sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name]),
    }
    return "; ".join(f"{what}: {', '.join(names[:4])} ({len(names)})" for what, names in parts.items() if names)


def prepare(folder: Path, only: str = "") -> tuple[list[Stage], dict[str, Expected]]:
    """Every stage run undisturbed, in order, in FOLDER/made; kept there as long as the sources of fd2fast stay.

    only: a stage, for which just those before it are run too. Raises RuntimeError where a command fails.
    """
    forks.load()
    chosen = stages(folder)
    names = [stage.name for stage in chosen]
    if only in names:
        chosen = chosen[: names.index(only) + 1]
    record, now = folder / "expected.json", sources()
    known = json.loads(record.read_text()) if record.is_file() else {}
    if known.get("sources") != now:
        known = {"sources": now}
    for stage in chosen:
        if stage.name in known:
            continue
        out, counted = folder / "made" / stage.name, folder / "counted"
        stage.begin(out)
        counted.unlink(missing_ok=True)
        ended = forks.run(stage.command(out), before=layer.counter(out, counted), environment=stage.environment)
        if ended.code != 0:
            raise RuntimeError(f"{stage.name} failed undisturbed: {ended.errors}")
        known[stage.name] = asdict(Expected(found_below(out), counted.read_text().splitlines(), ended.seconds))
        record.write_text(json.dumps(known))
    return chosen, {stage.name: Expected(**known[stage.name]) for stage in chosen}


def sources() -> str:
    """A hash of fd2fast's code and of these commands."""
    import fd2fast

    files = sorted(Path(fd2fast.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in [*files, Path(__file__)])).hexdigest()
