"""Bring teachers in from, and take teachers and images out to, the released reference code and other programs."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from fd2fast.artifacts import (
    Artifact,
    Dataset,
    Images,
    TeacherArtifact,
    TeacherFacts,
    atomic_path,
    file_digest,
    load,
    open_stage,
)
from fd2fast.errors import UserError
from fd2fast.models.released_checkpoints import export_teacher, import_checkpoint
from fd2fast.models.teacher import Teacher
from fd2fast.system.lock import OURS, TEMPORARY, own, released_at_end
from fd2fast.system.sources import of_file


@dataclass(frozen=True)
class ImportConfig:
    """What an imported teacher is a function of."""

    checkpoint: Path = field(metadata={"place": True})
    model: str | None


@released_at_end()
def import_teacher(
    checkpoint: Path | str, model: str | None, out: Path | str, dataset: Dataset, *, overwrite: bool = False
) -> TeacherArtifact:
    """A "teacher" artifact from a checkpoint of the reference, read without executing anything in it.

    Raises UserError for a missing or foreign file, for a teacher of another class count than the dataset artifact, and for a
    finished import of the same file under a name that told another alpha. A finished import of a file that is gone is taken
    with a warning.
    """
    checkpoint = Path(checkpoint)
    missing = f"{checkpoint} is missing; wanted a checkpoint of the reference, such as ResNet18_M8_5e-1cal.pth"
    source, teacher = of_file(str(checkpoint), missing), None
    notices: list[str] = []
    if os.path.exists(checkpoint):
        teacher, notices = import_checkpoint(checkpoint, size=dataset.size, model=model)
        if teacher.classes != len(dataset.classes):
            raise UserError(
                f"{checkpoint} is a teacher of {teacher.classes} classes, but {dataset.path} has {len(dataset.classes)}"
            )
    stage = open_stage(
        out,
        TeacherArtifact,
        ImportConfig(checkpoint, model),
        {"dataset": dataset},
        sources={"checkpoint": source},
        overwrite=overwrite,
    )
    if stage.finished:
        made = stage.finished.facts
        # the file's name is read, too
        if teacher is not None and made.alpha != teacher.alpha:
            raise UserError(
                f"{stage.path} holds this teacher imported with alpha {made.alpha}, the name {checkpoint.name} says "
                f"{teacher.alpha}: choose another output folder, or --overwrite to make it anew"
            )
        return stage.finished
    if teacher is None or of_file(str(checkpoint), missing).digest != source.digest:
        raise UserError(f"{checkpoint} changed while it was read: run the same command again")
    with atomic_path(stage.path / TeacherArtifact.WEIGHTS) as temporary:
        teacher.save(temporary)
    facts = TeacherFacts(
        model=teacher.name,
        attention_maps=teacher.attention_maps,
        alpha=teacher.alpha,
        channels=teacher.backbone.channels,
        backbone_accuracy=teacher.accuracy,
        cal_accuracy=None,
        notices=notices,
    )
    return stage.finish_like(dataset, facts)


def export_artifact(artifact: Artifact, out: Path | str, *, ipc: int | None = None) -> str:
    """Write a teacher as the reference's checkpoint, or images as an image folder (ids 0..ipc-1); says what was written.

    An export that was killed goes on. Raises UserError for other kinds of artifact, files changed after they were made, more
    images than there are, and a folder that holds other files.
    """
    out = Path(out)
    artifact.unchanged()
    if artifact.kind not in (TeacherArtifact.KIND, Images.KIND):
        raise UserError(f"{artifact.path} holds a {artifact.kind} artifact; a teacher or images can be exported")
    _must_be_a_target(out, artifact)
    if artifact.kind == TeacherArtifact.KIND:
        if ipc is not None:
            raise UserError(f"ipc is for images; {artifact.path} holds a teacher")
        teacher = Teacher.load(TeacherArtifact.of(artifact).weights)
        with own(out):
            return f"wrote {export_teacher(teacher, out)}"
    images = Images.of(artifact)
    available = images.per_class()
    count = available if ipc is None else ipc
    if not 1 <= count <= available:
        raise UserError(f"ipc must be 1 to {available}, all that {artifact.path} holds; got {count}")
    with own(out) as hold:
        if hold.fresh:
            for stale in out.rglob(f"{TEMPORARY}*"):
                stale.unlink(missing_ok=True)
        return f"wrote {_export_images(images, out, count)} images, {count} of each class, to {out}"


def _export_images(images: Images, out: Path, count: int) -> int:
    """Ids 0..count-1 of each class as a folder of images; their number."""
    names = [name for (_, image_id), name in sorted(images.image_names().items()) if image_id < count]
    wanted = {out / Path(name).relative_to(Images.FOLDER): name for name in names}
    there = {path for path in out.rglob("*") if not path.is_dir() and not path.name.startswith(OURS)}
    for path in sorted(there):
        if path not in wanted or not path.is_file() or file_digest(path) != images.manifest["files"][wanted[path]]:
            raise UserError(
                f"{out} holds files of something else ({path.name}); wanted an empty or new folder, or what an interrupted "
                "export of the same images left"
            )
    written: list[Path] = []
    try:
        for target in wanted.keys() - there:
            with atomic_path(target) as temporary:
                shutil.copyfile(images.file(wanted[target]), temporary)
            written.append(target)
    except BaseException:  # so that another command can be given
        _take_back(written, out)
        raise
    return len(wanted)


def _must_be_a_target(out: Path, artifact: Artifact) -> None:
    """UserError unless `out` is a folder, or can become one, that is no artifact and does not lie in one."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; wanted a folder to export to")
    if out.is_symlink() and not out.exists():
        raise UserError(f"{out} is a symbolic link to nothing; wanted a folder to export to")
    real = Path(os.path.realpath(out))
    source = Path(os.path.realpath(artifact.path))
    for folder in (real, *real.parents):
        if folder == source or _is_artifact(folder):
            where = "is" if folder == real else "lies in"
            raise UserError(f"{out} {where} the folder of an artifact ({folder}); export to a folder outside of it")


def _is_artifact(folder: Path) -> bool:
    try:
        load(folder)
    except UserError:
        return False
    return True


def _take_back(files: list[Path], out: Path) -> None:
    """Remove files that were written below `out`, and folders that are empty then."""
    with contextlib.suppress(OSError):
        for file in files:
            file.unlink(missing_ok=True)
        for folder in [path for path in out.iterdir() if path.is_dir()]:
            folder.rmdir()
