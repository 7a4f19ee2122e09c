"""Campaign: disks that are full, read-only or broken at any operation, and memory that ends at any; then the same command again.

python -m tests.campaign.faults --count 2000 --seed 0 --out runs/campaign
"""

from __future__ import annotations

import errno
import random
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import forks, layer, material, results

DISK = ("ENOSPC", "EDQUOT", "EROFS", "EIO")
MEMORY = ("torch", "python")
# Stages whose one iteration or epoch is run against the end of memory at each of torch's operations.
COMPUTING = ("pretrain", "patches", "distill", "relabel", "evaluate")


class Faults:
    """Trials on the stages of a folder, which is made ready when the first is run."""

    def __init__(self, folder: Path, only: str = ""):
        """only: a text that trials' keys hold; where it is a stage's name, nothing behind that stage is made ready."""
        self.folder = folder / "faults"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stages, self.expected = material.prepare(folder / "material", only)
        self.by_name = {stage.name: stage for stage in self.stages if stage.name != "students"}
        self.only = only

    def keys(self) -> list[str]:
        """Every trial there is: STAGE/FAULT/NUMBER."""
        found = []
        for name in self.by_name:
            count = len(self.expected[name].operations)
            found += [f"{name}/{fault}/{n}" for fault in DISK for n in range(count)]
            # limits on the size of a file are seen by native writers too
            found += [f"{name}/EFBIG/{size}" for size in (0, 1, 100, 1000, 4000, 10_000, 30_000, 100_000)]
        for name in [name for name in COMPUTING if name in self.by_name]:
            operations = self._operations(name)
            found += [f"{name}/{fault} memory/{n}" for fault in MEMORY for n in range(operations)]
            found += [f"{name}/address space/{megabytes}" for megabytes in (1, 4, 16, 64)]
        return [key for key in found if self.only in key]

    def _operations(self, name: str) -> int:
        """Torch's operations in an undisturbed run."""
        counted = self.folder / "counted"
        counted.unlink(missing_ok=True)
        stage, out = self.by_name[name], self.folder / "trial"
        stage.begin(out)
        ended = forks.run(stage.command(out), before=_out_of_memory(-1, "torch", counted))
        if ended.code != 0:
            raise RuntimeError(f"{name} failed undisturbed: {ended.errors}")
        return len(counted.read_bytes())

    def trial(self, key: str) -> results.Trial:
        """One fault, judged, and the same command without it."""
        name, fault, number = key.split("/")
        stage, out = self.by_name[name], self.folder / "trial"
        stage.begin(out)
        before: Callable[[], None]
        if fault in DISK:
            before = layer.failing(out, int(number), getattr(errno, fault), lasting=fault != "EIO")
        elif fault == "EFBIG":
            before = _small_files(int(number))
        elif fault == "address space":
            before = _address_space(int(number))
        else:
            before = _out_of_memory(int(number), fault.split()[0])
        ended = forks.run(stage.command(out), before=before)
        counts = {"refused": int(ended.code != 0), "survived": int(ended.code == 0)}
        wrong = _judge(ended)
        if not wrong:
            ended = forks.run(stage.command(out))
            if ended.code != 0:
                wrong = f"the same command again gave {ended.code}: {ended.reason}"
            else:
                wrong = material.difference(material.found_below(out), self.expected[name].found)
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
    """Torch's operation `at` finds no memory, and every tenth after it does neither; counted: a byte for each operation."""

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
                    log.write(b".")
                if number == at:
                    if kind == "python":
                        raise MemoryError
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
                return function(*arguments, **(named or {}))

        Mode().__enter__()

    return before


def spread(keys: list[str], count: int, seed: int) -> list[str]:
    """So many of the trials, drawn in turn from each stage and kind of fault, however many of its kind there are."""
    groups: dict[str, list[str]] = {}
    for key in random.Random(seed).sample(keys, len(keys)):
        groups.setdefault(key.rpartition("/")[0], []).append(key)
    turns = [(place, group, key) for group, held in groups.items() for place, key in enumerate(held)]
    return [key for _, _, key in sorted(turns)[:count]]


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; 1 where a trial went wrong."""
    given = results.options(__doc__.splitlines()[0], 2000).parse_args(arguments)
    found = results.Results(given.out, "faults")
    faults = Faults(given.out.resolve(), given.only)
    keys = faults.keys()
    chosen = spread(keys, given.count, given.seed)
    print(f"{len(keys)} faults known, {len(chosen)} tried", file=sys.stderr)
    found.run(chosen, faults.trial)
    return results.end(found)


if __name__ == "__main__":
    sys.exit(main())
