"""The grouped step: independent segments, half precision, state, no host synchronisation, refusals."""

import pytest
import torch
from distill_tools import MEAN, OTHER, SMALL, STD, tiny_config, tiny_teacher
from torch.utils._python_dispatch import TorchDispatchMode

from fd2fast.config import DistillConfig
from fd2fast.errors import UserError
from fd2fast.planner import iteration_table, make_plan
from fd2fast.step import TERMS, GroupedStep, Priors, check_losses, segment_mean_matrix

LOW = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)], dtype=torch.float64)
HIGH = torch.tensor([(1 - m) / s for m, s in zip(MEAN, STD, strict=True)], dtype=torch.float64)
CLASSES, SIZE = 7, 32


def teachers_of(method: str, dtype: torch.dtype = torch.float64) -> list:
    teachers = [tiny_teacher(f"{SMALL},output_stride=8", CLASSES, dtype=dtype)]
    if method.startswith(("fadrm+", "cvdd")):
        teachers.append(
            tiny_teacher(f"{OTHER},output_stride=8", CLASSES, seed=1, alpha=0.7, accuracy=57.0, dtype=dtype)
        )
        teachers.append(tiny_teacher(f"{SMALL},output_stride=8", CLASSES, seed=2, maps=2, accuracy=44.0, dtype=dtype))
    return teachers


def pixels(segment: int, rows: int) -> torch.Tensor:
    """Normalised images of a segment, whatever shares its step."""
    generator = torch.Generator().manual_seed(int(segment))
    unit = torch.rand(rows, 3, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return LOW.view(3, 1, 1) + unit * (HIGH - LOW).view(3, 1, 1)


def table(config: DistillConfig, segments: list[int], iteration: int, size: int) -> torch.Tensor:
    return torch.from_numpy(iteration_table(3, segments, iteration, 1, size, jitter=config.jitter)[0])


def optimise(config: DistillConfig, teachers: list, plan, segments: list[int]) -> torch.Tensor:
    """The images of these segments in one step; slots above 0 get made-up finished images."""
    offsets = plan.rows(segments).tolist()
    initial = torch.cat([pixels(s, b - a) for s, a, b in zip(segments, offsets, offsets[1:], strict=False)])
    earlier, bounds = plan.priors(segments)
    priors = []
    for teacher in teachers:
        maps, lengths = [], []
        for position, segment in enumerate(segments):
            found = [pixels(1000 + p, CLASSES) for p in earlier[bounds[position] : bounds[position + 1]]]
            for label in range(plan.first_class[segment], plan.end_class[segment]):
                maps += [teacher(images[label][None]).attention for images in found]
                lengths.append(len(found))
        ends = [sum(lengths[: n + 1]) for n in range(len(lengths))]
        priors.append(Priors(torch.cat(maps), (0, *ends)) if maps else None)
    committees = None
    if config.teachers_per_image:  # differ from segment to segment
        committees = [[s % 3, 2] if s % 3 < 2 else [0, 1] for s in segments]
    labels = torch.from_numpy(plan.labels(segments))
    with GroupedStep(
        config, teachers, initial, labels, offsets, low=LOW, high=HIGH, committees=committees, priors=priors
    ) as step:
        while not step.finished:
            step.iterate(table(config, segments, step.iteration, step.size))
        return step.images


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("sre2l++_fd2", {"iterations": (30,)}),
        ("sre2l++", {"iterations": (10,)}),
        ("fadrm+_fd2", {"iterations": (12, 18), "sizes": (24, 32)}),
        ("cvdd_fd2", {"iterations": (12,)}),
        ("fadrm+_fd2", {"iterations": (6, 7), "sizes": (24, 32), "teachers_per_image": 2}),
    ],
)
def test_grouped_is_alone(method: str, changes: dict) -> None:
    """IPC 5, N_S 4, three class blocks of uneven size (3, 3, 1): one step or one segment at a time, fp64, 1e-8."""
    config = tiny_config(method, classes=CLASSES, segment_size=3, ipc=5, **changes)
    teachers = teachers_of(method)
    plan = make_plan(CLASSES, 5, segment_size=3, segments_per_step="max")
    step = next(s for s in plan.steps() if s.wave == 1)
    segments = [int(s) for s in step.segments][:3]
    lengths = [int(plan.end_class[s] - plan.first_class[s]) for s in segments]
    assert len(set(lengths)) > 1
    together = optimise(config, teachers, plan, segments)
    alone = torch.cat([optimise(config, teachers, plan, [s]) for s in segments])
    assert (together - alone).abs().max() < 1e-8
    assert together.std() > 0.1


