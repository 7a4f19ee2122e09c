"""Campaign: stages ended by signals and power cuts at random points, then run again; the same bytes and nothing left over.

python -m tests.campaign.kills --count 200 --seed 0 --out runs/campaign
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from . import forks, layer, material, power, results

SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
POWER = "power cut"
# How often each stage is chosen: where more is written in more ways, more can go wrong.
WEIGHTS = {
    "datasets": 2,
    "pretrain": 2,
    "patches": 2,
    "distill": 4,
    "relabel": 2,
    "evaluate": 2,
    "run": 4,
    "students": 0.5,
}


class Kills:
    """Trials on the stages of a folder, which is made ready when the first is run."""

    def __init__(self, folder: Path, only: str = "", torchrun: int = 0):
        """torchrun: every so many trials of shared stages are run by torch's launcher itself; 0: none."""
        self.folder, self.torchrun = folder / "kills", torchrun
        self.folder.mkdir(parents=True, exist_ok=True)
        self.stages, self.expected = material.prepare(folder / "material", only)
        self.chosen = [stage for stage in self.stages if only in stage.name]

    def trial(self, key: str) -> results.Trial:
        """One to three deaths of the same command, then its end."""
        number = int(key.rpartition("/")[2])
        rng = random.Random(key)
        stage = rng.choices(self.chosen, [WEIGHTS.get(stage.name, 1) for stage in self.chosen])[0]
        world = rng.choice((1, 2)) if stage.shared else 1
        out = self.folder / "trial"
        stage.begin(out)
        group = f"{stage.name}, {world} processes" if world > 1 else stage.name
        counts = {name: 0 for name in (*SIGNALS, POWER, "too late")}
        if world > 1 and self.torchrun and number % self.torchrun == 0:
            group = f"{stage.name}, torchrun"
            fault = self._by_torchrun(stage, out, rng, counts)
        else:
            fault = self._deaths(stage, out, world, rng, counts)
        if not fault:
            ended = forks.run(stage.command(out), world=world, environment=stage.environment)
            fault = self._judge(stage, out, ended)
        return results.Trial(key, group, counts, fault)

    def _deaths(self, stage: material.Stage, out: Path, world: int, rng: random.Random, counts: dict[str, int]) -> str:
        """Empty, or what was wrong with how it died."""
        expected = self.expected[stage.name]
        for _ in range(rng.randint(1, 3)):
            kind = rng.choice((*SIGNALS, POWER))
            number = SIGNALS.get(kind, signal.SIGKILL)
            journal = self.folder / "journal"
            shutil.rmtree(journal, ignore_errors=True)
            by_clock = kind != POWER and rng.random() < 0.4
            at = rng.randrange(len(expected.operations)) if not by_clock else -1
            delay = rng.random() * expected.seconds * (2 if world > 1 else 1)
            before = {"files": power.keep(out), "folders": {str(p) for p in out.rglob("*") if p.is_dir()}}
            start = None if by_clock else layer.ending(out, at, number, journal if kind == POWER else None)
            job = forks.Job(stage.command(out), world=world, before=start, environment=stage.environment)
            if by_clock:
                began = time.monotonic()
                job.wait(until=lambda began=began, delay=delay: time.monotonic() - began > delay)
                victims = job.running
                if number == signal.SIGKILL and victims:
                    victims = [rng.choice(victims)]  # of two, the other is ended as torchrun does
                job.send(number, victims)
            elif kind == POWER:
                job.wait(until=lambda job=job: any(code is not None for code in job.codes.values()))
                job.send(signal.SIGKILL)
            ended = job.wait()
            if ended.hung:
                return f"{kind}: it did not end"
            if ended.orphans:
                return f"{kind}: {ended.orphans} processes outlived it"
            if "Traceback" in ended.errors:
                return f"{kind}: a traceback: {ended.reason}"
            counts["too late" if ended.code == 0 else kind] += 1
            if kind == POWER and (journal / "log").is_file():
                files, folders = before["files"], before["folders"]
                assert isinstance(files, dict)
                assert isinstance(folders, set)
                for what, lost in power.cut(out, files, folders, journal, rng).items():
                    counts[what] = counts.get(what, 0) + lost
        return ""

    def _by_torchrun(self, stage: material.Stage, out: Path, rng: random.Random, counts: dict[str, int]) -> str:
        """The launcher and its processes in new interpreters; a signal to the launcher after a random time."""
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--standalone",
            "-m",
            "fd2fast",
        ]
        # what one process takes alone, and what three interpreters take to begin
        delay = 3 + rng.random() * (2 * self.expected[stage.name].seconds + 6)
        kind = rng.choice(("SIGTERM", "SIGINT"))
        with open(self.folder / "torchrun.txt", "w", encoding="utf-8") as file:
            process = subprocess.Popen(
                [*command, *stage.command(out)], stdout=file, stderr=file, start_new_session=True, env=dict(os.environ)
            )
            try:
                process.wait(delay)
            except subprocess.TimeoutExpired:
                process.send_signal(SIGNALS[kind])
            try:
                code = process.wait(120)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return f"torchrun did not end after {kind}"
        counts[kind if code else "too late"] += 1
        deadline = time.monotonic() + forks.GRACE
        while left := forks._of_sessions({process.pid}):
            if time.monotonic() > deadline:
                os.killpg(process.pid, signal.SIGKILL)
                return f"torchrun, {kind}: {len(left)} processes outlived it"
            time.sleep(0.05)
        return ""

    def _judge(self, stage: material.Stage, out: Path, ended: forks.Ended) -> str:
        if ended.hung:
            return "the same command again did not end"
        if ended.code != 0:
            return f"the same command again gave {ended.code}: {ended.reason}"
        if ended.orphans:
            return f"the same command again left {ended.orphans} processes"
        return material.difference(material.found_below(out), self.expected[stage.name].found)


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; 1 where a trial went wrong."""
    parser = results.options(__doc__.splitlines()[0], 200)
    parser.add_argument("--torchrun", type=int, default=10, help="every so many trials use torch's launcher; 0: none")
    given = parser.parse_args(arguments)
    found = results.Results(given.out, "kills")
    kills = Kills(given.out.resolve(), given.only, given.torchrun)
    found.run([f"{given.only or 'all'}/{given.seed}/{number}" for number in range(given.count)], kills.trial)
    return results.end(found)


if __name__ == "__main__":
    sys.exit(main())
