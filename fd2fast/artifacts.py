"""Stage results on disk: a folder with its files and a manifest.json, written atomically, resumable, checked when read."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
import platform
import resource
import shutil
import sys
import time
import weakref
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import numpy as np

from fd2fast import causes, lock
from fd2fast.errors import UserError
from fd2fast.sources import Source, compare, file_digest, known_digest, recorded_place

SCHEMA = 1
MANIFEST = "manifest.json"
STATE = "state"
# Beside the manifest, not part of the result: when its source files were last changed, so that they need not be read again.
STAMPS = "stamps.json"
# What a manifest says beside its identity.
_BESIDE = ("id", "places", "versions", "measured")
# how a damaged file of an unfinished stage is repaired
AGAIN = "remove it, and the same command does that part again"
BEGUN = "begun.json"
# There while an --overwrite removes a result: what is left of it then is none.
_CLEARING = f"{lock.OURS}clearing"

log = logging.getLogger(__name__)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors of the system while `path` is made, moved or removed come out as a UserError with the cause and what to do."""
    try:
        yield
    except Exception as error:
        if (told := causes.of_writing(Path(path), error)) is not None:
            raise told from error
        raise


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed onto it when the block ends well and removed when it does not.

    Raises UserError with the cause when the system refuses: a full disk (with the space left), a quota, a lost share ...
    """
    path = Path(path)
    lock.refuse_lost(path)
    temporary = path.with_name(f"{lock.TEMPORARY}{lock.process_name()}-{path.name}")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            _remove(temporary)
            raise


def sync_folder(path: Path) -> None:
    """Let the names in a folder reach the disk, so that a record written later cannot outlive what it vouches for.

    Nothing where the file system cannot sync folders.
    """
    with writing(path):
        try:
            folder = os.open(path, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM, errno.ENOSYS):
                raise


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a whole file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, keys in the order given."""
    write_bytes(path, (json.dumps(value, indent=1, default=_plain) + "\n").encode())


def write_npy(path: Path, array: np.ndarray) -> None:
    """Write a .npy file atomically."""
    array = np.asarray(array, order="C")
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        # not np.save: its tofile reports a full disk as an OSError without errno
        file.write(array.reshape(-1).view(np.uint8).data)


def new_array(path: Path, shape: tuple[int, ...], dtype: Any = np.uint8) -> np.memmap:
    """A mapped .npy file of zeros whose disk space is taken at once: a full disk is an error here, not a signal later."""
    array = np.lib.format.open_memmap(path, "w+", dtype, shape)
    if hasattr(os, "posix_fallocate"):
        with open(path, "rb+") as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    return array


def write_torch(path: Path, value: Any) -> None:
    """Write tensors and plain values (readable with weights_only=True) atomically."""
    import torch

    # through a file of Python's: torch's own hides why a write failed
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        torch.save(value, file)


def write_safetensors(path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write tensors as a .safetensors file atomically; equal tensors, equal bytes."""
    from safetensors.torch import save

    plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    write_bytes(path, save(plain, metadata=metadata))


@contextlib.contextmanager
def resumable(what: str) -> Iterator[None]:
    """Errors of taking up a saved state (`what`) that is not what this version saves come out as a UserError."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        if causes.explained(error) is not None:  # no memory to take it up, say
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{what} does not fit ({type(error).__name__}: {reason}): it was saved by another version or is damaged; "
            "--overwrite begins it anew"
        ) from error


def read_torch(path: Path) -> Any:
    """Read what write_torch wrote; a pickle with anything but tensors and plain values is refused."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {causes.of_reading(path, error)}") from error
    except MemoryError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{path} is not a file of tensors ({reason[:200]}); {AGAIN}") from error


def read_json(path: Path, what: str = "a record", repair: str = AGAIN) -> Any:
    """The value in a JSON file that fd2fast wrote; a UserError says that it is not `what`, and how to repair that."""
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {causes.of_reading(path, error)}") from error
    except (ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"{path} is not {what} of fd2fast ({reason}); {repair}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, tuple | set):
        return list(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    raise TypeError(f"{type(value).__name__} cannot be stored in a manifest")


def config_dict(config: Any) -> dict[str, Any]:
    """The fields of a config that decide the result.

    Left out are fields marked metadata={"result": False}, those that earlier versions did not know ({"added": True}) at their
    default, and the places of files ({"place": True}) where one is given: the content of what lies there decides.
    """
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.metadata.get("result", True)}
    for field in dataclasses.fields(config):
        added = field.metadata.get("added") and values[field.name] == field.default
        if added or (field.metadata.get("place") and values[field.name] is not None):
            del values[field.name]
    return json.loads(json.dumps(values, default=_plain))


def _places(config: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(config) if f.metadata.get("place")]


def _settings(config: Any, recorded: dict[str, Any]) -> dict[str, Any]:
    """Recorded settings as the config's class has them today: without places and their hashes, newer fields at their default."""
    fields = [f for f in dataclasses.fields(config) if f.metadata.get("result", True)]
    added = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    known = json.loads(json.dumps(added, default=_plain)) | recorded
    places = _places(config)
    return {name: value for name, value in known.items() if name.removesuffix("_sha256") not in places}