def one_segment(
    config: DistillConfig, teachers: list, dtype: torch.dtype = torch.float32, rows: int = 4
) -> GroupedStep:
    initial = pixels(0, rows).to(dtype)
    generator = torch.Generator().manual_seed(1)
    maps = [
        Priors(torch.rand(rows, t.attention_maps, 4, 4, dtype=dtype, generator=generator), tuple(range(rows + 1)))
        for t in teachers
    ]
    return GroupedStep(
        config,
        teachers,
        initial,
        torch.arange(rows),
        [0, rows],
        low=LOW,
        high=HIGH,
        priors=maps if config.fd2 else None,
    )


def test_state_goes_on_where_it_stopped() -> None:
    """Saved in the second phase and loaded into a new step: the same bytes."""
    config = tiny_config("fadrm+_fd2", classes=CLASSES, iterations=(5, 6), sizes=(24, 32), precision="fp32")
    teachers = teachers_of("fadrm+", torch.float32)
    with one_segment(config, teachers) as step:
        while not step.finished:
            step.iterate(table(config, [0], step.iteration, step.size))
            if step.iteration == 7:
                state = step.state()
    with one_segment(config, teachers) as again:
        again.load_state(state)
        assert (again.phase, again.iteration, again.size, again.phase_end) == (1, 7, 32, 11)
        while not again.finished:
            again.iterate(table(config, [0], again.iteration, again.size))
    assert torch.equal(step.images, again.images)
    assert torch.equal(step.exp_avg_sq, again.exp_avg_sq)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_follows_fp32(precision: str) -> None:
    """One step's gradient: right direction and length; losses within the precision."""
    teachers = teachers_of("sre2l++", torch.float32)
    found = {}
    for name in ("fp32", precision):
        config = tiny_config("sre2l++_fd2", classes=CLASSES, iterations=(3,), precision=name)
        with one_segment(config, teachers) as step:
            losses = step.iterate(table(config, [0], 0, SIZE))
            found[name] = losses, step.gradient
            assert step.images.dtype == step.exp_avg_sq.dtype == losses.dtype == torch.float32
    (exact, right), (rough, near) = found["fp32"], found[precision]
    torch.testing.assert_close(rough, exact, rtol=0.03, atol=0.03)
    cosine = torch.nn.functional.cosine_similarity(near.flatten(), right.flatten(), dim=0)
    assert cosine > 0.97
    assert 0.9 < near.norm() / right.norm() < 1.1


def test_fp16_overflow_skips_only_its_segment() -> None:
    config = tiny_config("sre2l++", classes=CLASSES, iterations=(4,), precision="fp16")
    teacher = tiny_teacher(SMALL, CLASSES, dtype=torch.float32)
    initial = pixels(0, 4).float()
    with GroupedStep(config, [teacher], initial, torch.arange(4), [0, 2, 4], low=LOW, high=HIGH) as step:
        step.scale[0] = 1e30
        before = step.images.clone()
        step.iterate(table(config, [0, 1], 0, SIZE))
        assert torch.equal(step.images[:2], before[:2])
        assert (step.exp_avg[:2] == 0).all()
        assert not torch.equal(step.images[2:], before[2:])
        assert step.scale.tolist() == pytest.approx([5e29, 2.0**16])


class _Syncs(TorchDispatchMode):
    """Collects the operations that read a value back to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket._qualified_op_name in ("aten::_local_scalar_dense", "aten::item", "aten::nonzero"):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["sre2l++_fd2", "fadrm+_fd2"])
def test_no_value_is_read_back_in_the_loop(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value checks of the operations are off, as they are on a GPU."""
    from fd2fast.ops import _checks

    monkeypatch.setattr(_checks, "reads_values", lambda tensor: False)
    config = tiny_config(method, classes=CLASSES, iterations=(6,), sizes=(32,), precision="fp32", ls_threshold=0.1)
    with one_segment(config, teachers_of(method, torch.float32)) as step:
        draws = [table(config, [0], t, SIZE) for t in range(6)]
        with _Syncs() as syncs:
            for draw in draws:
                step.iterate(draw)
        assert syncs.found == []
        with _Syncs() as syncs:  # the detector detects
            step.images.sum().item()
        assert syncs.found


