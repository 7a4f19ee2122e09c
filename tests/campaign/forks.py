"""Commands of fd2fast in forked processes: begun in milliseconds, alone or two as one job, watched and ended."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import gc
import importlib
import io
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# read when torch and fd2fast are imported: runs are compared byte for byte
os.environ.update(
    OMP_NUM_THREADS="1", FD2FAST_TUNE="0", FD2FAST_CACHE="", FD2FAST_PROGRESS="0", CUDA_VISIBLE_DEVICES=""
)

PATIENCE = 60.0  # seconds after which a command counts as hung
GRACE = 10.0  # seconds that a process has to end after a signal, and what it began after its end
# How a command begins the line that says why it failed, alone or as one of several processes.
_REASON = re.compile(r"^error(?: \(process \d+ of the job\))?: ", re.MULTILINE)


# What commands import, also late.
MODULES = (
    *(
        f"fd2fast.{name}"
        for name in (
            "cli",
            "distillation.runner",
            "pipeline",
            "students.student",
            "info",
            "students.baselines",
            "data.prepare",
        )
    ),
    *(
        f"fd2fast.stages.{name}"
        for name in ("distill", "evaluate", "exchange", "patches", "pretrain", "relabel", "report")
    ),
    *(
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
        "matplotlib.font_manager",
        "scipy.io",
        "timm",
        "torchvision",
    ),
    *(
        "torch._dynamo",
        "torch.distributed",
        "tyro",
        "tyro.constructors",
        "tyro._backends",
        "multiprocessing.synchronize",
    ),
)


@functools.cache
def load() -> None:
    """Load everything that a command may need, once for all forks; torch computes nothing here."""
    for name in MODULES:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    from fd2fast.distillation import runner
    from fd2fast.stages import relabel
    from fd2fast.students import student

    # saves as often as there can be any, so that accidents meet them
    runner._SAVE_SECONDS = relabel.SAVE_SECONDS = student.SAVE_SECONDS = 0.0  # type: ignore[misc]
    _draw()
    # collections in the forks pass over what is here, which they would else have to copy
    gc.collect()
    gc.freeze()


def _draw() -> None:
    """A picture for nothing: what matplotlib and Pillow load with the first one is loaded."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    Image.init()
    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(title="title", xlabel="x", ylabel="y", yscale="log")
    axes.plot([1, 2], [1, 100], label="line")
    axes.legend()
    figure.savefig(io.BytesIO())


@dataclass(frozen=True)
class Ended:
    """How a job ended. code: exit code, or minus the signal, of the process that was the first not to end well (0: all did)."""

    code: int
    out: str
    errors: str
    seconds: float
    hung: bool = False
    orphans: int = 0

    @property
    def explained(self) -> bool:
        """Whether a line of its says why it failed."""
        return _REASON.search(self.errors) is not None

    @property
    def reason(self) -> str:
        """What it said, without most of a traceback."""
        lines = [line for line in self.errors.splitlines() if line.strip() and not line.startswith(" ")]
        return " ".join(" | ".join(lines).split())[-400:]


