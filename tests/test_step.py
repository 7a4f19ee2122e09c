"""The grouped step: independent segments, half precision, state, no host synchronisation, refusals."""

import dataclasses
import functools
import weakref

import pytest
import torch
from distill_tools import MEAN, OTHER, SMALL, STD, tiny_config, tiny_teacher
from torch.utils._python_dispatch import TorchDispatchMode

from fd2fast.distillation.planner import iteration_table, make_plan
from fd2fast.errors import UserError
from fd2fast.methods import METHODS, Outputs, Term, register_method
from fd2fast.models.fused import fuse
from fd2fast.settings.recipe import Recipe
from fd2fast.step import TERMS, GroupedStep, Priors, check_losses, map_dtype, segment_mean_matrix
from fd2fast.step.tables import DeviceTable
from fd2fast.step.update import PixelAdam

LOW = torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)], dtype=torch.float64)
HIGH = torch.tensor([(1 - m) / s for m, s in zip(MEAN, STD, strict=True)], dtype=torch.float64)
CLASSES, SIZE = 7, 32
CPU = torch.device("cpu")


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


def table(config: Recipe, segments: list[int], iteration: int, size: int) -> torch.Tensor:
    return torch.from_numpy(iteration_table(3, segments, iteration, 1, size, jitter=config.jitter)[0])


def optimise(config: Recipe, teachers: list, plan, segments: list[int]) -> torch.Tensor:
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
        ("sre2l++", {"iterations": (30,)}),
        ("sre2l++_fd2", {"iterations": (30,)}),
        ("fadrm", {"iterations": (12, 18), "sizes": (24, 32)}),
        ("fadrm_fd2", {"iterations": (12, 18), "sizes": (24, 32)}),
        ("fadrm+", {"iterations": (12, 18), "sizes": (24, 32)}),
        ("fadrm+_fd2", {"iterations": (12, 18), "sizes": (24, 32)}),
        ("cvdd", {"iterations": (30,)}),
        ("cvdd_fd2", {"iterations": (30,)}),
        ("fadrm+_fd2", {"iterations": (6, 7), "sizes": (24, 32), "teachers_per_image": 2}),
    ],
)
def test_grouped_is_alone(method: str, changes: dict) -> None:
    """IPC 5, N_S 4, three class blocks of uneven size (3, 3, 1): one step or one segment at a time, fp64, 1e-8."""
    config = tiny_config(method, classes=CLASSES, segment_size=3, ipc=5, **changes)
    teachers = teachers_of(method)
    plan = make_plan(CLASSES, 5, segment_size=3, segments_per_step="max")
    step = next(s for s in plan.steps() if s.wave == (3 if config.fd2 else 1))  # the last slot sees three images
    segments = [int(s) for s in step.segments][:3]
    lengths = [int(plan.end_class[s] - plan.first_class[s]) for s in segments]
    assert len(set(lengths)) > 1
    together = optimise(config, teachers, plan, segments)
    alone = torch.cat([optimise(config, teachers, plan, [s]) for s in segments])
    assert (together - alone).abs().max() < 1e-8
    assert together.std() > 0.1


def one_segment(
    config: Recipe, teachers: list, dtype: torch.dtype = torch.float32, rows: int = 4, **parts: object
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
        **parts,
    )


@pytest.mark.parametrize("method", ["sre2l++_fd2", "fadrm+"])
def test_losses_compile_without_a_graph_break(method: str) -> None:
    """Teacher, head, all loss terms and their means, forward and backward."""
    config = tiny_config(method, classes=CLASSES, iterations=(4,), sizes=(32,), precision="fp32")
    with one_segment(config, teachers_of(method, torch.float32)) as step:
        task = step.schedule.tasks(0)[0]
        found = []
        for function in (
            step.losses.of,
            torch.compile(step.losses.of, backend="aot_eager", fullgraph=True),
        ):
            view = step.images.clone().requires_grad_()
            losses = function(task, view)
            found.append((losses, torch.autograd.grad(losses[:, 0].sum(), view)[0]))
    assert (found[0][0][:, -1] > 0).all() == config.fd2
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    assert (found[1][1] - found[0][1]).norm() < 1e-5 * found[0][1].norm()


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
    assert torch.equal(step.tensors()["exp_avg_sq"], again.tensors()["exp_avg_sq"])


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
            assert step.images.dtype == step.tensors()["exp_avg_sq"].dtype == losses.dtype == torch.float32
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
        state = step.tensors()
        state["scale"][0] = 1e30
        before = step.images.clone()
        step.iterate(table(config, [0, 1], 0, SIZE))
        assert torch.equal(step.images[:2], before[:2])
        assert (state["exp_avg"][:2] == 0).all()
        assert not torch.equal(step.images[2:], before[2:])
        assert state["scale"].tolist() == pytest.approx([5e29, 2.0**16])


