"""Begin, resume or find finished the result in a folder; a folder that holds another one is refused with the difference."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

from fd2fast.artifacts.artifact import A, Artifact, kind_name, load
from fd2fast.artifacts.files import read_json, remove, sync_folder, write_json, writing
from fd2fast.artifacts.folder import BEGUN, CLEARING, MANIFEST, STATE, clear, holds_foreign, mark_of, refuse_foreign
from fd2fast.artifacts.identity import config_dict, first_difference, place_fields, recorded_settings
from fd2fast.artifacts.stage import Stage
from fd2fast.errors import UserError
from fd2fast.system import lock
from fd2fast.system.sources import Source, compare, recorded_place

log = logging.getLogger(__name__)


@overload
def open_stage(
    path: Path | str,
    kind: type[A],
    config: Any,
    parents: Mapping[str, Artifact],
    *,
    sources: Mapping[str, Source] | None = None,
    overwrite: bool = False,
) -> Stage[A]: ...
@overload
def open_stage(
    path: Path | str,
    kind: str,
    config: Any,
    parents: Mapping[str, Artifact],
    *,
    sources: Mapping[str, Source] | None = None,
    overwrite: bool = False,
) -> Stage[Artifact]: ...
def open_stage(
    path: Path | str,
    kind: type[Artifact] | str,
    config: Any,
    parents: Mapping[str, Artifact],
    *,
    sources: Mapping[str, Source] | None = None,
    overwrite: bool = False,
) -> Stage[Any]:
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
    kind = kind_name(kind)
    wanted = Recipe(kind, config, parents, sources or {})
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; wanted a folder to write the {kind} to")
    refuse_foreign(path, kind)
    if mark_of(path) is None or overwrite:
        wanted.must_be_there()
    if not overwrite and (path / MANIFEST).is_file() and not (path / CLEARING).exists():
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
    mark = mark_of(path)
    if (path / CLEARING).exists():
        return None  # an interrupted --overwrite, which is completed
    try:
        if mark is None:
            return holds_foreign(path, kind) or None
        found = json.loads(mark.read_text())
        difference = _other_result(found, kind, config)
    except OSError as error:
        return f"{mark or path} cannot be read: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"{mark} is damaged ({error}); remove {path} and run again"
    return _holds_other(path, found, difference) if difference else None


def _begin(path: Path, wanted: Recipe, parent_folders: dict[str, Path], hold: lock.Hold, overwrite: bool) -> Stage[Any]:
    """The stage in a folder that this process owns."""
    begun, manifest = path / STATE / BEGUN, path / MANIFEST
    cleared = hold.fresh and (path / CLEARING).exists()
    if (overwrite or cleared) and mark_of(path) is not None:
        wanted.must_be_there()
        lock.refuse_below_running(path)
        with writing(path):
            clear(path)
    refuse_foreign(path, wanted.kind)
    if hold.fresh:  # nobody else writes here
        for stale in path.rglob(f"{lock.TEMPORARY}*"):
            remove(stale)
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


class Recipe:
    """What a result is to be a function of; `inputs`, digests of what is read from outside, are part of it, `places` are not."""

    def __init__(self, kind: str, config: Any, parents: Mapping[str, Artifact], sources: Mapping[str, Source]):
        self.kind, self._config, self._sources = kind, config, sources
        self.settings = {name: value for name, value in config_dict(config).items() if name not in sources}
        self.parents = {name: {"kind": parent.kind, "id": parent.id} for name, parent in parents.items()}
        self.inputs = {name: source.digest for name, source in sources.items() if source.digest is not None}
        self.places = {name: recorded_place(source.place) for name, source in sources.items()}

    def stage(
        self, path: Path, hold: lock.Hold | None = None, parent_folders: Mapping[str, Path] | None = None
    ) -> Stage[Any]:
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

    def must_be_of(self, record: Path, path: Path) -> None:
        """UserError with the difference unless `record`, manifest or beginning of the result at `path`, tells of this one."""
        found = read_json(record, repair=f"remove {path} and run again")
        try:
            difference = _other_result(found, self.kind, self._config, self.parents)
            names = dict.fromkeys([*place_fields(self._config), *self._sources])
            finished = record.name == MANIFEST
            other, notes = ("", []) if difference else compare(found, self._sources, names, finished=finished)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{record} is damaged ({error}); remove {path} and run again") from error
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
    wanted = {"kind": kind, "config": recorded_settings(config, config_dict(config))}
    if parents is not None:
        recorded["parents"], wanted["parents"] = found["parents"], parents
    if found["kind"] == kind:
        recorded["config"] = recorded_settings(config, found["config"])
    difference = first_difference(recorded, wanted)
    if difference.startswith("parents.") and " was " in difference:
        difference += " (what it was made from has been made anew since, or is another one)"
    return difference


def _say_once(text: str) -> None:
    """A warning, once for all processes of a torchrun job that share this work."""
    if not lock.joins():
        log.warning(text)


def _found_finished(path: Path, wanted: Recipe) -> Stage[Any]:
    """The stage of a finished artifact; what a process left that ended just after it wrote the manifest is removed."""
    wanted.must_be_of(path / MANIFEST, path)
    stage = wanted.stage(path)
    stage.finished = load(path, wanted.kind)
    if stage.state.exists() or (path / lock.LOCK).exists():
        with contextlib.suppress(UserError), lock.own(path) as hold:
            if hold.fresh:
                shutil.rmtree(stage.state, ignore_errors=True)
    return stage
