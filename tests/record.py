"""Runs every method in a tiny form and keeps what comes out; as a program it records that anew for this environment.

With --missing it records only the rows that are not there yet, those of a new method.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

# before torch, as tests/conftest.py: one thread and no choice of kernels by time, both of which change bytes
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("FD2FAST_TUNE", "0")

import numpy as np
import torch
from distill_tools import OTHER, SMALL, make_teacher
from numpy.typing import NDArray
from safetensors.numpy import load_file

from fd2fast.artifacts import Dataset, Labels, Patches, TeacherArtifact, read_json
from fd2fast.data.distilled import load_images
from fd2fast.data.pixels import read_image
from fd2fast.data.prepare import prepare
from fd2fast.data.views import PER_EPOCH
from fd2fast.entries import HARD, parse_entry
from fd2fast.methods import BASELINES, METHODS, SEMANTICS, patch_factor, takes_committee
from fd2fast.settings.config import (
    DataConfig,
    DistillConfig,
    EvaluateConfig,
    PatchesConfig,
    PretrainConfig,
    RelabelConfig,
)
from fd2fast.stages import distill, evaluate, patches, pretrain, relabel
from fd2fast.step import TERMS
from fd2fast.system import isa

RECORDED = Path(__file__).parent / "data" / "recorded.json"
PRECISIONS = ("fp32", "bf16")
CLASSES, SIZE, IPC, EPOCHS = 4, 32, 2, 3
DIGITS = 7  # of the recorded numbers


def _rows() -> Iterator[str]:
    for method in BASELINES:
        yield method
        if method in HARD:
            yield f"{method}:soft"
    for method in METHODS:
        for semantics in SEMANTICS:
            yield f"{method} {semantics}"


# The stages before the methods, then every method: METHOD[:LABELS] [SEMANTICS].
FIRST = ("typefaces", "pretrain", "patches")
ROWS = (*FIRST, *_rows())

# What is kept of a row: of each array a hash and its projections, or its numbers.
Outcome = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Environment:
    """What the bytes of a result depend on besides the code."""

    precision: str
    torch: str
    # Kernels of torch, oneDNN and the extensions, as fd2fast.system.isa counts them.
    capability: str
    onednn: int
    own: int
    # Libraries choose algorithms by vendor and caches.
    processor: str
    # Draws the glyphs.
    pillow: str
    matplotlib: str

    def unlike(self, other: Environment) -> tuple[int, ...]:
        """How far apart for the choice of the nearest record; the most important first."""
        levels = abs(self.onednn - other.onednn) + abs(self.own - other.own) + (self.capability != other.capability)
        rest = ("torch", "processor", "pillow", "matplotlib")
        return levels, *(int(getattr(self, name) != getattr(other, name)) for name in rest)


def environment(precision: str) -> Environment:
    found = isa.detect()
    return Environment(
        precision,
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        found.onednn,
        found.own,
        _processor(),
        version("pillow"),
        version("matplotlib"),
    )


def _processor() -> str:
    """Vendor, family and model; empty where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return ""
    named = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return " ".join(named.get(name, "") for name in ("vendor_id", "cpu family", "model"))


def reason_against(precision: str) -> str | None:
    """Why this precision is not run here."""
    if precision == "bf16" and isa.detect().level < 5:
        return "bf16 is emulated here"
    return None


@dataclass(frozen=True)
class Material:
    """What all methods share. The teachers have random weights, which no instruction set changes by training."""

    dataset: Dataset
    teachers: list[TeacherArtifact]
    patches: dict[int, Patches]  # by factor


@contextmanager
def no_pictures() -> Iterator[None]:
    """Half of the time would go to them, and they are no results."""
    with ExitStack() as stack:
        for stage in (distill, evaluate, patches, pretrain):
            stack.enter_context(mock.patch.object(stage, "picture", return_value=False))
        yield


def make_material(folder: Path) -> Material:
    config = DataConfig("typefaces", size=SIZE, classes=CLASSES, train_per_class=8, test_per_class=8)
    dataset = prepare(config, folder / "dataset")
    teachers = [
        make_teacher(folder / "first", dataset),
        make_teacher(folder / "second", dataset, f"{OTHER},output_stride=8", seed=1, alpha=0.7, accuracy=57.0),
    ]
    cut = {
        factor: patches.run(
            PatchesConfig(factor=factor, per_class=IPC, crops=2, pool=8, device="cpu"),
            folder / f"patches{factor}",
            dataset,
            teachers[0],
        )
        for factor in (1, 2)
    }
    return Material(dataset, teachers, cut)


def distill_config(method: str, semantics: str, precision: str) -> DistillConfig:
    """Few iterations, two segments in a step, sizes that change, images 1 kept away from images 0."""
    given: dict[str, Any] = {"iterations": (5,)}
    if method.startswith("fadrm"):
        given = {"iterations": (2,) * 4, "sizes": (24, SIZE) * 2}
    elif semantics == "released":
        given["lr"] = 0.1  # the released 0.001 would not move one of 256 levels in five iterations
    if method in BASELINES:
        given = {}
    return DistillConfig(
        method, semantics, ipc=IPC, segment_size=2, segments_per_step=2, precision=precision, device="cpu", **given
    )


