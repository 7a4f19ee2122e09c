"""How many cores are free to this process, how its threads wait for each other, and whether others hold the cores."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

log = logging.getLogger("fd2fast")

_CGROUP = Path("/sys/fs/cgroup")
# Rounds that a thread of GNU's OpenMP looks for work before it sleeps. Measured with the main job's step, two threads, EPYC
# (Zen 5) capped to AVX2, alone / beside a program that holds one of the two cores: by default 22.5 / 64 ms, 2,000 rounds
# 24 / 50, 1,000 rounds 25 / 41, 500 rounds 26 / 39, sleeping at once 30 / 37.
_SPINS = "1000"
# Share of the asked-for core time below which the machine counts as overloaded.
_LEAST_SHARE = 0.6


def free_cores() -> int:
    """Cores that this process may use: its affinity, and less where a container's CPU quota ends before; at least 1."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        count = os.cpu_count() or 1
    quota = _quota()
    return max(1, count if quota is None else min(count, int(quota)))


def _quota() -> float | None:
    """Cores of a container's quota (cgroup 2, then 1); None without one."""
    try:
        given, period = (_CGROUP / "cpu.max").read_text().split()
        return None if given == "max" else int(given) / int(period)
    except (OSError, ValueError):
        pass
    try:
        microseconds = int((_CGROUP / "cpu/cpu.cfs_quota_us").read_text())
        period_us = int((_CGROUP / "cpu/cpu.cfs_period_us").read_text())
        return microseconds / period_us if microseconds > 0 else None
    except (OSError, ValueError, ZeroDivisionError):
        return None


def budget() -> int:
    """Threads that the work may take: OMP_NUM_THREADS where it is set, else the free cores."""
    given = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(given) if given.isdigit() and int(given) > 0 else free_cores()


def settle() -> None:
    """Set threads and their waiting for the process, before torch is imported; what the environment says stays.

    OpenMP's threads look for work without sleeping for milliseconds by default. With another program on one of two cores,
    each barrier then costs the rest of its time slice.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(budget()))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


class Watch:
    """Says once in the log when this process gets much less core time than it asks for."""

    def __init__(self, threads: int, every: float = 20.0):
        """threads: cores that the work can fill; every: seconds between looks."""
        self._threads, self._every = threads, every
        self._told = False
        self._start()

    def _start(self) -> None:
        self._wall, self._waited = time.monotonic(), _seconds_waited()

    def look(self) -> bool:
        """Call it now and then; whether the machine was overloaded since the look before."""
        lost = self.lost()
        if lost is not None and not self._told:
            say_busy(lost)
            self._told = True
        return lost is not None

    def lost(self) -> float | None:
        """Share of the time since the look before in which the work waited for a core; None where that is little."""
        seconds = time.monotonic() - self._wall
        if seconds < self._every:
            return None
        waited = _seconds_waited()
        known = waited is not None and self._waited is not None
        share = (waited - self._waited) / (seconds * self._threads) if known else 0.0  # type: ignore[operator]
        self._start()
        return share if share > 1 - _LEAST_SHARE else None


def say_busy(lost: float) -> None:
    """The line in the log; lost: share of the time without a core."""
    log.warning(
        "this machine is busy: the work waited for a core %.0f %% of the time; other programs hold them "
        "(fewer threads may be faster: OMP_NUM_THREADS)",
        100 * lost,
    )


def _seconds_waited() -> float | None:
    """Seconds that this process's threads were ready and waited for a core; None where the system does not say."""
    try:
        tasks = Path("/proc/self/task").iterdir()
        return sum(int((task / "schedstat").read_text().split()[1]) for task in tasks) / 1e9
    except (OSError, ValueError, IndexError):
        return None


if __name__ == "__main__":
    print(free_cores())
