"""A finished result: its manifest, read and checked, and its files, compared with it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar, overload

from fd2fast.artifacts.facts import Facts
from fd2fast.artifacts.files import read_json
from fd2fast.artifacts.folder import MANIFEST, STATE
from fd2fast.artifacts.identity import identity_digest
from fd2fast.errors import UserError
from fd2fast.settings.ranges import damage
from fd2fast.system import lock
from fd2fast.system.sources import file_digest, known_digest

SCHEMA = 1

A = TypeVar("A", bound="Artifact")


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A finished stage result. `manifest` holds kind, id, config, parents, files, classes, size, mean, std, facts, measured.

    A subclass with a KIND of its own is what results of that kind are read as; it owns the names of their files.
    """

    path: Path
    manifest: dict[str, Any]

    KIND: ClassVar[str] = ""
    # with its article, for messages
    NOUN: ClassVar[str] = "an artifact"

    def __init_subclass__(cls) -> None:
        _kinds[cls.KIND] = cls

    @classmethod
    def load(cls, path: Path | str) -> Self:
        """Read a finished artifact of this kind; UserError as fd2fast.artifacts.load raises it."""
        return load(path, cls)

    @classmethod
    def of(cls, artifact: Artifact) -> Self:
        """The artifact as one of this kind; UserError for another kind."""
        if artifact.kind != cls.KIND:
            raise UserError(f"{artifact.path} holds a {artifact.kind} artifact; wanted {cls.NOUN}")
        return artifact if isinstance(artifact, cls) else cls(artifact.path, artifact.manifest)

    @property
    def kind(self) -> str:
        return self.manifest["kind"]

    @property
    def id(self) -> str:
        """Hash of the config, the parents and every file: equal ids mean equal bytes."""
        return self.manifest["id"]

    @property
    def config(self) -> dict[str, Any]:
        return self.manifest["config"]

    @property
    def classes(self) -> list[str]:
        """Class names; the index is the label."""
        return self.manifest["classes"]

    @property
    def size(self) -> int:
        """Side of the images, pixels."""
        return self.manifest["size"]

    @property
    def mean(self) -> tuple[float, ...]:
        return tuple(self.manifest["mean"])

    @property
    def std(self) -> tuple[float, ...]:
        return tuple(self.manifest["std"])

    @property
    def facts(self) -> Facts:
        """What the stage wants its readers to know (accuracies, counts, names)."""
        return Facts.read(self.manifest["facts"], f"{self.kind} {self.path}")

    @property
    def measured(self) -> dict[str, Any]:
        """Seconds, peak memory and machine: not part of the identity."""
        return self.manifest["measured"]

    @property
    def seconds(self) -> float:
        """What it took to make, wall-clock time."""
        return self.manifest["measured"]["seconds"]

    def parent_id(self, name: str) -> str | None:
        """The id of the artifact that it was made from under this name; None where it names none."""
        parent = self.manifest["parents"].get(name)
        return None if parent is None else parent["id"]

    def file(self, name: str) -> Path:
        """Path of one of its files; UserError if the manifest does not list it or it is gone."""
        if name not in self.manifest["files"]:
            raise UserError(
                f"{self.kind} artifact {self.path} has no file {name!r}: it holds {sorted(self.manifest['files'])[:8]}"
            )
        path = self.path / name
        if not path.is_file():
            raise UserError(f"{path} is listed in its manifest but missing: make the {self.kind} again")
        return path

    def verify(self) -> None:
        """Compare every file with the manifest's hash; UserError names the first that differs."""
        for name, expected in self.manifest["files"].items():
            if file_digest(self.file(name)) != expected:
                raise UserError(
                    f"{self.path / name} was changed after it was made (its sha256 differs from the manifest)"
                )

    def unchanged(self) -> None:
        """UserError that names the first file, of those that other stages read, that is not the one the manifest lists.

        Each is hashed once by a process as long as its stamp stays. Pictures and curves for people, and files that are missing
        (which is an error where they are read), are passed over.
        """
        for name, expected in self.manifest["files"].items():
            if "/" not in name and name.endswith((".png", ".json")):
                continue
            path = self.path / name
            try:
                found = known_digest(path)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
            if found != expected:
                raise UserError(
                    f"{path} was changed after it was made (its sha256 differs from the manifest): put it back, "
                    f"or make the {self.kind} again with --overwrite"
                )

    def must_fit(self, other: Artifact) -> None:
        """UserError unless both speak of the same classes in the same order, the same size and normalisation."""
        for name, mine, theirs in (
            ("classes", self.classes, other.classes),
            ("image size", self.size, other.size),
            ("mean", list(self.mean), list(other.mean)),
            ("std", list(self.std), list(other.std)),
        ):
            if mine != theirs:
                raise UserError(
                    f"{self.kind} artifact {self.path} does not fit {other.kind} artifact {other.path}: "
                    f"{name} {_difference(mine, theirs)}"
                )

    def must_be_of(self, dataset: Artifact) -> None:
        """UserError unless it fits the data set and, where it knows what data set it was made from, was made from this one."""
        self.must_fit(dataset)
        made_from = self.parent_id(dataset.kind)
        if made_from not in (None, dataset.id):
            raise UserError(
                f"{self.kind} artifact {self.path} was made from another data set ({made_from[:12]}) than "
                f"{dataset.path} ({dataset.id[:12]})"
            )


