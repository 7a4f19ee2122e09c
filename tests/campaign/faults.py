"""Campaign: disks that are full, read-only or broken at any operation, and memory that ends at any; then the same command again.

python -m tests.campaign.faults --count 2000 --seed 0 --out runs/campaign
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import failing, forks, material, results, states, sweep, tmpfs

# Stages whose operations of torch are met by the end of memory.
COMPUTING = ("pretrain", "patches", "distill", "relabel", "evaluate")
# What a disk has too few of, by the kind of fault.
SMALL = {"small disk": "pages", "few files": "files"}
PAGES = (*range(20), *(round(20 * 1.12**n) for n in range(60)))
ADDRESS_SPACE = (1, 64, 128, *range(140, 260, 8), 288, 320, 384, 512)  # MB
# Kinds of fault whose trials are forks of one run, those together that share one; the most important first.
SWEEPS = (("ENOSPC",), ("EIO",), failing.MEMORY, ("EDQUOT",), ("EROFS",))
# Forks of one run, after which their states are looked at and kept in the results.
AT_ONCE = 120
# Places in other threads are met by forks of the main one that begin so many of its operations ahead, else by commands.
AHEAD = (0, 15)
# Of so many forks one is done again as a command of its own, without what was seen before, and must come to the same.
AGAIN = 100
# Seconds of a core for a trial, as long as none was done.
PACE = 0.3


class Faults:
    """Trials on the stages of a folder, which is made ready when the first is run."""

    def __init__(self, found: results.Results, only: str = "", *, disk: tmpfs.Tmpfs | None = None, plain: bool = False):
        """found: results so far, whose states need not be seen again, in the folder for everything else.

        only: a text that trials' keys hold; where it begins with a stage's name, nothing behind that stage is made ready.
        disk: a real one, which trials make too small. plain: nothing is drawn in figures, which takes most of the time.
        """
        self.found, self.only, self.disk = found, only, disk
        folder = found.folder.resolve()
        self.folder = folder / "faults"
        self.folder.mkdir(parents=True, exist_ok=True)
        forks.load()
        if plain:
            forks.draw_plain()
        made = folder / ("material-plain" if plain else "material")
        self.stages, self.expected = material.prepare(made, only.split("/")[0])
        self.by_name = {stage.name: stage for stage in self.stages if stage.name != "students"}
        self._sources = material.sources()[:8]
        # by stage and state: the trial from whose state the next command came to the undisturbed bytes
        self._proven = {
            (trial.key.split("/")[0], trial.state): trial.key
            for trial in found.trials.values()
            if trial.state and not trial.fault and not trial.seen
        }

    def sites(self) -> dict[str, str]:
        """Every trial there is with the place in the code that it meets; of limits, which have none, with itself.

        STAGE/FAULT/PLACE/TIMES (how often the place was met before), or STAGE/FAULT/NUMBER.
        """
        found: dict[str, str] = {}
        for name in self.by_name:
            found |= _at_each(name, failing.DISK, self.expected[name].operations)
            # limits on the size of a file are seen by native writers too
            sizes = (0, 1, 100, 1000, 4000, 10_000, 30_000, 100_000)
            found |= {key: key for key in (f"{name}/EFBIG/{size}" for size in sizes)}
            if self.disk is not None:
                found |= {key: key for key in self._small_disks(name, self.disk)}
        for name in [name for name in COMPUTING if name in self.by_name]:
            found |= _at_each(name, failing.MEMORY, self._operations(name))
            found |= {key: key for key in (f"{name}/address space/{megabytes}" for megabytes in ADDRESS_SPACE)}
        return {key: site for key, site in found.items() if self.only in key}

    def _operations(self, name: str) -> list[str]:
        """Places of torch's operations in an undisturbed run."""
        record, counted = self.folder / "operations.json", self.folder / "counted"
        known = json.loads(record.read_text()) if record.is_file() else {}
        if known.get("sources") != self._sources:
            known = {"sources": self._sources}
        if name not in known:
            counted.unlink(missing_ok=True)
            stage, out = self.by_name[name], self.folder / "trial"
            stage.begin(out)
            ended = forks.run(stage.command(out), before=failing.counter(out, counted))
            if ended.code != 0:
                raise RuntimeError(f"{name} failed undisturbed: {ended.errors}")
            known[name] = counted.read_text().splitlines()
            record.write_text(json.dumps(known))
        places: list[str] = known[name]
        return places

    def _small_disks(self, name: str, disk: tmpfs.Tmpfs) -> list[str]:
        """Numbers of pages, and of files, that a disk has beyond what lies there, up to what the stage takes at once."""
        stage, out = self.by_name[name], disk.folder / "trial"
        disk.mount()
        stage.begin(out)
        before = disk.used()
        job = forks.Job(stage.command(out))
        peak = tmpfs.Used(0, 0)

        def look() -> bool:
            nonlocal peak
            now = disk.used()
            peak = tmpfs.Used(max(peak.pages, now.pages), max(peak.files, now.files))
            return False

        if (ended := job.wait(until=look)).code != 0:
            raise RuntimeError(f"{name} failed on a disk of its own: {ended.errors}")
        pages = [n for n in PAGES if n < peak.pages - before.pages]
        return [f"{name}/small disk/{n}" for n in pages] + [
            f"{name}/few files/{n}" for n in range(peak.files - before.files)
        ]

    def trial(self, key: str, *, afresh: bool = False) -> results.Trial:
        """One fault, judged, and the same command without it; that always where `afresh`, else only from a new state."""
        began = time.monotonic()
        name, fault, where = key.split("/", 2)
        stage, out = self.by_name[name], self.folder / "trial"
        before: Callable[[], None] | None = None
        if fault in SMALL:
            assert self.disk is not None
            out = self.disk.folder / "trial"
            self.disk.mount()
            stage.begin(out)
            self.disk.leave(**{SMALL[fault]: int(where)})
        else:
            stage.begin(out)
        if fault in (*failing.DISK, *failing.MEMORY):
            place, _, times = where.rpartition("/")
            before = failing.at(out, fault, place, int(times))
        elif fault == "EFBIG":
            before = _small_files(int(where))
        elif fault == "address space":
            before = _address_space(int(where))
        ended = forks.run(stage.command(out), before=before)
        if fault in SMALL and self.disk is not None:
            self.disk.leave()
        trial = self._judged(key, ended, left_out(ended.errors, out), out, states.digest(states.read(out)), afresh)
        return dataclasses.replace(trial, seconds=round(time.monotonic() - began, 3))

    def _judged(
        self, key: str, ended: forks.Ended, pictures: set[str], out: Path, state: str, afresh: bool = False
    ) -> results.Trial:
        """The first command's end, and whether the next one comes to the undisturbed bytes from the state it left in `out`."""
        name, fault, _ = key.split("/", 2)
        counts = {"refused": int(ended.code != 0), "survived": int(ended.code == 0)}
        wrong, seen = _judge(ended), ""
        if not wrong:
            counts["without a picture"] = int(bool(pictures))
            seen = "" if afresh else self._seen(key, state, pictures)
            state = self._known_as(state, pictures)
            counts["state seen before"] = int(bool(seen))
            if not seen:
                wrong = self._next(name, out, pictures)
                if not wrong:
                    self._proven.setdefault((name, state), key)
        return results.Trial(key, f"{name}, {fault}", counts, wrong, state, seen)

    def _known_as(self, state: str, pictures: set[str]) -> str:
        return "/".join([self._sources, state, *sorted(pictures)])

    def _seen(self, key: str, state: str, pictures: set[str]) -> str:
        """The trial whose next command went on from the same state of the same stage, if there was one."""
        return self._proven.get((key.split("/")[0], self._known_as(state, pictures)), "")

    def _next(self, name: str, out: Path, pictures: set[str]) -> str:
        """Run the same command without a fault; what was wrong with it."""
        ended = forks.run(self.by_name[name].command(out))
        if ended.hung:
            return "the same command again did not end"
        if ended.code != 0:
            return f"the same command again gave {ended.code}: {ended.reason}"
        found = material.found_below(out)
        return material.difference(*(but_for(pictures, one) for one in (found, self.expected[name].found)))

    def every(self, each_time: bool) -> None:
        """Each fault at each place that is known or met on the way, or each time that a place is met; then the table."""
        sites = self.sites()
        for trial in self.found.faults:  # tried again
            del self.found.trials[trial.key]
        self._before, self._used = len(self.found.trials), _used()
        self.tell(sites, each_time)
        swept = {fault for kinds in SWEEPS for fault in kinds}
        # a whole run costs most and consists of the others
        for last in (False, True):
            names = [name for name in self.by_name if (name == "run") == last]
            for kinds, name in itertools.product(SWEEPS, names):
                asked = [fault for fault in kinds if any(key.startswith(f"{name}/{fault}/") for key in sites)]
                while asked and self._swept(name, asked, each_time):
                    self.tell(sites, each_time)
                aims = self._aims(each_time) if asked else []
                for ahead in AHEAD:
                    nearer = [dataclasses.replace(aim, point=max(1, aim.point - ahead)) for aim in aims]
                    while nearer and self._swept(name, asked, each_time, nearer):
                        self.tell(sites, each_time)
                left = [key for key in sites if key.split("/")[0] == name and key.split("/")[1] in asked]
                for key in self._left(left, sites, each_time):
                    self._add(self.trial(key))
                if asked:
                    self.tell(sites, each_time)
        self.found.run([key for key in sites if key.split("/")[1] not in swept], self.trial)

    def _left(self, keys: Sequence[str], sites: Mapping[str, str], each_time: bool) -> Iterator[str]:
        """Of these trials those that are still to be done, each place once or each time."""
        met = {_place(key) for key in self.found.trials}
        for key in keys:
            stage, fault = key.split("/")[:2]
            place = (stage, fault, sites[key])
            if key in self.found.trials or (place in met and not each_time):
                continue
            met.add(place)
            yield key

    def _aims(self, each_time: bool) -> list[sweep.Aim]:
        """What the last run met where it could not fork."""
        aims: dict[tuple[str, str, int], sweep.Aim] = {}
        for line in sweep.results(self.folder / "sweep"):
            for aim in [sweep.Aim(**given) for given in line.get("aims", ())]:
                aims.setdefault((aim.fault, aim.place, aim.times if each_time else 0), aim)
        return list(aims.values())

    def _swept(self, name: str, kinds: Sequence[str], each_time: bool, aims: Sequence[sweep.Aim] = ()) -> int:
        """One run of a stage with forks at what is still to be met; how many trials came of it."""
        into, out = self.folder / "sweep", self.folder / "trial"
        shutil.rmtree(into, ignore_errors=True)
        wanted = sweep.Wanted(kinds, each_time, lambda trial: self.only in f"{name}/{trial}")
        for key in self.found.trials:
            its_stage, fault, where = key.split("/", 2)
            if its_stage == name and fault in kinds:
                place, _, times = where.rpartition("/")
                wanted.met(fault, place, int(times))
        # without pictures, whose lack asks more than a state
        proven = {parts[1] for stage, state in self._proven if stage == name and len(parts := state.split("/")) == 2}
        stage = self.by_name[name]
        stage.begin(out)
        left = [aim for aim in aims if wanted.at(aim.fault, aim.place, aim.times)]
        if aims and not left:
            return 0
        run = sweep.Sweep(out, into, wanted, aims=left, seen=proven, most=AT_ONCE)
        ended = forks.run(stage.command(out), before=run.begin, patience=AT_ONCE * forks.PATIENCE)
        lines = list(sweep.results(into))
        if not any("stopped" in line for line in lines):
            wrong = (
                ended.reason
                if ended.code
                else material.difference(material.found_below(out), self.expected[name].found)
            )
            if wrong:  # then its forks say nothing
                raise RuntimeError(f"{name} between its forks, which should not touch it: {wrong}")
        done = 0
        for line in lines:
            if "fault" not in line:
                continue
            began = time.monotonic()
            key = f"{name}/{line['fault']}/{line['place']}/{line['times']}"
            trial = self._fork(key, line, into / "states" / line["state"])
            self._add(dataclasses.replace(trial, seconds=round(line["seconds"] + time.monotonic() - began, 3)))
            done += 1
        return done

    def _fork(self, key: str, line: dict[str, Any], copy: Path) -> results.Trial:
        """The trial of a fork; where it went wrong, and one of so many, is done again as a command of its own, which counts."""
        counts = {"fork": 1}
        ended = sweep.ended(line)
        pictures = left_out(ended.errors, self.folder / "trial")
        if not copy.is_dir() and not self._seen(
            key, line["state"], pictures
        ):  # it was seen and not good, or with others
            return self.trial(key)
        trial = self._judged(key, ended, pictures, copy, line["state"])
        if not trial.seen:
            shutil.rmtree(copy, ignore_errors=True)
        if trial.fault or zlib.crc32(key.encode()) % AGAIN == 0:
            again = self.trial(key, afresh=True)
            counts |= {"done again": 1}
            if bool(again.fault) != bool(trial.fault):
                counts |= {"came to something else": 1}
                again = dataclasses.replace(again, fault=again.fault or f"only as a fork: {trial.fault}")
            trial = again
        return dataclasses.replace(trial, counts=trial.counts | counts)

    def _add(self, trial: results.Trial) -> None:
        self.found.add(trial)
        if trial.fault:
            print(f"\n{trial.key}: {trial.fault}", file=sys.stderr, flush=True)

    def tell(self, sites: Mapping[str, str], each_time: bool) -> None:
        """How much is done and left, for people; the table is written too."""
        left = len(list(self._left(list(sites), sites, each_time)))
        trials = self.found.trials.values()
        done = len(trials) - self._before
        pace = (_used() - self._used) / done if done else PACE
        places = {(*key.split("/")[:2], site) for key, site in sites.items()}
        tried = len(places & {_place(trial.key) for trial in trials})
        seen = sum(bool(trial.seen) for trial in trials)
        print(
            f"{len(sites)} faults at {len(places)} places known, {tried} places tried; {len(trials)} trials, "
            f"{len(self.found.faults)} faults, {seen} states seen before; {left} trials left, "
            f"about {left * pace / 60:.0f} min of one core at {pace:.2f} s",
            file=sys.stderr,
            flush=True,
        )
        self.found.write()


