"""Results of a campaign's trials: one JSON line each, kept so that a stopped campaign goes on, and a table of counts."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Trial:
    """One trial. group: its row of the table; counts: what happened in it; fault: what was wrong, empty where nothing was.

    state: what the first command left, where that is compared; seen: the trial that showed before how the next goes on from it.
    seconds: by the clock.
    """

    key: str
    group: str
    counts: dict[str, int] = field(default_factory=dict)
    fault: str = ""
    state: str = ""
    seen: str = ""
    seconds: float = 0.0


class Results:
    """Trials of one campaign in FOLDER/NAME.jsonl, and its table in NAME.md and NAME.json."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.name = folder, name
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / f"{name}.jsonl"
        self.trials: dict[str, Trial] = {}
        if self._file.is_file():
            for line in self._file.read_text(encoding="utf-8").splitlines():
                trial = Trial(**json.loads(line))
                self.trials[trial.key] = trial

    @property
    def faults(self) -> list[Trial]:
        """The trials that went wrong."""
        return [trial for trial in self.trials.values() if trial.fault]

    def add(self, trial: Trial) -> None:
        self.trials[trial.key] = trial
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(trial)) + "\n")

    def run(self, keys: Iterable[str], trial: Callable[[str], Trial]) -> None:
        """Every trial that is not done yet, with a progress line; then the table."""
        keys = list(keys)
        todo = [key for key in keys if key not in self.trials]
        began = time.monotonic()
        for number, key in enumerate(todo, 1):
            done = trial(key)
            self.add(done)
            if done.fault:
                print(f"\n{key}: {done.fault}", file=sys.stderr, flush=True)
            pace = (time.monotonic() - began) / number
            left = pace * (len(todo) - number)
            line = f"{self.name}: {len(keys) - len(todo) + number}/{len(keys)}, {len(self.faults)} faults, {left:.0f} s left"
            print(f"\r{line}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        self.write()

    def table(self) -> str:
        """Markdown: a row for each group and one for all."""
        names = list(dict.fromkeys(name for trial in self.trials.values() for name in trial.counts))
        rows = [["", "trials", *names, "faults"], ["---"] + ["---:"] * (len(names) + 2)]
        groups = list(dict.fromkeys(trial.group for trial in self.trials.values()))
        for group in [*groups, None]:
            mine = [trial for trial in self.trials.values() if group in (None, trial.group)]
            counts = [str(sum(trial.counts.get(name, 0) for trial in mine)) for name in names]
            wrong = sum(bool(trial.fault) for trial in mine)
            rows.append([group or "all", str(len(mine)), *counts, str(wrong)])
        return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"

    def write(self) -> None:
        """NAME.md: the table and what went wrong; NAME.json: the same for programs."""
        wrong = "".join(f"- `{trial.key}`: {trial.fault}\n" for trial in self.faults)
        (self.folder / f"{self.name}.md").write_text(self.table() + ("\n" + wrong if wrong else ""), encoding="utf-8")
        summary = {"trials": len(self.trials), "faults": [asdict(trial) for trial in self.faults]}
        (self.folder / f"{self.name}.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")


def options(description: str, count: int) -> argparse.ArgumentParser:
    """The options that all campaigns share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--count", type=int, default=count, help="trials")
    parser.add_argument("--seed", type=int, default=0, help="other trials of the same kinds")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/campaign"), help="folder of results and of the trials' files"
    )
    parser.add_argument("--only", default="", help="only groups whose name holds this text")
    return parser


def end(results: Results) -> int:
    """Print the table; 1 where anything went wrong."""
    print(results.table())
    for trial in results.faults[:20]:
        print(f"{trial.key}: {trial.fault}")
    return 1 if results.faults else 0
