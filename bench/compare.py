"""What changed between two result files, beyond their spread.

fd2fast bench compare OLD.json NEW.json
fd2fast bench compare OLD.json NEW.json --fail-if-slower     # exit code 1 where a row became slower

Rows are matched by everything that says what was measured (method, way, sizes, precision …). A machine is not always equally
fast, but the rows of one method took turns: where they share at least four times, the median of new / old over them is taken for
the machine's drift, printed, and divided out. A time has changed when the ranges between the 10 and 90 % quantiles of both then
do not overlap, a memory figure when it differs by more than 2 %.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from bench import results
from fd2fast.errors import UserError

# what a row measured, where it has these
KEYS = (
    "method",
    "way",
    "case",
    "stage",
    "classes",
    "ipc",
    "group size",
    "segments",
    "images",
    "size",
    "priors",
    "precision",
    "processes",
)
MEMORY = ("peak MB", "reserved MB", "host MB")
LEAST_MEMORY_CHANGE = 0.02
LEAST_ROWS = 4  # of a drift: a change of one row must not pass for it


@dataclass(frozen=True)
class Options:
    """Two files of the same bench."""

    old: Annotated[Path, tyro.conf.Positional]
    new: Annotated[Path, tyro.conf.Positional]
    # Exit code 1 where a row became slower beyond noise.
    fail_if_slower: bool = False


def key_of(row: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What the row measured."""
    return tuple((name, str(row[name])) for name in KEYS if row.get(name) is not None)


def drift(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> dict[Any, float]:
    """How many times slower the new run's machine was, by method: the median over its rows; methods of few are left out."""
    before, after = ({key_of(row): row for row in rows if "ms" in row} for rows in (old, new))
    ratios: dict[Any, list[float]] = {}
    for key, row in before.items():
        if key in after:
            ratios.setdefault(row.get("method"), []).append(after[key]["ms"] / row["ms"])
    return {method: statistics.median(found) for method, found in ratios.items() if len(found) >= LEAST_ROWS}


def compare(old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One line for each time and memory figure of rows that both have, and one for each row that only one has."""
    before, after = ({key_of(row): row for row in rows} for rows in (old, new))
    slower = drift(old, new)
    lines = []
    for key in dict.fromkeys([*before, *after]):
        name = ", ".join(value for _, value in key)
        if key not in before or key not in after:
            lines.append({"row": name, "change": "only in the " + ("new" if key in after else "old")})
            continue
        a, b = before[key], after[key]
        if a.get("note") != b.get("note"):
            lines.append({"row": name, "change": f"note was {a.get('note')!r}, now {b.get('note')!r}"})
        if "ms" in a and "ms" in b:
            lines.append(
                {
                    "row": name,
                    "figure": "ms",
                    "old": a["ms"],
                    "new": b["ms"],
                    "change": _time_change(a, b, slower.get(a.get("method"), 1.0)),
                }
            )
        for figure in MEMORY:
            if a.get(figure) and b.get(figure):
                lines.append(
                    {
                        "row": name,
                        "figure": figure,
                        "old": a[figure],
                        "new": b[figure],
                        "change": _memory_change(a[figure], b[figure]),
                    }
                )
    return lines


def _time_change(a: Mapping[str, Any], b: Mapping[str, Any], slower: float) -> str:
    (a_low, a_high), (b_low, b_high) = ((r.get("ms 10%", r["ms"]), r.get("ms 90%", r["ms"])) for r in (a, b))
    if a_low <= b_high / slower and b_low / slower <= a_high:
        return "within noise"
    factor = slower * a["ms"] / b["ms"]
    return f"{factor:.2f} x faster" if factor > 1 else f"{1 / factor:.2f} x slower"


def _memory_change(a: float, b: float) -> str:
    change = b / a - 1
    return "same" if abs(change) <= LEAST_MEMORY_CHANGE else f"{change:+.0%}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; 2 for files that do not belong together."""
    options = tyro.cli(Options, args=arguments, description=__doc__, prog="fd2fast bench compare")
    try:
        old, new = results.read(options.old), results.read(options.new)
        if old["about"]["bench"] != new["about"]["bench"]:
            raise UserError(
                f"{options.old} is of bench {old['about']['bench']}, {options.new} of {new['about']['bench']}: not to be compared"
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name in ("device", "threads", "driver", "versions", "work"):
        if old["about"].get(name) != new["about"].get(name):
            print(f"different {name}: {old['about'].get(name)} against {new['about'].get(name)}")
    for name, run in (("old", old), ("new", new)):
        print(
            f"{name}: {run['about']['commit'][:10]}, {run['about']['date']}, load before {run['about'].get('load before')}"
        )
    for method, slower in drift(old["rows"], new["rows"]).items():
        print(f"drift of the machine, divided out: {method or 'all rows'} {slower:.3f}")
    lines = compare(old["rows"], new["rows"])
    print(results.markdown(lines, ("row", "figure", "old", "new", "change")))
    any_slower = any(str(line["change"]).endswith("slower") for line in lines)
    return int(options.fail_if_slower and any_slower)


if __name__ == "__main__":
    sys.exit(main())