def test_a_methods_own_term_is_summed_and_recorded() -> None:
    """One more term in the method's object: a column of its name behind the others, and its share of total and gradient."""

    def roughness(out: Outputs) -> torch.Tensor:
        return out.mean(out.images.diff(dim=3).square().flatten(1).mean(1) * out.z.norm(dim=1))

    term = Term("roughness", lambda recipe, alpha: 0.5, roughness, frozenset({"z"}))
    base = METHODS["sre2l++"]
    register_method("rough", dataclasses.replace(base, losses=(*base.losses, term)))
    try:
        found = {}
        for method in ("sre2l++", "rough"):
            config = tiny_config(method, classes=CLASSES, iterations=(2,))
            with one_segment(config, teachers_of(method), torch.float64) as step:
                assert step.columns == ((*TERMS, "roughness") if method == "rough" else TERMS)
                view, draws = step.images.clone().requires_grad_(), torch.tensor([[0, 0, SIZE, SIZE, 0, 0, 0]])
                (penalty,) = torch.autograd.grad(view.diff(dim=3).square().flatten(1).mean(1).mean(), view)
                found[method] = step.iterate(draws)[0], step.gradient, penalty
    finally:
        del METHODS["rough"]
    (plain, gradient, penalty), (rough, total, _) = found["sre2l++"], found["rough"]
    assert torch.equal(rough[1:6], plain[1:6])
    assert rough[6] > 0
    torch.testing.assert_close(rough[0], plain[0] + 0.5 * rough[6])
    torch.testing.assert_close(total, gradient + 0.5 * penalty, rtol=1e-7, atol=1e-9)


class _Watch(TorchDispatchMode):
    """Collects operations that read a value back to the host, and those that make a tensor of host values."""

    def __init__(self) -> None:
        super().__init__()
        self.read: list[str] = []
        self.made: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name
        if name in ("aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::equal"):
            self.read.append(name)
        if name in ("aten::lift_fresh", "aten::lift_fresh_copy"):
            self.made.append(name)
        return func(*args, **(kwargs or {}))


CASES = [
    ("sre2l++", {"iterations": (6,)}),
    ("sre2l++_fd2", {"iterations": (6,), "ls_threshold": 0.1}),
    ("fadrm", {"iterations": (2, 5), "sizes": (24, 32)}),
    ("fadrm+", {"iterations": (8,), "sizes": (32,)}),
    ("fadrm+_fd2", {"iterations": (7, 8), "sizes": (24, 32)}),
    ("fadrm+_fd2", {"iterations": (7, 8), "sizes": (24, 32), "teachers_per_image": 2}),
    ("cvdd", {"iterations": (4,)}),
    ("cvdd_fd2", {"iterations": (4,)}),
]


@functools.cache
def fused_pool(dtype: torch.dtype, precision: str) -> list:
    """The three teachers, fused once: frozen, so that tests can share them."""
    return [fuse(teacher, map_dtype(precision, dtype)) for teacher in teachers_of("fadrm+", dtype)]