def run_row(name: str, material: Material, folder: Path, precision: str) -> Outcome:
    """One of ROWS from the shared material, below `folder`."""
    if name == "typefaces":
        return {n: _array(np.load(material.dataset.file(f"{n}_images.npy"))) for n in ("train", "test")}
    if name == "patches":
        return {f"factor {factor}": _array(_pixels(cut)) for factor, cut in material.patches.items()}
    if name == "pretrain":
        settings = PretrainConfig(SMALL, attention_maps=2, epochs=1, batch_size=8, precision=precision, device="cpu")
        return {"weights": _weights(pretrain.run(settings, folder / "teacher", material.dataset).weights)}

    text, _, semantics = name.partition(" ")
    entry = parse_entry(text)
    teachers = material.teachers if takes_committee(entry.method) else material.teachers[:1]
    factor = patch_factor(entry.method)
    images = distill.run(
        distill_config(entry.method, semantics or "paper", precision),
        folder / "images",
        material.dataset,
        teachers,
        material.patches[factor] if factor else None,
    )
    outcome: Outcome = {"images": _array(load_images(images)[0])}
    if entry.method in METHODS:
        segments = read_json(images.file("losses.json"))["segments"].values()
        outcome["terms"] = {"numbers": _rounded([np.mean([s[term] for s in segments]) for term in TERMS])}
    labels = None
    if entry.labels == "soft":
        labels = relabel.run(RelabelConfig(epochs=EPOCHS, device="cpu"), folder / "labels", images, teachers)
        outcome["logits"] = _array(np.load(labels.file(Labels.LOGITS)))
        views = [np.load(labels.file(Labels.view_name(name))).ravel().astype(np.float64) for name in PER_EPOCH]
        outcome["views"] = _array(np.concatenate(views), 16)
    # random teachers are unsure: at the usual temperature of 20 the losses would have three digits
    settings = EvaluateConfig(
        SMALL,
        labels=entry.labels,
        epochs=EPOCHS,
        seeds=(0,),
        eval_every=1,
        temperature=1.0,
        precision=precision,
        device="cpu",
    )
    metrics = evaluate.run(settings, folder / "metrics", material.dataset, images, labels)
    found = read_json(metrics.file("metrics.json"))["0"]
    outcome["student"] = _weights(metrics.file("students/0.safetensors"))
    outcome["losses"] = {"numbers": _rounded(found["losses"])}
    outcome["accuracies"] = {"numbers": [test["top1"] for test in found["tests"]]}
    return outcome


def _pixels(cut: Patches) -> NDArray[np.uint8]:
    """All initial images uint8 [n, 3, S, S], in the order of their names."""
    names = sorted(name for name in cut.manifest["files"] if name.startswith("images/"))
    return np.stack([read_image(cut.file(name)).numpy() for name in names])


def _weights(path: Path) -> dict[str, Any]:
    tensors = load_file(path)
    return _array(np.concatenate([tensors[name].ravel().astype(np.float64) for name in sorted(tensors)]), 16)


def _array(values: NDArray[Any], count: int = 64) -> dict[str, Any]:
    digest = hashlib.sha256(f"{values.dtype.str} {values.shape} ".encode() + np.ascontiguousarray(values).tobytes())
    return {"sha256": digest.hexdigest(), "projections": _rounded(projections(values, count))}


def projections(values: NDArray[Any], count: int) -> NDArray[np.float64]:
    """Products with `count` fixed vectors of signs, in fp64: their relative distance is about that of the arrays.

    Bytes are taken from -127.5 to 127.5.
    """
    flat = values.ravel().astype(np.float64) - (127.5 if values.dtype == np.uint8 else 0)
    width = -(-len(flat) // 8)
    bits = np.frombuffer(hashlib.shake_256(b"projections").digest(count * width), np.uint8).reshape(count, width)
    signs = np.unpackbits(bits, axis=1)[:, : len(flat)] * 2.0 - 1
    return signs @ flat / np.sqrt(len(flat))


def _rounded(values: Sequence[Any] | NDArray[Any]) -> list[float]:
    return [float(f"{float(v):.{DIGITS}g}") for v in values]


def load_records(path: Path = RECORDED) -> dict[Environment, dict[str, Outcome]]:
    records = json.loads(path.read_text()) if path.is_file() else []
    return {Environment(**record["environment"]): record["rows"] for record in records}


def save_records(records: Mapping[Environment, Mapping[str, Outcome]], path: Path = RECORDED) -> None:
    """One line for each row."""
    texts = []
    for key in sorted(records, key=lambda e: list(asdict(e).values()), reverse=True):
        rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(row)}" for name, row in records[key].items())
        texts.append(f'{{"environment": {json.dumps(asdict(key))},\n"rows": {{\n{rows}}}}}')
    path.write_text("[\n" + ",\n".join(texts) + "\n]\n")


def run_all(precision: str, names: Sequence[str] = ROWS) -> dict[str, Outcome]:
    torch.set_num_threads(1)
    with no_pictures(), tempfile.TemporaryDirectory() as folder:
        material = make_material(Path(folder))
        return {name: run_row(name, material, Path(folder) / str(n), precision) for n, name in enumerate(names)}


def main() -> None:
    os.environ.setdefault("FD2FAST_PROGRESS", "0")
    arguments = [argument for argument in sys.argv[1:] if argument != "--missing"]
    path = Path(arguments[0]) if arguments else RECORDED
    for precision in PRECISIONS:
        if reason := reason_against(precision):
            print(f"{precision}: {reason}")
            continue
        records = load_records(path)
        here = environment(precision)
        before = records.get(here, {})
        names = [name for name in ROWS if name not in before or "--missing" not in sys.argv]
        rows = run_all(precision, names)
        changed = [name for name in rows if rows[name] != before.get(name)]
        whole = {**before, **rows}
        save_records({**records, here: {name: whole[name] for name in ROWS}}, path)
        print(f"{here}: {len(changed)} of {len(rows)} rows changed: {', '.join(changed)}")


if __name__ == "__main__":
    main()