def digest(value: Any) -> str:
    """sha256 of a value's canonical JSON, 64 hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=_plain)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A finished stage result. `manifest` holds kind, id, config, parents, files, classes, size, mean, std, facts, measured."""

    path: Path
    manifest: dict[str, Any]

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
    def facts(self) -> dict[str, Any]:
        """What the stage wants its readers to know (accuracies, counts, names)."""
        return self.manifest["facts"]

    @property
    def measured(self) -> dict[str, Any]:
        """Seconds, peak memory and machine: not part of the identity."""
        return self.manifest["measured"]

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


def _difference(mine: Any, theirs: Any) -> str:
    if isinstance(mine, list) and isinstance(theirs, list):
        if len(mine) != len(theirs):
            return f"{len(mine)} against {len(theirs)} entries"
        at = next(i for i, (a, b) in enumerate(zip(mine, theirs, strict=True)) if a != b)
        return f"differ at index {at}: {mine[at]!r} against {theirs[at]!r}"
    return f"{mine!r} against {theirs!r}"


def load(path: Path | str, kind: str | None = None) -> Artifact:
    """Read a finished artifact; UserError if it is missing, unfinished, of another kind or from a newer version."""
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
    return Artifact(path, manifest)


def _manifest_fault(manifest: dict[str, Any]) -> str:
    """What its readers would stumble over; empty for a sound manifest."""
    kinds: dict[str, type] = {
        "kind": str, "id": str, "config": dict, "parents": dict, "files": dict, "classes": list,
        "size": int, "mean": list, "std": list, "facts": dict, "measured": dict,
    }  # fmt: skip
    for name, kind in kinds.items():
        if type(manifest.get(name)) is not kind:
            return f"{name} is {'missing' if name not in manifest else f'a {type(manifest[name]).__name__}'}"
    if not all(isinstance(name, str) for name in manifest["classes"]):
        return "classes are not all names"
    for name in ("mean", "std"):
        if not all(type(value) in (int, float) and math.isfinite(value) for value in manifest[name]):
            return f"{name} is not all finite numbers"
    for name in manifest["files"]:
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            return f"files leads out of the folder ({name!r})"
    if not all(
        isinstance(parent, dict) and isinstance(parent.get("id"), str) for parent in manifest["parents"].values()
    ):
        return "parents have no ids"
    if type(manifest["measured"].get("seconds")) not in (int, float):
        return "measured has no seconds"
    if manifest["id"] != identity_digest(manifest):
        return "its id is not that of what it says, so it was changed after it was made"
    return ""


def identity_digest(manifest: Mapping[str, Any]) -> str:
    """The id of a manifest: the hash of all of it that decides the result, of parents their ids."""
    parents = {name: parent["id"] for name, parent in manifest["parents"].items()}
    return digest({key: value for key, value in manifest.items() if key not in _BESIDE} | {"parents": parents})


def made(path: Path | str) -> bool:
    """Whether a finished artifact lies at `path`, of whatever settings."""
    return (Path(path) / MANIFEST).is_file()


def started(path: Path | str) -> bool:
    """Whether an artifact, finished or not, was begun at `path`."""
    return _known(Path(path)) is not None


def obstacle(path: Path | str, kind: str, config: Any) -> str | None:
    """Why an artifact of these settings cannot be begun, resumed or found finished at `path`; without its parents and sources.

    Looks only. What it says is what `open_stage` would raise.
    """
    path = Path(path)
    if not path.exists():
        return None
    if not path.is_dir():
        return f"{path} is a file; wanted a folder to write the {kind} to"
    if maker := lock.in_use_by(path):
        return f"{path} is in use by {maker}"
    known = _known(path)
    if (path / _CLEARING).exists():
        return None  # an interrupted --overwrite, which is completed
    try:
        if known is None:
            return _holds_foreign(path, kind) or None
        found = json.loads(known.read_text())
        difference = _other_result(found, kind, config)
    except OSError as error:
        return f"{known or path} cannot be read: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{known} is damaged ({error}); remove {path} and run again"
    return _holds_other(path, found, difference) if difference else None


