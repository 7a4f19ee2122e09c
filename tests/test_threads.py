"""Cores by affinity, quota and environment; waiting that does not spin; a busy machine is noticed once."""

import logging

import pytest

from fd2fast.system import threads


@pytest.fixture
def four(monkeypatch, tmp_path):
    """Four cores by affinity, no quota, an empty environment; the folder of the quota."""
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: {0, 2, 4, 6}, raising=False)
    monkeypatch.setattr(threads, "_CGROUP", tmp_path)
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_affinity(four):
    assert threads.free_cores() == 4


@pytest.mark.parametrize(
    ("text", "cores"),
    [("max 100000", 4), ("150000 100000", 1), ("250000 100000", 2), ("50000 100000", 1), ("900000 100000", 4)],
)
def test_quota(four, text, cores):
    (four / "cpu.max").write_text(text + "\n")
    assert threads.free_cores() == cores


@pytest.mark.parametrize(("quota", "cores"), [("-1", 4), ("200000", 2), ("nonsense", 4)])
def test_older_quota(four, quota, cores):
    (four / "cpu").mkdir()
    (four / "cpu/cpu.cfs_quota_us").write_text(quota)
    (four / "cpu/cpu.cfs_period_us").write_text("100000")
    assert threads.free_cores() == cores


def test_without_affinity(four, monkeypatch):
    monkeypatch.delattr(threads.os, "sched_getaffinity")
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 3)
    assert threads.free_cores() == 3


@pytest.mark.parametrize(("given", "count"), [("3", 3), ("8,2", 8), ("", 4), ("0", 4), ("many", 4)])
def test_the_environment_wins(four, monkeypatch, given, count):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert threads.budget() == count


def test_settings_for_openmp(four, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(threads.os, "environ", {})
    threads.settle()
    assert threads.os.environ["OMP_NUM_THREADS"] == "4"
    assert int(threads.os.environ["GOMP_SPINCOUNT"]) > 0
    monkeypatch.setattr(threads.os, "environ", {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "active"})
    threads.settle()
    assert threads.os.environ == {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "active"}


def test_a_busy_machine_is_said_once(monkeypatch, caplog):
    clock, waited = [0.0], [0.0]
    monkeypatch.setattr(threads.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(threads, "_seconds_waited", lambda: waited[0])
    watch = threads.Watch(2, every=10.0)
    clock[0], waited[0] = 5.0, 9.0
    with caplog.at_level(logging.WARNING):
        assert watch.look() is False  # too early
        clock[0] = 10.0
        assert watch.look() is True  # 9 of 20 core-seconds
        clock[0], waited[0] = 20.0, 19.0
        assert watch.look() is True
        clock[0], waited[0] = 30.0, 20.0
        assert watch.look() is False
    assert [r.getMessage().split(":")[0] for r in caplog.records] == ["this machine is busy"]
    assert "45 %" in caplog.text


def test_where_the_system_does_not_say(monkeypatch):
    monkeypatch.setattr(threads, "_seconds_waited", lambda: None)
    assert threads.Watch(2, every=0.0).look() is False
