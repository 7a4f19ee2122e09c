"""The grouped step against the plain loop written from the formulas: same draws, same images."""

import pytest
import torch
from distill_tools import MEAN, OTHER, SMALL, STD, tiny_config, tiny_teacher

from fd2fast.distillation.planner import iteration_table
from fd2fast.reference.loop import committee_weights, optimise_segment, prior_attention
from fd2fast.settings.recipe import Recipe
from fd2fast.step import GroupedStep, Priors
from fd2fast.step import committee_weights as step_weights

LOW = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)], dtype=torch.float64)
HIGH = torch.tensor([(1 - m) / s for m, s in zip(MEAN, STD, strict=True)], dtype=torch.float64)
CLASSES = 5


def draws_of(config: Recipe, segment: int) -> torch.Tensor:
    """int [T, 7] over all phases."""
    tables, first = [], 0
    for count, size in zip(config.iterations, config.sizes, strict=True):
        tables.append(torch.from_numpy(iteration_table(7, [segment], first, count, size, jitter=config.jitter)[:, 0]))
        first += count
    return torch.cat(tables)


def initial_images(rows: int, size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    unit = torch.rand(rows, 3, size, size, generator=generator, dtype=torch.float64)
    return LOW.view(3, 1, 1) + unit * (HIGH - LOW).view(3, 1, 1)


def attention_lists(teachers: list, counts: list[int], size: int) -> tuple[list[list[torch.Tensor]], list[Priors]]:
    """Prior attention of `counts[n]` finished images of row n, as the loop and as the step want it."""
    lists, ragged = [], []
    images = initial_images(sum(counts), size, 99)
    offsets = [sum(counts[:n]) for n in range(len(counts) + 1)]
    for teacher in teachers:
        maps = prior_attention(teacher, images.to(teacher.prototypes_ema.dtype))
        lists.append([maps[a:b] for a, b in zip(offsets, offsets[1:], strict=False)])
        ragged.append(Priors(maps, tuple(offsets)))
    return lists, ragged


CASES = {
    "sre2l++": {},
    "sre2l++_fd2": {"iterations": (24,)},
    "fadrm": {"iterations": (10, 11), "sizes": (16, 32)},
    "fadrm_fd2": {"iterations": (11, 10), "sizes": (16, 32)},
    "fadrm+_fd2": {"iterations": (7, 6, 9), "sizes": (16, 32, 32)},
    "fadrm+": {"iterations": (12, 10), "sizes": (16, 32)},
    "cvdd": {"teachers_per_image": None},
    "cvdd_fd2": {"iterations": (22,), "teachers_per_image": None},
    "sre2l++_fd2 released": {"iterations": (21,), "lr": 0.1, "ls_threshold": 0.4, "keep_base_ce": True},
    "sre2l++_fd2 alpha 0": {"iterations": (21,), "alpha": 0.0},
}


def case(name: str, dtype: torch.dtype) -> tuple[Recipe, list]:
    method = name.split()[0]
    changes = {"iterations": (21,), **CASES[name]}
    config = tiny_config(method, semantics="released" if "released" in name else "paper", **changes)
    # stride 8: maps of 4 x 4 at 32 pixels and 2 x 2 at 16, so that priors are resized
    teachers = [tiny_teacher(f"{SMALL},output_stride=8", CLASSES, dtype=dtype)]
    if method.startswith(("fadrm+", "cvdd")):
        teachers.append(
            tiny_teacher(f"{OTHER},output_stride=8", CLASSES, seed=1, alpha=0.7, accuracy=57.0, dtype=dtype)
        )
    return config, teachers


@pytest.mark.parametrize("name", list(CASES))
def test_step_is_the_loop(name: str) -> None:
    """20 iterations and more in fp64: 1e-8."""
    config, teachers = case(name, torch.float64)
    labels = torch.tensor([0, 1, 2, 3, 4])
    initial, draws = initial_images(CLASSES, 32, 1), draws_of(config, 3)
    # image 2 of a group, and one row without a prior
    lists, ragged = attention_lists(teachers, [1, 2, 0, 1, 1], 32)
    wanted = optimise_segment(
        initial, labels, teachers, draws.tolist(), config, low=LOW.tolist(), high=HIGH.tolist(), priors=lists
    )
    with GroupedStep(config, teachers, initial, labels, [0, CLASSES], low=LOW, high=HIGH, priors=ragged) as step:
        while not step.finished:
            losses = step.iterate(draws[step.iteration][None])
    assert wanted.shape == (CLASSES, 3, 32, 32)
    assert (wanted - initial).abs().max() > 0.1
    assert (step.images - wanted).abs().max() < 1e-8
    assert losses.shape == (1, 6)
    assert torch.isfinite(losses).all()


@pytest.mark.parametrize(
    "name", ["sre2l++", "sre2l++_fd2", "fadrm", "fadrm_fd2", "fadrm+", "fadrm+_fd2", "cvdd", "cvdd_fd2"]
)
def test_losses_and_gradient_of_one_step(name: str) -> None:
    """fp32: relative L2 of the gradient below 1e-5; every loss term agrees."""
    config, teachers = case(name, torch.float32)
    labels = torch.tensor([0, 1, 2, 3, 4])
    initial, draws = initial_images(CLASSES, 32, 1).float(), draws_of(config, 3)
    lists, ragged = attention_lists(teachers, [1] * CLASSES, 32)
    seen: list[tuple] = []
    optimise_segment(
        initial,
        labels,
        teachers,
        draws.tolist(),
        config,
        low=LOW.tolist(),
        high=HIGH.tolist(),
        priors=lists,
        iterations=1,
        watch=lambda *values: seen.append(values),
    )
    (_, _, gradient, terms) = seen[0]
    with GroupedStep(config, teachers, initial, labels, [0, CLASSES], low=LOW, high=HIGH, priors=ragged) as step:
        losses = step.iterate(draws[:1])[0]
    assert gradient.norm() > 0
    assert (step.gradient - gradient).norm() < 1e-5 * gradient.norm()
    if not name.startswith("cvdd"):  # there the step gives the weighted sum over the committee
        for column, term in enumerate(("ce_backbone", "ce_cal", "bn", "l_f", "l_s"), start=1):
            torch.testing.assert_close(losses[column], terms.get(term, torch.tensor(0.0)), rtol=1e-5, atol=1e-6)
        assert (losses[5] > 0) == config.fd2


def test_similarity_threshold_drops_the_term() -> None:
    """released: L_S below the threshold has no weight; the total says so, in the step and in the loop."""
    _, teachers = case("sre2l++_fd2", torch.float64)
    labels, initial = torch.arange(CLASSES), initial_images(CLASSES, 32, 1)
    lists, ragged = attention_lists(teachers, [1] * CLASSES, 32)
    totals, gradients = {}, {}
    for threshold in (0.0, 0.999):
        config = tiny_config("sre2l++_fd2", iterations=(1,), ls_threshold=threshold)
        seen: list[torch.Tensor] = []
        optimise_segment(
            initial,
            labels,
            teachers,
            draws_of(config, 0).tolist(),
            config,
            low=LOW.tolist(),
            high=HIGH.tolist(),
            priors=lists,
            watch=lambda t, images, gradient, terms, seen=seen: seen.append(gradient),
        )
        with GroupedStep(config, teachers, initial, labels, [0, CLASSES], low=LOW, high=HIGH, priors=ragged) as step:
            losses = step.iterate(draws_of(config, 0))[0]
        torch.testing.assert_close(step.gradient, seen[0], rtol=1e-9, atol=1e-12)
        totals[threshold], gradients[threshold] = losses, step.gradient
    assert torch.equal(totals[0.0][1:], totals[0.999][1:])
    weight = 1 - config.lam
    torch.testing.assert_close(totals[0.0][0] - totals[0.999][0], weight * totals[0.0][5])
    assert (gradients[0.0] - gradients[0.999]).norm() > 0


def test_committee_weights_agree() -> None:
    teachers = [tiny_teacher(accuracy=a) for a in (70.2, 73.4, 69.6)]
    config = tiny_config("cvdd")
    accuracies = [t.accuracy for t in teachers]
    assert step_weights(accuracies, "prior") == pytest.approx(committee_weights(teachers, config), abs=1e-12)
    assert step_weights(accuracies, "equal") == [1 / 3] * 3