# Kind -> how its results are read.
_kinds: dict[str, type[Artifact]] = {}


def _difference(mine: Any, theirs: Any) -> str:
    if isinstance(mine, list) and isinstance(theirs, list):
        if len(mine) != len(theirs):
            return f"{len(mine)} against {len(theirs)} entries"
        at = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
        return f"differ at index {at}: {mine[at]!r} against {theirs[at]!r}"
    return f"{mine!r} against {theirs!r}"


@overload
def load(path: Path | str, kind: type[A]) -> A: ...
@overload
def load(path: Path | str, kind: str | None = None) -> Artifact: ...
def load(path: Path | str, kind: str | type[Artifact] | None = None) -> Artifact:
    """Read a finished artifact; UserError if it is missing, unfinished, of another kind or from a newer version."""
    if isinstance(kind, type):
        return load(path, kind.KIND)
    path = Path(path)
    file = path / MANIFEST
    if not os.path.isdir(path):  # which takes names of any length
        raise UserError(f"{path} does not exist; wanted the folder of a {kind or 'stage'} artifact")
    if not os.path.isfile(file):
        state = "an unfinished one: run its command again" if (path / STATE).exists() else "it has no manifest.json"
        if maker := lock.in_use_by(path):
            state = f"it is being made by {maker}"
        raise UserError(f"{path} is not a finished {kind or 'stage'} artifact ({state})")
    manifest = read_json(file, "a manifest", f"make the {kind or 'artifact'} again")
    try:
        schema, found = manifest["schema"], manifest["kind"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} is not a manifest of fd2fast: {error}") from error
    if schema != SCHEMA:
        raise UserError(f"{file} has manifest version {schema}, this fd2fast reads {SCHEMA}")
    if fault := _manifest_fault(manifest):
        raise UserError(f"{file} is damaged: {fault}; make the {found} again")
    if kind is not None and found != kind:
        raise UserError(f"{path} holds a {found} artifact; wanted a {kind} artifact")
    return result_of(path, manifest)


def result_of(path: Path, manifest: dict[str, Any]) -> Artifact:
    """A finished result as one of its kind."""
    return _kinds.get(manifest["kind"], Artifact)(path, manifest)


def kind_name(kind: type[Artifact] | str) -> str:
    """What manifests call a kind."""
    return kind if isinstance(kind, str) else kind.KIND


@dataclasses.dataclass
class _Measured:
    seconds: float


@dataclasses.dataclass
class _Manifest:
    """What readers of a manifest rely on; there may be more."""

    kind: str
    id: str
    config: dict[str, Any]
    parents: dict[str, dict[str, str]]
    files: dict[str, str]
    classes: tuple[str, ...]
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    facts: dict[str, Any]
    measured: _Measured


def _manifest_fault(manifest: dict[str, Any]) -> str:
    """What its readers would stumble over; empty for a sound manifest."""
    if damaged := damage(_Manifest, manifest):
        return damaged
    for name in manifest["files"]:
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            return f"files leads out of the folder ({name!r})"
    if not all("id" in parent for parent in manifest["parents"].values()):
        return "parents have no ids"
    if manifest["id"] != identity_digest(manifest):
        return "its id is not that of what it says, so it was changed after it was made"
    return ""
