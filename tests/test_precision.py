"""Lower precision over a whole optimisation: the loss curves of the engine in bf16 are those of the plain loop in fp32."""

import pytest
import torch
from distill_tools import MEAN, OTHER, SMALL, STD, tiny_config, tiny_teacher

from fd2fast.distillation.planner import iteration_table
from fd2fast.reference.loop import optimise_segment
from fd2fast.step import TERMS, GroupedStep, Priors

CLASSES, SIZE, ITERATIONS, WINDOW = 8, 32, 200, 40
LOW = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)])
HIGH = torch.tensor([(1 - m) / s for m, s in zip(MEAN, STD, strict=True)])


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("sre2l++", {"iterations": (ITERATIONS,)}),
        ("sre2l++_fd2", {"iterations": (ITERATIONS,)}),
        ("fadrm+_fd2", {"iterations": (ITERATIONS // 2,) * 2, "sizes": (24, SIZE)}),
    ],
)
def test_loss_curves_in_bf16_are_those_of_the_plain_loop(method: str, changes: dict) -> None:
    """200 iterations at the method's learning rate: running means of every term within 2 %.

    Single iterations differ: Adam on pixels amplifies rounding, the curves do not.
    """
    teachers = [tiny_teacher(f"{SMALL},output_stride=8", CLASSES, dtype=torch.float32)]
    if method.startswith("fadrm+"):
        teachers.append(tiny_teacher(f"{OTHER},output_stride=8", CLASSES, seed=1, alpha=0.7, dtype=torch.float32))
    config = tiny_config(method, classes=CLASSES, precision="bf16", **changes)
    generator = torch.Generator().manual_seed(1)
    initial = torch.randn(CLASSES, 3, SIZE, SIZE, generator=generator).clamp(-1, 1)
    maps = [torch.rand(CLASSES, t.attention_maps, 4, 4, generator=generator) for t in teachers]
    labels, low, high = torch.arange(CLASSES), LOW, HIGH
    tables, first = [], 0
    for count, size in zip(config.iterations, config.sizes, strict=True):
        tables.append(torch.from_numpy(iteration_table(5, [0], first, count, size, jitter=config.jitter)))
        first += count
    draws = torch.cat([t[:, 0] for t in tables])

    plain: list[list[float]] = []
    optimise_segment(
        initial,
        labels,
        teachers,
        draws.tolist(),
        config,
        low=low.tolist(),
        high=high.tolist(),
        priors=[list(m[:, None]) for m in maps],
        watch=lambda *seen: plain.append([float(seen[3].get(name, 0.0)) for name in TERMS[1:]]),
    )
    found = []
    ragged = [Priors(m, tuple(range(CLASSES + 1))) for m in maps] if config.fd2 else None
    with GroupedStep(config, teachers, initial, labels, (0, CLASSES), low=low, high=high, priors=ragged) as step:
        while not step.finished:
            found.append(step.iterate(draws[step.iteration][None])[0, 1:])
    curves = [torch.tensor(plain, dtype=torch.float64), torch.stack(found).double()]
    wanted, given = (c.unfold(0, WINDOW, 1).mean(dim=2) for c in curves)
    bn = TERMS[1:].index("bn")
    assert wanted[-1, bn] < 0.95 * wanted[0, bn]  # it optimises
    for column, name in enumerate(TERMS[1:]):
        if wanted[:, column].abs().max() > 0:
            apart = ((given - wanted)[:, column].abs() / wanted[:, column].abs()).max()
            assert apart < 0.02, name