class Stage:
    """The writing side of an artifact. Made by `open_stage`.

    `finished` is the artifact when an equal run ended before; then there is nothing to do. Otherwise write files below
    `path` (atomically, with the helpers of this module), what resuming needs below `state`, and call `finish`.
    `inputs`: digests of what is read from outside, by name.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        config: dict[str, Any],
        parents: dict[str, dict[str, str]],
        inputs: dict[str, str] | None = None,
        places: dict[str, str] | None = None,
        *,
        hold: lock.Hold | None = None,
        parent_folders: Mapping[str, Path] | None = None,
    ):
        """hold: the claim on `path`, released with this object."""
        self.path = path
        self.kind = kind
        self.state = path / STATE
        self.finished: Artifact | None = None
        self._config = config
        self._parents = parents
        self.inputs = inputs or {}
        self._places = places or {}
        self._parent_folders = dict(parent_folders or {})
        self._hold = hold
        self._begun_as = _sign(self.state / BEGUN)
        if hold is not None:
            weakref.finalize(self, hold.release)
        self._started = time.monotonic()
        self._before = 0.0

    def finish(
        self,
        *,
        classes: list[str],
        size: int,
        mean: tuple[float, ...] | list[float],
        std: tuple[float, ...] | list[float],
        facts: Mapping[str, Any] | None = None,
        measured: Mapping[str, Any] | None = None,
    ) -> Artifact:
        """Hash every file, write the manifest, drop the resume state and the claim on the folder.

        After a power cut the manifest is there, or what resuming needs. Raises UserError where another process has taken the
        folder over, and where a parent was made anew meanwhile.
        """
        self._still_owned()
        for name, folder in self._parent_folders.items():
            _not_made_anew(name, folder, self._parents[name]["id"])
        files = {
            p.relative_to(self.path).as_posix(): file_digest(p)
            for p in sorted(self.path.rglob("*"))
            if p.is_file()
            and self.state not in p.parents
            and p.name not in (MANIFEST, STAMPS)
            and not p.name.startswith(lock.OURS)
        }
        found = {
            "schema": SCHEMA,
            "kind": self.kind,
            "config": self._config,
            "config_hash": digest(self._config),
            "parents": self._parents,
            **({"inputs": self.inputs} if self.inputs else {}),
            "classes": list(classes),
            "size": int(size),
            "mean": [float(v) for v in mean],
            "std": [float(v) for v in std],
            "facts": dict(facts or {}),
            "files": files,
        }
        identity = json.loads(json.dumps(found, default=_plain))  # as who reads it hashes it
        manifest = {
            "id": identity_digest(identity),
            **identity,
            **({"places": self._places} if self._places else {}),
            "versions": _versions(),
            "measured": {
                "seconds": round(self._before + time.monotonic() - self._started, 3),
                "peak_memory_bytes": _peak_memory(),
                "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                **dict(measured or {}),
            },
        }
        for folder in sorted({(self.path / name).parent for name in files} | {self.path}):
            sync_folder(folder)
        self._still_owned()
        write_json(self.path / MANIFEST, manifest)
        sync_folder(self.path)
        shutil.rmtree(self.state, ignore_errors=True)
        self.release()
        return Artifact(self.path, json.loads(json.dumps(manifest, default=_plain)))

    def release(self) -> None:
        """Give up the claim on the folder; what was written stays."""
        if self._hold is not None:
            self._hold.release()

    def _still_owned(self) -> None:
        # a lock that was gone vouches for nothing: then the mark of the beginning must be the same file
        if self._hold is not None and not self._hold.check() and _sign(self.state / BEGUN) != self._begun_as:
            raise UserError(f"{self.path} was removed or made by another process while this one wrote to it")

    def checkpoint(self, name: str, value: Any) -> None:
        """Save resume state (tensors and plain values) and the seconds spent so far."""
        self._still_owned()
        write_torch(self.state / name, value)
        sync_folder((self.state / name).parent)
        write_json(self.state / "seconds.json", self._before + time.monotonic() - self._started)

    def restore(self, name: str) -> Any | None:
        """The state that `checkpoint` saved, or None on a first run."""
        path = self.state / name
        return read_torch(path) if path.is_file() else None


def open_stage(
    path: Path | str,
    kind: str,
    config: Any,
    parents: Mapping[str, Artifact],
    *,
    sources: Mapping[str, Source] | None = None,
    overwrite: bool = False,
) -> Stage:
    """Begin, resume or find finished the artifact of `kind` at `path`.

    sources: what the stage reads beside its parents, by the config's field that names its place.
    A folder that holds another result (other settings, other parents or sources, other kind) or foreign files is refused with the
    difference, unless `overwrite` (which removes an fd2fast artifact, never foreign files). So are parents with changed files
    and, with `overwrite` too, sources that cannot be read. The folder belongs to this process until the stage is finished or
    released or its object ends; UserError while another process has it.
    """
    path = Path(path)
    for parent in parents.values():
        parent.unchanged()
    wanted = _Wanted(kind, config, parents, sources or {})
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; wanted a folder to write the {kind} to")
    _foreign(path, kind)
    if _known(path) is None or overwrite:
        wanted.must_be_there()
    if not overwrite and (path / MANIFEST).is_file() and not (path / _CLEARING).exists():
        try:
            return _found_finished(path, wanted)  # without a lock: who only reads needs none
        except (FileNotFoundError, UserError):
            if (path / MANIFEST).is_file():
                raise  # else it was cleared in this moment, and its owner is named below
    hold = lock.take(path)
    try:
        return _begin(path, wanted, {name: parent.path for name, parent in parents.items()}, hold, overwrite)
    except BaseException:
        hold.release()
        raise


def _begin(path: Path, wanted: _Wanted, parent_folders: dict[str, Path], hold: lock.Hold, overwrite: bool) -> Stage:
    """The stage in a folder that this process owns."""
    begun, manifest = path / STATE / BEGUN, path / MANIFEST
    cleared = hold.fresh and (path / _CLEARING).exists()
    if (overwrite or cleared) and _known(path) is not None:
        wanted.must_be_there()
        lock.refuse_below_running(path)
        with writing(path):
            _clear(path)
    _foreign(path, wanted.kind)
    if hold.fresh:  # nobody else writes here
        for stale in path.rglob(f"{lock.TEMPORARY}*"):
            _remove(stale)
    if manifest.is_file():
        hold.release()
        return _found_finished(path, wanted)
    if begun.is_file():
        wanted.must_be_of(begun, path)
    wanted.write(begun)
    stage = wanted.stage(path, hold, parent_folders)
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):  # an unknown time is none
        stage._before = float(json.loads((stage.state / "seconds.json").read_text()))
    return stage


class _Wanted:
    """What a result is to be a function of; `inputs`, digests of what is read from outside, are part of it, `places` are not."""

    def __init__(self, kind: str, config: Any, parents: Mapping[str, Artifact], sources: Mapping[str, Source]):
        self.kind, self._config, self._sources = kind, config, sources
        self.settings = {name: value for name, value in config_dict(config).items() if name not in sources}
        self.parents = {name: {"kind": parent.kind, "id": parent.id} for name, parent in parents.items()}
        self.inputs = {name: source.digest for name, source in sources.items() if source.digest is not None}
        self.places = {name: recorded_place(source.place) for name, source in sources.items()}

    def stage(
        self, path: Path, hold: lock.Hold | None = None, parent_folders: Mapping[str, Path] | None = None
    ) -> Stage:
        """The writing side of this result in the folder `path`."""
        return Stage(
            path,
            self.kind,
            self.settings,
            self.parents,
            self.inputs,
            self.places,
            hold=hold,
            parent_folders=parent_folders,
        )

    def must_be_there(self) -> None:
        """UserError for a source that cannot be read."""
        for source in self._sources.values():
            if source.digest is None:
                raise UserError(source.gone)

    def write(self, begun: Path) -> None:
        """Say in the file `begun` what is being made, unless that stands there already."""
        beginning = {"kind": self.kind, "config": self.settings, "parents": self.parents, "inputs": self.inputs}
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if (json.loads(begun.read_text()).get("inputs") or {}) == self.inputs:
                return
        write_json(begun, {**beginning, "places": self.places})
        for folder in Path(os.path.abspath(begun)).parents[:3]:  # its own, the artifact's, and that one's
            sync_folder(folder)

    def must_be_of(self, known: Path, path: Path) -> None:
        """UserError with the difference unless `known`, manifest or beginning of the result at `path`, tells of this one."""
        found = read_json(known, repair=f"remove {path} and run again")
        try:
            difference = _other_result(found, self.kind, self._config, self.parents)
            names = dict.fromkeys([*_places(self._config), *self._sources])
            finished = known.name == MANIFEST
            other, notes = ("", []) if difference else compare(found, self._sources, names, finished=finished)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{known} is damaged ({error}); remove {path} and run again") from error
        if difference:
            raise UserError(_holds_other(path, found, difference))
        if other:
            raise UserError(
                f"{path} holds a {found['kind']} that was made from something else: {other}; "
                "put that back, choose another output folder, or --overwrite to make it anew"
            )
        for note in notes:
            _say_once(f"{path}: {note}")


def _holds_other(path: Path, found: dict[str, Any], difference: str) -> str:
    return (
        f"{path} holds a {found['kind']} made with other settings: {difference}; "
        "choose another output folder, or --overwrite to make it anew"
    )


def _other_result(
    found: dict[str, Any], kind: str, config: Any, parents: dict[str, dict[str, str]] | None = None
) -> str:
    """The first difference in kind, settings or parents (None: whichever they are), "" if there is none."""
    recorded = {"kind": found["kind"], "config": found["config"]}
    wanted = {"kind": kind, "config": _settings(config, config_dict(config))}
    if parents is not None:
        recorded["parents"], wanted["parents"] = found["parents"], parents
    if found["kind"] == kind:
        recorded["config"] = _settings(config, found["config"])
    difference = _first_difference(recorded, wanted)
    if difference.startswith("parents.") and " was " in difference:
        difference += " (what it was made from has been made anew since, or is another one)"
    return difference


def _say_once(text: str) -> None:
    """A warning, once for all processes of a torchrun job."""
    if os.environ.get("RANK", "0") == "0":
        log.warning(text)


def _known(path: Path) -> Path | None:
    """The file that shows the folder to be fd2fast's."""
    for file in (path / MANIFEST, path / STATE / BEGUN, path / _CLEARING):
        if file.is_file():
            return file
    return None