def test_losses_fall() -> None:
    """On a teacher trained for a moment, every term of the loss that can fall does."""
    torch.manual_seed(0)
    teacher = tiny_teacher(f"{SMALL},output_stride=8", CLASSES, dtype=torch.float32).requires_grad_(True).train()
    prototypes = torch.rand(CLASSES, 3, 8, 8)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(CLASSES, (28,))
        images = torch.nn.functional.interpolate(prototypes[labels], size=SIZE) + 0.1 * torch.randn(28, 3, SIZE, SIZE)
        return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1), labels

    optimizer = torch.optim.Adam(teacher.parameters(), 3e-3)
    cross_entropy = torch.nn.functional.cross_entropy
    for _ in range(60):
        images, labels = batch()
        out = teacher(images)
        loss = cross_entropy(out.logits, labels) + cross_entropy(out.cal_logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    teacher.eval().requires_grad_(False)
    with torch.no_grad():
        images, labels = batch()
        z = teacher(images).z
        for k in range(CLASSES):
            teacher.prototypes_ema[k] = torch.nn.functional.normalize(z[labels == k].mean(0), dim=0)

    config = tiny_config("sre2l++_fd2", classes=CLASSES, iterations=(60,), precision="fp32", lr=0.1, alpha=0.5)
    rows = CLASSES
    initial = pixels(0, rows).float()
    prior = Priors(teacher(initial).attention, tuple(range(rows + 1)))  # its own start: L_S begins near its largest
    with GroupedStep(
        config, [teacher], initial, torch.arange(rows), [0, rows], low=LOW, high=HIGH, priors=[prior]
    ) as step:
        curves = torch.stack(
            [step.iterate(table(config, [0], step.iteration, SIZE))[0] for _ in range(step.total_iterations)]
        )
    first, last = curves[:5].mean(0), curves[-5:].mean(0)
    for column, term in enumerate(TERMS):
        assert last[column] < first[column], f"{term} rose from {first[column]:.3f} to {last[column]:.3f}"
    assert last[0] < 0.6 * first[0]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", [SMALL, OTHER])
def test_one_row_has_the_gradient_of_its_row(name: str, channels_last: bool) -> None:
    """torch's CPU batch norm misreads one-sample gradients in some layouts; pooling must not hand it one."""
    teacher = tiny_teacher(f"{name},output_stride=8", CLASSES)
    if channels_last:
        teacher = teacher.to(memory_format=torch.channels_last)
    images, weight = pixels(1, 3), torch.randn(3, teacher.prototypes_ema.shape[1], dtype=torch.float64)

    def gradient(rows: slice) -> torch.Tensor:
        x = images[rows].clone().requires_grad_(True)
        out = teacher(x)
        (out.z * weight[rows]).sum().backward()
        return x.grad

    together, alone = gradient(slice(0, 3))[2:], gradient(slice(2, 3))
    torch.testing.assert_close(alone, together, rtol=1e-8, atol=1e-12)
    assert alone.abs().max() > 1e-6


def test_teachers_are_left_as_they_were() -> None:
    teacher = tiny_teacher(SMALL, CLASSES, dtype=torch.float32)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    config = tiny_config("sre2l++_fd2", classes=CLASSES, iterations=(1,), precision="bf16")
    with one_segment(config, [teacher]) as step:
        step.iterate(table(config, [0], 0, SIZE))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in teacher.modules())
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, before[name])


def test_segment_means() -> None:
    matrix = segment_mean_matrix([0, 2, 3], torch.device("cpu"), torch.float64)
    assert torch.equal(matrix, torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64))


def test_losses_that_are_not_finite_are_named() -> None:
    check_losses([1.0, 2.0], 3, 40)
    with pytest.raises(UserError, match="segment 3 are not finite at iteration 40: lower lr"):
        check_losses([1.0, float("nan")], 3, 40)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offsets": [0, 3]}, "offsets must rise from 0 to the 4 rows"),
        ({"offsets": [0, 4, 4]}, "offsets must rise"),
        ({"labels": torch.arange(3)}, r"labels must be \[4\], got \[3\]"),
        ({"initial": torch.zeros(4, 3, 16, 16)}, r"initial must be \[N, 3, 32, 32\]"),
        ({"committees": [[]]}, "at least one teacher"),
        ({"priors": []}, "priors must be given for each of 1 teachers"),
        ({"priors": [Priors(torch.zeros(3, 3, 4, 4), (0, 1, 2, 3, 4))]}, "prior offsets must be"),
    ],
)
def test_shapes_are_checked(changes: dict, message: str) -> None:
    config = tiny_config("sre2l++_fd2", classes=CLASSES, iterations=(1,), precision="fp32")
    arguments = {
        "initial": pixels(0, 4).float(),
        "labels": torch.arange(4),
        "offsets": [0, 4],
        "low": LOW,
        "high": HIGH,
        **changes,
    }
    with pytest.raises(ValueError, match=message):
        GroupedStep(config, [tiny_teacher(SMALL, CLASSES, dtype=torch.float32)], **arguments)


def test_a_teacher_in_train_mode_is_refused() -> None:
    config = tiny_config("sre2l++", classes=CLASSES, iterations=(1,), precision="fp32")
    teacher = tiny_teacher(SMALL, CLASSES, dtype=torch.float32)
    teacher.backbone.train()
    with pytest.raises(ValueError, match="must be in eval mode, but .* is in train mode"):
        one_segment(config, [teacher])