def several_segments(config: Recipe, dtype: torch.dtype = torch.float32, **settings: object) -> GroupedStep:
    """Three segments of 2, 3 and 1 rows; committees that differ where the method chooses among the teachers."""
    offsets, pool = [0, 2, 5, 6], fused_pool(dtype, config.precision)
    teachers = pool if METHODS[config.method].least > 1 else pool[:1]
    generator = torch.Generator().manual_seed(1)
    lengths = (0, 0, 2, 1, 3, 0)  # earlier images of each row
    bounds = (0, *(sum(lengths[: n + 1]) for n in range(6)))
    maps = [Priors(torch.rand(6, t.attention_maps, 4, 4, dtype=dtype, generator=generator), bounds) for t in teachers]
    initial = torch.cat([pixels(s, b - a) for s, (a, b) in enumerate(zip(offsets, offsets[1:], strict=False))])
    return GroupedStep(
        config,
        teachers,
        initial.to(dtype),
        torch.tensor([0, 1, 0, 1, 2, 6]),
        offsets,
        low=LOW,
        high=HIGH,
        committees=[[0, 1], [1, 2], [2, 0]] if config.teachers_per_image else None,
        priors=maps if config.fd2 else None,
        **settings,
    )


def whole_table(config: Recipe, segments: int) -> torch.Tensor:
    """The draws of every iteration, each for the side of its phase."""
    sides = [side for side, count in zip(config.sizes, config.iterations, strict=True) for _ in range(count)]
    return torch.stack([table(config, list(range(segments)), t, side) for t, side in enumerate(sides)])


