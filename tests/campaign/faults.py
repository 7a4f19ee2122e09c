"""Campaign: disks that are full, read-only or broken at any operation, and memory that ends at any; then the same command again.

python -m tests.campaign.faults --count 2000 --seed 0 --out runs/campaign
"""

from __future__ import annotations

import errno
import os
import random
import re
import resource
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import forks, layer, material, results, tmpfs

DISK = ("ENOSPC", "EDQUOT", "EROFS", "EIO")
MEMORY = ("torch", "python")
# Stages whose one iteration or epoch is run against the end of memory at each of torch's operations.
COMPUTING = ("pretrain", "patches", "distill", "relabel", "evaluate")
# What a disk has too few of, by the kind of fault.
SMALL = {"small disk": "pages", "few files": "files"}
PAGES = (*range(20), *(round(20 * 1.12**n) for n in range(60)))
ADDRESS_SPACE = (1, 64, 128, *range(140, 260, 8), 288, 320, 384, 512)  # MB


class Faults:
    """Trials on the stages of a folder, which is made ready when the first is run."""

    def __init__(self, folder: Path, only: str = "", *, disk: tmpfs.Tmpfs | None = None):
        """only: a text that trials' keys hold; where it begins with a stage's name, nothing behind that stage is made ready.

        disk: a real one, which trials make too small.
        """
        self.folder = folder / "faults"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stages, self.expected = material.prepare(folder / "material", only.split("/")[0])
        self.by_name = {stage.name: stage for stage in self.stages if stage.name != "students"}
        self.only, self.disk = only, disk

    def sites(self) -> dict[str, str]:
        """Every trial there is, STAGE/FAULT/NUMBER, with the place in the code that it meets; of limits with itself."""
        found: dict[str, str] = {}
        for name in self.by_name:
            operations = self.expected[name].operations
            found |= {f"{name}/{fault}/{n}": site for fault in DISK for n, site in enumerate(operations)}
            # limits on the size of a file are seen by native writers too
            sizes = (0, 1, 100, 1000, 4000, 10_000, 30_000, 100_000)
            found |= {key: key for key in (f"{name}/EFBIG/{size}" for size in sizes)}
            if self.disk is not None:
                found |= {key: key for key in self._small_disks(name, self.disk)}
        for name in [name for name in COMPUTING if name in self.by_name]:
            operations = self._operations(name)
            found |= {f"{name}/{fault} memory/{n}": site for fault in MEMORY for n, site in enumerate(operations)}
            found |= {key: key for key in (f"{name}/address space/{megabytes}" for megabytes in ADDRESS_SPACE)}
        return {key: site for key, site in found.items() if self.only in key}

    def _operations(self, name: str) -> list[str]:
        """Torch's operations in an undisturbed run, each with its place in the code."""
        counted = self.folder / "counted"
        counted.unlink(missing_ok=True)
        stage, out = self.by_name[name], self.folder / "trial"
        stage.begin(out)
        ended = forks.run(stage.command(out), before=_out_of_memory(-1, "torch", counted))
        if ended.code != 0:
            raise RuntimeError(f"{name} failed undisturbed: {ended.errors}")
        return counted.read_text().splitlines()

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

    def trial(self, key: str) -> results.Trial:
        """One fault, judged, and the same command without it."""
        name, fault, number = key.split("/")
        stage, out = self.by_name[name], self.folder / "trial"
        before: Callable[[], None] | None = None
        if fault in SMALL:
            assert self.disk is not None
            out = self.disk.folder / "trial"
            self.disk.mount()
            stage.begin(out)
            self.disk.leave(**{SMALL[fault]: int(number)})
        else:
            stage.begin(out)
        if fault in DISK:
            before = layer.failing(out, int(number), getattr(errno, fault), lasting=fault != "EIO")
        elif fault == "EFBIG":
            before = _small_files(int(number))
        elif fault == "address space":
            before = _address_space(int(number))
        elif fault not in SMALL:
            before = _out_of_memory(int(number), fault.split()[0])
        ended = forks.run(stage.command(out), before=before)
        counts = {"refused": int(ended.code != 0), "survived": int(ended.code == 0)}
        wrong = _judge(ended)
        if not wrong:
            pictures = left_out(ended.errors, out)
            counts["without a picture"] = int(bool(pictures))
            if fault in SMALL and self.disk is not None:
                self.disk.leave()
            ended = forks.run(stage.command(out))
            if ended.code != 0:
                wrong = f"the same command again gave {ended.code}: {ended.reason}"
            else:
                found = material.found_below(out)
                wrong = material.difference(*(but_for(pictures, one) for one in (found, self.expected[name].found)))
        return results.Trial(key, f"{name}, {fault}", counts, wrong)


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


def _out_of_memory(at: int, kind: str, counted: Path | None = None) -> Callable[[], None]:
    """Torch's operation `at` finds no memory; counted: a file that gets a line for each operation, its name and place."""

    def before() -> None:
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode

        log = None if counted is None else open(counted, "ab", buffering=0)  # noqa: SIM115

        class Mode(TorchDispatchMode):
            count = 0

            def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), named: Any = None) -> Any:
                number = self.count
                Mode.count = self.count = number + 1
                if log is not None:
                    log.write(f"{function} {layer.site()}\n".encode())
                if number == at:
                    if kind == "python":
                        raise MemoryError
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
                return function(*arguments, **(named or {}))

        Mode().__enter__()

    return before


def spread(sites: Mapping[str, str], count: int, seed: int) -> list[str]:
    """So many of the trials, drawn in turn from each stage and kind of fault; each of its places once before any comes again."""
    first: dict[str, list[str]] = {}
    again: dict[str, list[str]] = {}
    met = set()
    keys = list(sites)
    for key in random.Random(seed).sample(keys, len(keys)):
        group = key.rpartition("/")[0]
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
    given = parser.parse_args(arguments)
    found = results.Results(given.out, "faults")
    disk = tmpfs.Tmpfs(given.out.resolve() / "disk") if given.tmpfs else None
    if disk is not None and (reason := disk.refused()):
        print(f"no file system can be mounted here, its trials are left out: {reason}", file=sys.stderr)
        disk = None
    try:
        faults = Faults(given.out.resolve(), given.only, disk=disk)
        sites = faults.sites()
        chosen = spread(sites, given.count, given.seed)
        places, tried = ({(key.rpartition("/")[0], sites[key]) for key in keys} for keys in (sites, chosen))
        told = f"{len(sites)} faults at {len(places)} places known, {len(chosen)} at {len(tried)} tried"
        print(told, file=sys.stderr)
        found.run(chosen, faults.trial)
    finally:
        if disk is not None:
            disk.unmount()
    return results.end(found)


if __name__ == "__main__":
    sys.exit(main())
