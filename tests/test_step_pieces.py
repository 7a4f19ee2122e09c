"""The pieces of the step by themselves, without a teacher: phases, schedule, update, images of a new phase."""

import math

import pytest
import torch
from distill_tools import tiny_config

from fd2fast.step import Priors
from fd2fast.step.phases import Phases
from fd2fast.step.schedule import ResizedPriors, Schedule
from fd2fast.step.state import FIRST_SCALE, NewImages, State
from fd2fast.step.update import PixelAdam, ScaledPixelAdam, make_update

LOW, HIGH = torch.full((3,), -1.0), torch.full((3,), 1.0)


def schedule(method: str, committees: list[list[int]], offsets: list[int], priors: list | None = None) -> Schedule:
    config = tiny_config(method, iterations=(4,), sizes=(32,))
    labels = torch.arange(offsets[-1]) % 5
    return Schedule(config, [70.0, 75.0, 60.0], committees, offsets, labels, priors or [None] * 3, torch.float64)


def test_phases() -> None:
    phases = Phases(tiny_config("fadrm", iterations=(2, 3, 4), sizes=(16, 24, 32), residual=0.25))
    assert (phases.begins, phases.ends, phases.sizes) == ((0, 2, 5), (2, 5, 9), (16, 24, 32))
    assert [phases.of(t) for t in range(10)] == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2]
    initial, images = torch.rand(2, 3, 32, 32), torch.rand(2, 3, 24, 24)
    assert phases.first_images(initial).shape[-1] == 16
    resized = torch.nn.functional.interpolate(images, size=(32, 32), mode="bilinear")
    torch.testing.assert_close(phases.next_images(2, images, initial), 0.25 * resized + 0.75 * initial)


def test_a_round_robin_has_each_committees_turns() -> None:
    turns = schedule("fadrm+", [[0, 1], [2, 0, 1]], [0, 2, 5])
    assert len(turns) == 6
    for t in range(12):
        teachers = {s: task.teacher for task in turns.tasks(t) for s in task.part.segments}
        assert teachers == {0: [0, 1][t % 2], 1: [2, 0, 1][t % 3]}
        assert all(task.weights is None for task in turns.tasks(t))
    both = next(task for t in range(6) for task in turns.tasks(t) if task.part.segments == (0, 1))
    assert both.part.rows is None
    alone = next(task for t in range(6) for task in turns.tasks(t) if task.part.segments == (1,))
    assert (alone.part.rows.tolist(), alone.part.offsets, alone.part.labels.tolist()) == ([2, 3, 4], (0, 3), [2, 3, 4])
    assert turns.kind(0) == turns.kind(6) != turns.kind(1)
    with pytest.raises(ValueError, match="must repeat within 1024 iterations, theirs take 5005"):
        schedule("fadrm+", [[0] * n for n in (5, 7, 11, 13)], list(range(5)))


def test_a_committee_is_weighted_by_accuracy() -> None:
    (first, second, third) = schedule("cvdd", [[0, 1], [1, 2]], [0, 1, 2]).tasks(0)
    assert [task.part.segments for task in (first, second, third)] == [(0,), (0, 1), (1,)]
    share = 1 / (1 + math.exp(-1))  # 75 against 70 percent
    assert first.weights.tolist() == pytest.approx([1 - share])
    assert second.weights.tolist() == pytest.approx([share, 1 / (1 + math.exp(-3))])


def test_priors_follow_the_rows_and_the_maps() -> None:
    maps = torch.rand(4, 2, 4, 4)
    turns = schedule(
        "fadrm+_fd2", [[0], [1]], [0, 2, 4], [Priors(maps, (0, 1, 1, 3, 4)), Priors(maps, (0, 0, 0, 3, 4)), None]
    )
    one, other = turns.tasks(0)
    assert torch.equal(one.prior.maps, maps[:1])
    assert (one.prior.offsets, other.prior.offsets) == ((0, 1, 1), (0, 3, 4))
    sizes = ResizedPriors()
    assert sizes.at(one, (4, 4)) is one.prior
    assert sizes.at(one, (2, 2)).maps.shape == (1, 2, 2, 2)
    assert sizes.at(one, (2, 2)) is sizes.at(one, (2, 2))


def test_loss_scale_doubles_after_2000_iterations_without_overflow() -> None:
    state = State(torch.zeros(3, 3, 8, 8), 2)
    update = ScaledPixelAdam(tiny_config("sre2l++", iterations=(4,), precision="fp16"), LOW, HIGH, [0, 1, 3])
    state.clean[:] = torch.tensor([1999.0, 1998.0])
    gradient = torch.full((3, 3, 8, 8), FIRST_SCALE)
    unscaled = update(state, gradient, 0.1, 1)
    assert torch.equal(unscaled, torch.ones_like(gradient))
    assert (state.scale.tolist(), state.clean.tolist()) == ([2 * FIRST_SCALE, FIRST_SCALE], [0.0, 1999.0])
    torch.testing.assert_close(state.images, torch.full_like(state.images, -0.1))
    assert update.scaled(torch.ones(1), state, torch.tensor([0])).tolist() == [2 * FIRST_SCALE]
    for precision, kind in (("fp16", ScaledPixelAdam), ("bf16", PixelAdam)):
        assert (
            type(make_update(tiny_config("sre2l++", iterations=(4,), precision=precision), LOW, HIGH, [0, 1])) is kind
        )


def test_new_images_can_be_undone() -> None:
    state = State(torch.rand(2, 3, 8, 8), 1)
    state.exp_avg += 1
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    begun = NewImages(state, torch.rand(2, 3, 16, 16))
    assert state.images.shape[-1] == state.exp_avg.shape[-1] == 16
    assert not state.exp_avg.any()
    begun.undo()
    for name, tensor in state.tensors().items():
        assert torch.equal(tensor, before[name])