class Job:
    """A command in `world` processes, which share the environment of a torchrun job where there are several."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        world: int = 1,
        before: Callable[[], None] | None = None,
        environment: Mapping[str, str] | None = None,
    ):
        """before: called in each process ahead of the command; environment: what it has more."""
        self._began = time.monotonic()
        self._words = {"out": b"", "err": b""}
        self._pipes: list[tuple[str, int]] = []
        port = _free_port() if world > 1 else 0
        self.codes: dict[int, int | None] = {}
        self._failed = 0  # the first code that was none of an end in peace
        for rank in range(world):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            job = {name: str(value) for name, value in place.items()} if world > 1 else {}
            job |= environment or {}
            self.codes[self._fork(list(arguments), job, before)] = None

    def _fork(self, arguments: list[str], job: dict[str, str], before: Callable[[], None] | None) -> int:
        sys.stdout.flush()
        sys.stderr.flush()
        # not files: limits on those are among the trials
        pipes = {"out": os.pipe(), "err": os.pipe()}
        parent = os.getpid()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # no thread of this process computes
            child = os.fork()
        if child:
            for name, (reading, writing) in pipes.items():
                os.close(writing)
                os.set_blocking(reading, False)
                self._pipes.append((name, reading))
            return child
        code = 1
        try:
            end_with(parent)
            os.setsid()
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(pipes[name][1], number)
                for end in pipes[name]:
                    os.close(end)
            sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)  # noqa: SIM115
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ.update(job)
            if before is not None:
                before()
            from fd2fast import cli

            code = cli.main(arguments)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            # as the interpreter ends, without the fork's parts of this process
            with contextlib.suppress(BaseException):
                threading._shutdown()  # type: ignore[attr-defined]
                atexit._run_exitfuncs()
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(BaseException):
                    stream.flush()
            os._exit(code)

    @property
    def running(self) -> list[int]:
        """Process ids that have not ended."""
        self._read()
        for pid, code in self.codes.items():
            if code is None:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    code = self.codes[pid] = os.waitstatus_to_exitcode(status)
                    self._failed = self._failed or code
        return [pid for pid, code in self.codes.items() if code is None]

    def _read(self) -> None:
        for name, pipe in self._pipes:
            with contextlib.suppress(BlockingIOError):
                while words := os.read(pipe, 1 << 16):
                    self._words[name] += words

    def send(self, number: int, pids: Sequence[int] | None = None) -> None:
        """A signal to all of its processes that run, or to those given."""
        for pid in self.running if pids is None else pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, until: Callable[[], bool] | None = None, patience: float | None = None) -> Ended:
        """Wait for its end (or until `until` is true, then see `ended`); as torchrun does, the death of one ends the others."""
        deadline = time.monotonic() + (PATIENCE if patience is None else patience)
        hung = False
        while running := self.running:
            if until is not None and until():
                break
            if any(code not in (None, 0) for code in self.codes.values()):
                self.send(signal.SIGTERM)
                self._gone(GRACE)
                self.send(signal.SIGKILL)
                self._gone(GRACE)
                break
            if time.monotonic() > deadline:
                hung = True
                self.send(signal.SIGKILL, running)
                self._gone(GRACE)
                break
            time.sleep(0.004)
        return self.ended(hung)

    def _gone(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.running and time.monotonic() < deadline:
            time.sleep(0.004)
        return not self.running

    def ended(self, hung: bool = False) -> Ended:
        """How it stands now."""
        running = bool(self.running)
        seconds = time.monotonic() - self._began
        orphans = 0 if running else self._orphans()
        self._read()
        if not running:
            for _, pipe in self._pipes:
                os.close(pipe)
            self._pipes.clear()
        out, errors = (self._words[name].decode("utf-8", "replace") for name in ("out", "err"))
        return Ended(self._failed, out, errors, seconds, hung, orphans)

    def _orphans(self) -> int:
        """Processes of its sessions that outlive it by GRACE seconds; they are ended."""
        deadline = time.monotonic() + GRACE
        while left := _of_sessions(set(self.codes)):
            if time.monotonic() > deadline:
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                break
            time.sleep(0.02)
        return len(left)


def run(
    arguments: Sequence[str],
    *,
    world: int = 1,
    before: Callable[[], None] | None = None,
    environment: Mapping[str, str] | None = None,
    patience: float | None = None,
) -> Ended:
    """The command from begin to end; patience: PATIENCE where it is None."""
    return Job(arguments, world=world, before=before, environment=environment).wait(patience=patience)


def draw_plain() -> None:
    """Figures of commands are saved without what is drawn in them, which takes most of a small command's time."""
    from fd2fast import pictures
    from fd2fast.stages import distill, evaluate, pretrain, report

    png = pictures.png

    def plain(figure: Any, dpi: float) -> bytes:
        figure.clear()
        return png(figure, dpi)

    for module in (pictures, distill, evaluate, pretrain, report):
        module.png = plain  # type: ignore[attr-defined]


def end_with(parent: int) -> None:
    """This process is killed when its parent ends, so that none works on in a folder that another campaign takes up."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _of_sessions(sessions: set[int]) -> list[int]:
    """Living processes of these sessions, without those that have ended and wait for their parent."""
    found = []
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else []:
        if not entry.name.isdigit():
            continue
        try:
            state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(session) in sessions and state not in "ZX":
            found.append(int(entry.name))
    return found
