"""The background writer: order, errors that come out, no waiting for a busy thread, copies as they were."""

import threading

import pytest
import torch

from fd2fast.system.writer import Writer, to_host


def test_jobs_run_in_order_and_flush_waits() -> None:
    found: list[int] = []
    with Writer(depth=2) as writer:
        for number in range(20):
            writer.submit(found.append, number)
        writer.flush()
        assert found == list(range(20))
        assert not writer.busy
        writer.submit(found.append, 20)
    assert found[-1] == 20  # leaving waits, too


def test_submit_waits_only_when_too_many_are_waiting() -> None:
    gate = threading.Event()
    with Writer(depth=2) as writer:
        for _ in range(3):  # one runs, two wait
            writer.submit(gate.wait)
        assert writer.busy
        blocked = threading.Thread(target=writer.submit, args=(gate.wait,))
        blocked.start()
        blocked.join(timeout=0.2)
        assert blocked.is_alive()
        gate.set()
        blocked.join(timeout=600)
        assert not blocked.is_alive()


@pytest.mark.parametrize("call", ["flush", "submit", "busy", "leave"])
def test_what_a_job_raises_comes_out(call: str) -> None:
    def fail() -> None:
        raise OSError("disk full")

    def use() -> None:
        with Writer(depth=0 if call == "submit" else 4) as writer:
            writer.submit(fail)
            if call == "flush":
                writer.flush()
            elif call == "submit":
                writer.submit(fail)
            elif call == "busy":
                while writer.busy:
                    pass

    with pytest.raises(OSError, match="disk full"):
        use()


def test_an_error_in_the_work_drops_what_waits_but_ends_what_runs() -> None:
    found: list[str] = []
    gate, running = threading.Event(), threading.Event()

    def slow() -> None:
        running.set()
        gate.wait(10)
        found.append("ran")

    def use() -> None:
        with Writer() as writer:
            writer.submit(slow)
            writer.submit(found.append, "waited")
            running.wait(10)
            gate.set()
            raise KeyError("the work")

    with pytest.raises(KeyError, match="the work"):
        use()
    assert found[0] == "ran"


def test_copies_are_as_the_tensors_were() -> None:
    image = torch.arange(12.0).reshape(1, 3, 2, 2).to(memory_format=torch.channels_last).requires_grad_()
    copies = to_host({"image": image, "count": torch.tensor(3)})
    with torch.no_grad():
        image.zero_()
    found = copies()
    assert torch.equal(found["image"].flatten(), torch.arange(12.0))
    assert found["image"].is_contiguous()
    assert not found["image"].requires_grad
    assert int(found["count"]) == 3