def _foreign(path: Path, kind: str) -> None:
    if path.is_dir() and _known(path) is None and (fault := _holds_foreign(path, kind)):
        raise UserError(fault)


def _holds_foreign(path: Path, kind: str) -> str:
    """What is wrong with a folder that is none of fd2fast's; "" for an empty one."""
    if any(p.name not in (STATE, STAMPS) and not p.name.startswith(lock.OURS) for p in path.iterdir()):
        return f"{path} holds other files; wanted an empty or new folder for the {kind}"
    return ""


def _found_finished(path: Path, wanted: _Wanted) -> Stage:
    """The stage of a finished artifact; what a process left that ended just after it wrote the manifest is removed."""
    wanted.must_be_of(path / MANIFEST, path)
    stage = wanted.stage(path)
    stage.finished = load(path, wanted.kind)
    if stage.state.exists() or (path / lock.LOCK).exists():
        with contextlib.suppress(UserError), lock.own(path) as hold:
            if hold.fresh:
                shutil.rmtree(stage.state, ignore_errors=True)
    return stage


def _clear(path: Path) -> None:
    """Remove a result but not the lock; killed meanwhile, the next owner goes on with it."""
    write_bytes(path / _CLEARING, b"")
    for entry in sorted(path.iterdir(), key=lambda p: p.name != MANIFEST):
        if entry.name in (lock.LOCK, _CLEARING):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)
    _remove(path / _CLEARING)