def _used() -> float:
    """Seconds of a core that this process and its ended children have had."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def _at_each(name: str, kinds: Sequence[str], places: Sequence[str]) -> dict[str, str]:
    """Of a stage: each fault each time that a place is met."""
    met: collections.Counter[str] = collections.Counter()
    found: dict[str, str] = {}
    for place in places:
        found |= {f"{name}/{fault}/{place}/{met[place]}": place for fault in kinds}
        met[place] += 1
    return found


def _place(key: str) -> tuple[str, str, str]:
    """Stage, fault and place of a trial."""
    name, fault, where = key.split("/", 2)
    return name, fault, where.rpartition("/")[0] or key


def _judge(ended: forks.Ended) -> str:
    """A fault ends in one line that says it, or is survived."""
    if ended.hung:
        return "it did not end"
    if ended.code < 0:
        return f"it died of {signal.Signals(-ended.code).name}"
    if "Traceback" in ended.errors or "Exception ignored" in ended.errors:
        return f"a traceback: {ended.reason}"
    if ended.code and not ended.explained:
        return f"exit code {ended.code} without a line that says why: {ended.reason}"
    return ""


def left_out(errors: str, out: Path) -> set[str]:
    """The pictures, below `out`, that a command says it left out: no result hangs on one, and it is not drawn again later."""
    return {os.path.relpath(path, out) for path in re.findall(r"the picture (.+?) is left out", errors)}


def but_for(pictures: set[str], found: dict[str, str]) -> dict[str, str]:
    """What is found, without these pictures and the manifests, which list them."""
    if not pictures:
        return found
    return {name: sha for name, sha in found.items() if name not in pictures and Path(name).name != "manifest.json"}


def _small_files(size: int) -> Callable[[], None]:
    """No file may grow beyond `size` bytes; its writer is told so, as of a full disk."""

    def before() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    return before


def _address_space(megabytes: int) -> Callable[[], None]:
    """So much address space beyond what the process holds when it begins."""

    def before() -> None:
        held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (held + (megabytes << 20), resource.RLIM_INFINITY))

    return before


def spread(sites: Mapping[str, str], count: int, seed: int) -> list[str]:
    """So many of the trials, drawn in turn from each stage and kind of fault; each of its places once before any comes again."""
    first: dict[str, list[str]] = {}
    again: dict[str, list[str]] = {}
    met = set()
    keys = list(sites)
    for key in random.Random(seed).sample(keys, len(keys)):
        group = "/".join(key.split("/")[:2])
        held = again if (group, sites[key]) in met else first
        held.setdefault(group, []).append(key)
        met.add((group, sites[key]))
    chosen: list[str] = []
    for groups in (first, again):
        turns = [(place, group, key) for group, held in groups.items() for place, key in enumerate(held)]
        chosen += [key for _, _, key in sorted(turns)]
    return chosen[:count]


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; 1 where a trial went wrong."""
    parser = results.options(__doc__.splitlines()[0], 2000)
    parser.add_argument("--tmpfs", action="store_true", help="also on a small file system of its own (as root)")
    parser.add_argument(
        "--every",
        choices=("place", "time"),
        help="not so many trials but every: each fault at each place in the code, or each time that a place is met",
    )
    parser.add_argument(
        "--patience", type=float, default=forks.PATIENCE, help="seconds after which a command counts as hung"
    )
    given = parser.parse_args(arguments)
    forks.PATIENCE = given.patience
    found = results.Results(given.out, "faults")
    disk = tmpfs.Tmpfs(given.out.resolve() / "disk") if given.tmpfs else None
    if disk is not None and (reason := disk.refused()):
        print(f"no file system can be mounted here, its trials are left out: {reason}", file=sys.stderr)
        disk = None
    try:
        _run(Faults(found, given.only, disk=disk, plain=bool(given.every)), given)
    finally:
        if disk is not None:
            disk.unmount()
    return results.end(found)


def _run(faults: Faults, given: argparse.Namespace) -> None:
    if given.every:
        faults.every(given.every == "time")
        return
    sites = faults.sites()
    chosen = spread(sites, given.count, given.seed)
    places, tried = ({(*key.split("/")[:2], sites[key]) for key in keys} for keys in (sites, chosen))
    told = f"{len(sites)} faults at {len(places)} places known, {len(chosen)} at {len(tried)} tried"
    print(told, file=sys.stderr)
    faults.found.run(chosen, faults.trial)


if __name__ == "__main__":
    sys.exit(main())
