"""Processes of one job: numbers are shared out once each, the first goes first, one alone needs nobody."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fd2fast import cli
from fd2fast.errors import UserError
from fd2fast.system.processes import Workers, current, is_first, local_count

JOB = """
import sys, time
from pathlib import Path
from fd2fast.system.processes import current, is_first, local_count
workers, out = current(), Path(sys.argv[1])
assert (workers.world, local_count(), is_first()) == (2, 2, workers.rank == 0)
made = workers.first(lambda: (out / "made").exists() or ((out / "made").touch(), time.sleep(.3)))
assert (made is True) == (workers.rank == 1)
for value in (["a fault"], []):
    assert workers.told(lambda: value if workers.rank == 0 else 1 / 0) == value
for round in range(2):
    mine = []
    for number in workers.share(20):
        mine.append(number)
        if len(mine) == 1:
            workers.wait()  # each has one, however late it came
        time.sleep(.001)
    (out / f"{round}-{workers.rank}").write_text(" ".join(map(str, mine)))
    workers.wait()
"""


def test_two_processes(tmp_path: Path) -> None:
    script = tmp_path / "job.py"
    script.write_text(JOB)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([*command, str(tmp_path)], env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    for turn in range(2):
        parts = [[int(n) for n in (tmp_path / f"{turn}-{rank}").read_text().split()] for rank in range(2)]
        assert all(part == sorted(part) and part for part in parts)
        assert sorted(parts[0] + parts[1]) == list(range(20))


def test_alone_nothing_is_waited_for() -> None:
    workers = Workers()
    workers.wait()
    assert list(workers.share(3)) == [0, 1, 2]
    assert workers.first(lambda: "done") == "done"
    assert workers.told(lambda: ["done"]) == ["done"]
    assert is_first()
    assert local_count() == 1
    assert current().world == 1


def test_the_end_of_another_process_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever call notices it: a wait, the first's turn, or the next number."""
    import torch.distributed as dist

    def closed(*_: object) -> int:
        raise RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:19610")

    class Store:
        add = closed

    monkeypatch.setattr(dist, "barrier", closed)
    workers = Workers(1, 2, Store())
    for call in (workers.wait, lambda: workers.first(lambda: "done"), lambda: list(workers.share(3))):
        with pytest.raises(UserError, match="another process of this job has ended"):
            call()


def test_other_commands_refuse_to_be_shared(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["pretrain", "--dataset", "D", "--out", "O"]) == 2
    assert "pretrain runs in one process: start it without torchrun (distill, run can share)" in capsys.readouterr().err
