"""Every stage on classes whose names are no text: its pictures are there, or left out, and its results are the same."""

import errno
import logging
from pathlib import Path

import numpy as np
import pytest
from model_tools import TINY
from PIL import Image

from fd2fast import pictures
from fd2fast.artifacts import Artifact
from fd2fast.data.prepare import describe, prepare
from fd2fast.settings.config import (
    DataConfig,
    DistillConfig,
    EvaluateConfig,
    PatchesConfig,
    PretrainConfig,
    RelabelConfig,
)
from fd2fast.stages import distill, evaluate, patches, pretrain, relabel, report

NAMES = (b"caf\xe9 moineau", b"$\\frac{a}{_b^", b"\x1b[31mred\x07", b"\xf0\x9f\x90\xa6 \xe0\xb8\x99\xe0\xb8\x81")
OVERVIEWS = {"preview.png", "attention.png", "curves.png", "losses.png", "grid.png", "accuracy.png"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("names") / "data"
    random = np.random.default_rng(0)
    for split, count in (("train", 4), ("test", 1)):
        for raw in NAMES:
            folder = root / split / raw.decode("utf-8", "surrogateescape")
            try:
                folder.mkdir(parents=True)
            except OSError as error:
                if error.errno in (errno.EILSEQ, errno.EINVAL):
                    pytest.skip("this file system only takes names in UTF-8")
                raise
            for n in range(count):
                Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{n}.png")
    return root


def everything(tree: Path, out: Path) -> tuple[list[Artifact], str]:
    """All stages, tiny; their artifacts and the table."""
    dataset = prepare(DataConfig(dataset="folder", root=tree, size=32), out / "dataset")
    settings = PretrainConfig(model=TINY, attention_maps=2, alpha=0.4, epochs=1, batch_size=8, precision="fp32")
    teacher = pretrain.run(settings, out / "teacher", dataset)
    cut = patches.run(PatchesConfig(factor=2, per_class=1, crops=2), out / "patches", dataset, teacher)
    tiny = DistillConfig(ipc=1, iterations=(2,), precision="fp32")
    images = distill.run(tiny, out / "images", dataset, [teacher], cut)
    labels = relabel.run(RelabelConfig(epochs=1), out / "labels", images, [teacher])
    student = EvaluateConfig(model="timm:test_convnext", seeds=(0,), precision="fp32", accumulation=1)
    metrics = evaluate.run(student, out / "metrics", dataset, images, labels)
    made = [dataset, teacher, cut, images, labels, metrics]
    return made, report.run(out / "report", dataset=dataset, teachers=[teacher], images=[images], metrics=[metrics])


def results(made: list[Artifact]) -> list[dict[str, str]]:
    """The hashes of all files that are no overview; labels and metrics name their parents' identities nowhere else."""
    return [{name: sha for name, sha in one.manifest["files"].items() if name not in OVERVIEWS} for one in made]


def test_pictures_are_drawn_or_left_out_and_the_results_are_the_same(tree, tmp_path, monkeypatch, caplog):
    with caplog.at_level(logging.WARNING, logger="fd2fast"):
        made, table = everything(tree, tmp_path / "drawn")
    assert "left out" not in caplog.text
    found = {p.name for p in (tmp_path / "drawn").rglob("*.png")} & OVERVIEWS
    assert found == OVERVIEWS
    told = describe(made[0])
    assert r"caf\xe9 moineau" in told
    assert "\x1b" not in told
    told.encode()

    def full(path: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(pictures, "write_bytes", full)
    with caplog.at_level(logging.WARNING, logger="fd2fast"):
        again, without = everything(tree, tmp_path / "left out")
    assert caplog.text.count("is left out") == 10
    assert not {p.name for p in (tmp_path / "left out").rglob("*.png")} & OVERVIEWS
    assert results(again) == results(made)
    assert without.splitlines()[0] == table.splitlines()[0]
    for artifact in again:
        artifact.verify()
