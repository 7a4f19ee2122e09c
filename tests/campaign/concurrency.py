"""Campaign: two commands in one folder, every pair of stages, at once or after a death, with and without --overwrite.

python -m tests.campaign.concurrency --count 1000 --seed 0 --out runs/campaign
"""

from __future__ import annotations

import itertools
import random
import shutil
import signal
import sys
import time
from pathlib import Path

from fd2fast.system import lock

from . import forks, material, results

# When the second command begins: with the first, when the first has the folder, at a random time while it works, or when it
# has been killed at a random time.
WHEN = ("together", "owned", "later", "killed")
OVERWRITES = ("datasets", "typefaces", "pretrain", "patches", "distill", "random", "relabel", "evaluate", "run")
SHARE = 3  # of so many trials with a stage that torchrun may run, one has it in two processes


class Pairs:
    """Trials on the stages of a folder, which is made ready when the first is run."""

    def __init__(self, folder: Path, seed: int, only: str = "", last: str = ""):
        """last: pairs of the stages up to this one; of all where empty."""
        self.folder, self.seed, self.only = folder, seed, only
        stages, self.expected = material.prepare(folder, last)
        self.stages = {stage.name: stage for stage in stages if stage.name != "students"}

    def keys(self, count: int) -> list[str]:
        """FIRST+SECOND/WHEN/FLAGS/NUMBER, equal for equal seeds: each pair in a random way, and again until there are enough."""
        pairs = [pair for pair in itertools.product(self.stages, repeat=2) if self.only in "+".join(pair)]
        rng = random.Random(f"{self.seed}/pairs")
        found = []
        for number in range(-(-count // max(1, len(pairs)))):
            rng.shuffle(pairs)
            for first, second in pairs:
                flags = rng.choice(("", "overwrite")) if second in OVERWRITES else ""
                found.append(f"{first}+{second}/{rng.choice(WHEN)}/{flags}/{number}")
        return found[:count]

    def trial(self, key: str) -> results.Trial:
        """Both commands to their ends, then the first again where the folder is its."""
        pair, when, flags, _ = key.split("/")
        first, second = (self.stages[name] for name in pair.split("+"))
        rng = random.Random(f"{self.seed}/{key}")
        out = self.folder / "trial"
        first.begin(out)
        target = out / (first.within.name if first.within is not None else "result")
        alone = self.expected[first.name].seconds

        def start(stage: material.Stage, *more: str) -> forks.Job:
            world = 2 if stage.shared and rng.randrange(SHARE) == 0 else 1
            command = [*stage.arguments[:-1], *more, stage.arguments[-1], str(target)]
            return forks.Job(command, world=world, environment=stage.environment)

        one = start(first)
        if when == "owned":
            one.wait(until=lambda: bool(list(out.rglob(lock.LOCK))))
        elif when != "together":
            end = time.monotonic() + rng.random() * alone
            one.wait(until=lambda: time.monotonic() > end)
        if when == "killed":
            one.send(signal.SIGKILL)
        two = start(second, *(["--overwrite"] if flags == "overwrite" else []))
        both = [one.wait(), two.wait()]
        if when == "killed" and both[0].code == -signal.SIGKILL:
            # the students of one that was killed end a moment later
            fault = "" if both[0].orphans == 0 else f"{both[0].orphans} processes outlive it"
        else:
            fault = plain(both[0])
        fault = fault or plain(both[1])
        counts = {
            "both ended well": int(both[0].code == both[1].code == 0),
            "first killed": int(both[0].code == -signal.SIGKILL),
            "in use": sum("in use by" in ended.errors for ended in both),
            "refused otherwise": sum(ended.code == 2 and "in use by" not in ended.errors for ended in both),
        }
        fault = fault or self._left(first, second, both, out, start)
        return results.Trial(key, f"{when}{' --overwrite' if flags else ''}", counts, fault)

    def _left(
        self,
        first: material.Stage,
        second: material.Stage,
        both: list[forks.Ended],
        out: Path,
        start: object,
    ) -> str:
        """What is wrong with what they leave: it must be the whole result of one that ended well, and of nobody else."""
        well = [stage for stage, ended in zip((first, second), both, strict=True) if ended.code == 0]
        killed = both[0].code == -signal.SIGKILL
        if not well and not killed:
            return f"none of them ended well: {both[0].errors.strip()[-200:]} | {both[1].errors.strip()[-200:]}"
        if not well:  # the folder is still the first one's
            if first.within is not None or first.name == "export":  # which does not go on, and says so
                shutil.rmtree(out)
                first.begin(out)
            again = start(first).wait()  # type: ignore[operator]
            if again.code != 0:
                return f"after all, the first command again: code {again.code}: {again.errors.strip()[-300:]}"
            well = [first]
        found = material.found_below(out)
        wanted = [self.expected[stage.name].found for stage in well]
        # a run may begin in a folder that holds other files
        wanted += [wanted[0] | wanted[1]] if [stage.name for stage in well] == ["export", "run"] else []
        differences = [material.difference(found, one) for one in wanted]
        return "" if "" in differences else " | ".join(differences)


def plain(ended: forks.Ended) -> str:
    """What is wrong with how a command ended, whatever the other did."""
    if ended.hung:
        return "hangs"
    if ended.code not in (0, 2) or "Traceback" in ended.errors:
        return f"code {ended.code}: {ended.errors.strip()[-300:]}"
    if ended.code == 2 and not ended.explained:
        return f"no word on why: {ended.errors.strip()[-300:]}"
    return ""


def main() -> int:
    """The campaign from the command line."""
    options = results.options("Pairs of commands in one folder.", 1000)
    options.add_argument("--last", default="", help="only pairs of the stages up to this one")
    given = options.parse_args()
    pairs = Pairs(given.out / "concurrency", given.seed, given.only, given.last)
    found = results.Results(given.out, "concurrency")
    found.run(pairs.keys(given.count), pairs.trial)
    return results.end(found)


if __name__ == "__main__":
    sys.exit(main())