def _sign(file: Path) -> tuple[int, int] | None:
    """What tells a file from another one put in its place."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _not_made_anew(name: str, folder: Path, wanted: str) -> None:
    """UserError where a parent that lies where it lay is not the one that was read; one that is gone says nothing."""
    if not folder.is_dir():
        return
    try:
        found = json.loads((folder / MANIFEST).read_text())["id"]
    except FileNotFoundError:
        found = ""
    except (OSError, ValueError, KeyError, TypeError):
        return
    if found != wanted:
        how = f"made anew ({wanted[:12]}, now {found[:12]})" if found else "begun anew"
        raise UserError(f"{name} {folder} was {how} while this stage read it: run this command again, with --overwrite")


def _first_difference(found: Any, wanted: Any, where: str = "") -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in dict.fromkeys([*wanted, *found]):
            there = f"{where}.{key}" if where else str(key)
            if key not in found or key not in wanted:
                return f"{there} is {'new' if key not in found else 'gone'}"
            if difference := _first_difference(found[key], wanted[key], there):
                return difference
        return ""
    return "" if found == wanted else f"{where} was {found!r}, now {wanted!r}"


def _versions() -> dict[str, str]:
    names = ("fd2fast", "torch", "torchvision", "timm", "numpy", "pillow")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(Exception):
            found[name] = version(name)
    return found


def _peak_memory() -> int:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:  # not ru_maxrss first: it begins at the parent process's peak
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def open_text(path: Path) -> IO[str]:
    """Open a text file of a user's data set; UserError if it is missing."""
    try:
        return open(path, encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