@pytest.mark.parametrize(("precision", "on_device"), [("fp32", False), ("fp32", True), ("fp16", True)])
@pytest.mark.parametrize(("method", "changes"), CASES)
def test_an_iteration_asks_nothing_of_the_host(
    method: str, changes: dict, precision: str, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value checks of the operations are off, as they are on a GPU; after one round no tensor is made of host values."""
    from fd2fast.models import packed_convolution as packed
    from fd2fast.ops import _checks

    monkeypatch.setattr(_checks, "reads_values", lambda tensor: False)
    # only on a CPU: oneDNN packs weights for each new shape, and forms are compared
    monkeypatch.setattr(packed, "supports", lambda dtype: False)
    config = tiny_config(method, classes=CLASSES, precision=precision, **changes)
    with several_segments(config, table=DeviceTable(3, CPU) if on_device else None) as step:
        step.load_table(whole_table(config, 3), None, 0)
        begins = [sum(config.iterations[:p]) for p in range(len(config.iterations))]
        while not step.finished:
            known = step.iteration - max(b for b in begins if b <= step.iteration) >= len(step.schedule)
            with _Watch() as watch:
                step.iterate()
            assert watch.read == []
            if known:
                assert watch.made == []
    with _Watch() as watch:  # the detector detects
        step.images.sum().item()
        torch.tensor([1.0])
    assert watch.read
    assert watch.made


@pytest.mark.parametrize(("method", "changes"), CASES)
def test_a_table_gives_the_bytes_of_draws(method: str, changes: dict) -> None:
    """Loaded whole or in pieces, on the host or on the device (there with the rate in a tensor: fp64, 1e-10)."""
    config = tiny_config(method, classes=CLASSES, precision="fp64", **changes)
    draws = whole_table(config, 3)
    found, losses = [], []
    for mode in ("draws", "whole", "pieces", "device", "device draws"):
        where = DeviceTable(3, CPU) if mode.startswith("device") else None
        with several_segments(config, torch.float64, table=where) as step:
            if mode in ("whole", "device"):
                step.load_table(draws.numpy(), None, 0)
            rows = []
            while not step.finished:
                if mode == "pieces" and step.iteration % 3 == 0:
                    step.load_table(draws[step.iteration : step.iteration + 3], None, step.iteration)
                rows.append(step.iterate(draws[step.iteration] if mode.endswith("draws") else None))
            found.append(step.images)
            losses.append(torch.stack(rows))
    for images, rows in zip(found[1:3], losses[1:3], strict=True):
        assert torch.equal(images, found[0])
        assert torch.equal(rows, losses[0])
    assert torch.equal(found[3], found[4])
    torch.testing.assert_close(found[3], found[0], rtol=0, atol=1e-9)
    assert (found[0] - found[0].mean()).abs().max() > 0.1


def test_given_rates_are_used() -> None:
    config = tiny_config("sre2l++", classes=CLASSES, iterations=(3,))
    draws = whole_table(config, 1)
    with one_segment(config, teachers_of("sre2l++"), torch.float64) as step:
        step.load_table(draws, torch.zeros(3, dtype=torch.float64), 0)
        before = step.images.clone()
        for _ in range(3):
            step.iterate()
        assert torch.equal(step.images, before)
        assert (step.tensors()["exp_avg"] != 0).any()


def test_a_table_longer_than_its_buffer() -> None:
    config = tiny_config("sre2l++", classes=CLASSES, iterations=(80,))
    found = []
    for length in (80, 30):
        device_table = DeviceTable(1, torch.device("cpu"))
        rows = []
        for first in range(0, 80, length):
            count = min(length, 80 - first)
            draws = whole_table(config, 1)[first : first + count]
            rates, numbers = torch.rand(count, dtype=torch.float64) + first, torch.arange(first, first + count)
            assert device_table.load(draws, rates, numbers, first) is (length == 80)
            assert not device_table.covers(first + count)
            for t in range(count):
                device_table.seek(first + t)
                row = device_table.row()
                assert torch.equal(row.draws, draws[t].long())
                assert (float(row.rate), int(row.number)) == (float(rates[t]), int(numbers[t]))
                rows.append(row.draws.clone())
                device_table.advance()
                device_table.settle(True)
        found.append(torch.stack(rows))
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (torch.zeros(2, 1, 6, dtype=torch.int32), None, 0),
            r"params must be int \[T, 1, 7\], got torch.int32 \[2, 1, 6\]",
        ),
        ((torch.zeros(2, 1, 7), None, 0), "params must be int .* got torch.float32"),
        ((torch.zeros(0, 1, 7, dtype=torch.int32), None, 0), "params must be int"),
        ((torch.tensor([[[0, 0, 32, 32, 0, 0, 0]]]), None, 2), "a table of 1 rows from iteration 2 leaves the 2"),
        ((torch.tensor([[[0, 0, 32, 32, 0, 0, 0]]]), torch.ones(1), 0), r"rates must be float64 \[1\]"),
        (
            (torch.tensor([[[0, 9, 32, 32, 0, 0, 0]]]), None, 1),
            "params of iteration 1, segment 0 must be a crop inside 32",
        ),
        ((torch.tensor([[[0, 0, 32, 32, 2, 0, 0]]]), None, 1), "flip of 0 or 1"),
    ],
)
def test_tables_are_checked(arguments: tuple, message: str) -> None:
    config = tiny_config("sre2l++", classes=CLASSES, iterations=(2,))
    with one_segment(config, teachers_of("sre2l++"), torch.float64) as step:
        with pytest.raises(ValueError, match=message):
            step.load_table(*arguments)
        with pytest.raises(ValueError, match="no table was loaded that has iteration 0"):
            step.iterate()


class _Full(PixelAdam):
    """An update that runs out of memory where it is told to; it also makes other places do so."""

    armed = False

    def __call__(self, *arguments: object) -> torch.Tensor:
        self.fail("update")
        return super().__call__(*arguments)

    def arm(self, step: GroupedStep, at: int, place: str) -> None:
        self.step, self.at, self.place, self.armed = step, at, place, True

    def fail(self, place: str) -> None:
        if self.armed and self.place == place and self.step.iteration == self.at:
            raise torch.OutOfMemoryError("CUDA out of memory (made up)")

    def before(self, place: str, function: object) -> object:
        def call(*arguments: object, **named: object) -> object:
            self.fail(place)
            return function(*arguments, **named)

        return call


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize(
    ("at", "place"), [(0, "teacher"), (3, "teacher"), (4, "teacher"), (4, "phase"), (4, "update"), (6, "update")]
)
def test_out_of_memory_changes_nothing(at: int, place: str, on_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the first iteration of a phase; tried again it goes on to the same bytes."""
    config = tiny_config("cvdd_fd2", classes=CLASSES, iterations=(4, 4), sizes=(24, 32), residual=0.5, precision="fp32")
    draws = whole_table(config, 3)
    with several_segments(config) as step:
        while not step.finished:
            step.iterate(draws[step.iteration])
        wanted = step.state()
    failing = _Full(config, LOW.float(), HIGH.float())
    body = fused_pool(torch.float32, "fp32")[-1].body
    monkeypatch.setattr(body, "forward", failing.before("teacher", body.forward))
    monkeypatch.setattr(torch, "zeros_like", failing.before("phase", torch.zeros_like))
    with several_segments(config, table=DeviceTable(3, CPU) if on_device else None, update=failing) as step:
        step.load_table(draws, None, 0)
        failing.arm(step, at, place)
        while step.iteration < at:
            step.iterate()
        before = step.state()
        with pytest.raises(torch.OutOfMemoryError, match="made up"):
            step.iterate()
        after = step.state()
        assert (
            (after["iteration"], after["phase"])
            == (before["iteration"], before["phase"])
            == (at, (at - 1) // 4 if at else 0)
        )
        for name, value in before.items():
            assert torch.equal(after[name], value) if isinstance(value, torch.Tensor) else after[name] == value
        failing.armed = False
        while not step.finished:
            step.iterate()
        for name, value in step.state().items():
            if on_device and isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, wanted[name], rtol=0.1, atol=0.1)
            elif isinstance(value, torch.Tensor):
                assert torch.equal(value, wanted[name])


def test_out_of_memory_lets_go_of_the_activations() -> None:
    config = tiny_config("sre2l++", classes=CLASSES, iterations=(2,), precision="fp32")
    kept = []

    class Failing(PixelAdam):
        def __call__(self, state: object, gradient: torch.Tensor, *_: object) -> torch.Tensor:
            kept.append(weakref.ref(gradient))
            raise torch.OutOfMemoryError("made up")

    update = Failing(config, LOW.float(), HIGH.float())
    with one_segment(config, teachers_of("sre2l++", torch.float32), update=update) as step:
        with pytest.raises(torch.OutOfMemoryError) as caught:
            step.iterate(whole_table(config, 1)[0])
        assert caught.value.__traceback__ is not None
        assert kept[0]() is None


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
        ({"priors": [Priors(torch.zeros(4, 2, 4, 4), (0, 1, 2, 3, 4))]}, r"must be \[P, 3, h, w\], got \[4, 2, 4, 4\]"),
        ({"labels": torch.tensor([0, 1, 2, CLASSES])}, r"labels must lie in \[0, 7\), got 0 to 7"),
        ({"labels": torch.tensor([0, -1, 2, 3])}, "labels must lie in .* got -1 to 3"),
        ({"committees": [[1]]}, r"committees must name teachers in \[0, 1\), got 1"),
        ({"initial": torch.zeros(3, 32, 32)}, r"initial must be \[N, 3, 32, 32\], got \[3, 32, 32\]"),
        ({"initial": torch.zeros(4, 3, 32, 24)}, r"initial must be \[N, 3, 32, 32\], got \[4, 3, 32, 24\]"),
        ({"graphs": True}, "graphs need a GPU, the images are on cpu"),
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


def test_teachers_for_images_of_different_sides_are_refused() -> None:
    config = tiny_config("fadrm+", classes=CLASSES, iterations=(1,), sizes=(32,), precision="fp32")
    teachers = [
        tiny_teacher(SMALL, CLASSES, dtype=torch.float32),
        tiny_teacher(OTHER, CLASSES, size=48, dtype=torch.float32),
    ]
    with pytest.raises(ValueError, match="must all be made for images of one side, got .*32.*48"):
        one_segment(config, teachers)


def test_state_of_another_step_is_refused() -> None:
    config = tiny_config("sre2l++", classes=CLASSES, iterations=(1,), precision="fp32")
    teachers = teachers_of("sre2l++", torch.float32)
    state = one_segment(config, teachers, rows=3).state()
    with pytest.raises(ValueError, match=r"images of the state must be \[4, 3, 32, 32\], got \[3, 3, 32, 32\]"):
        one_segment(config, teachers).load_state(state)
