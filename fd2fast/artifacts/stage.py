"""The writing side of a result: what resuming needs while it is made, and the manifest at its end."""

from __future__ import annotations

import contextlib
import json
import platform
import resource
import shutil
import sys
import time
import weakref
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic

from fd2fast.artifacts.artifact import SCHEMA, A, Artifact, result_of
from fd2fast.artifacts.files import plain, read_torch, sync_folder, write_json, write_torch
from fd2fast.artifacts.folder import BEGUN, MANIFEST, STAMPS, STATE
from fd2fast.artifacts.identity import digest, identity_digest
from fd2fast.errors import UserError
from fd2fast.system import lock
from fd2fast.system.sources import file_digest


class Stage(Generic[A]):
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
        self.finished: A | None = None
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
    ) -> A:
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
        identity = json.loads(json.dumps(found, default=plain))  # as who reads it hashes it
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
        return result_of(self.path, json.loads(json.dumps(manifest, default=plain)))  # type: ignore[return-value]

    def finish_like(
        self, look: Artifact, facts: Mapping[str, Any] | None = None, measured: Mapping[str, Any] | None = None
    ) -> A:
        """`finish` with the classes, size and normalisation of another artifact."""
        return self.finish(
            classes=look.classes, size=look.size, mean=look.mean, std=look.std, facts=facts, measured=measured
        )

    def forget(self) -> None:
        """Give the folder up as if this had not been begun, so that another command may use it; other files stay."""
        (self.state / BEGUN).unlink(missing_ok=True)
        self.release()
        for folder in (self.state, self.path):
            with contextlib.suppress(OSError):
                folder.rmdir()

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
