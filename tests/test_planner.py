"""The C++ planner against its specification, and the specification's own promises."""

import json
import math
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fd2fast.distillation import planner
from fd2fast.distillation.planner import Plan, TableStream, cosine_rates, iteration_table, make_plan, philox_uniform
from fd2fast.errors import UserError
from fd2fast.reference import planner as reference

quick = settings(deadline=None, max_examples=100)


@st.composite
def requests(draw, valid=True):
    classes = draw(st.integers(1 if valid else 0, 60))
    small = st.integers(1 if valid else 0, max(classes // 3, 1))
    size = draw(small | small | st.none() | st.integers(1, max(classes, 1) if valid else 70))
    segment = size or min(100, max(classes, 1))
    bytes_per_row = draw(st.integers(1, 1000))
    bytes_fixed = draw(st.integers(0, 5000))
    limited = draw(st.sampled_from([False, False, True]))
    least = segment if valid else 1
    least_bytes = bytes_fixed + segment * bytes_per_row if valid else 1
    return {
        "classes": classes,
        "ipc": draw(st.integers(1 if valid else 0, 13)),
        "group_size": draw(st.integers(1 if valid else 0, 6)),
        "segment_size": size,
        "segments_per_step": draw(st.just("max") | st.integers(1 if valid else 0, 40)),
        "max_rows_per_step": draw(st.none() | st.none() | st.integers(least, 20 * segment + 1)),
        "bytes_per_row": bytes_per_row if limited else None,
        "bytes_fixed": bytes_fixed,
        "memory_limit": draw(st.integers(least_bytes, 30 * (least_bytes + bytes_per_row))) if limited else None,
        "bucket_sizes": draw(st.none() | st.lists(st.integers(1, 5) | st.integers(1, 20), min_size=1, max_size=6)),
    }


def as_lists(plan):
    names = reference.PlanLists.__dataclass_fields__
    return {name: np.asarray(getattr(plan, name)).tolist() for name in names}


def outcome(make, request):
    try:
        return as_lists(make(**request))
    except ValueError as error:
        return str(error)


@quick
@given(requests())
def test_plan_equals_reference(request):
    assert as_lists(make_plan(**request)) == as_lists(reference.make_plan(**request))


@quick
@given(requests(), st.integers(1, 13))
def test_segments_within_a_class(request, segment_size):
    """As the specification has them; every image once, the images of one class together."""
    size = min(segment_size, request["ipc"])
    limits = {"max_rows_per_step": None, "bytes_per_row": None, "memory_limit": None}
    request |= {"layout": "within", "group_size": 1, "segment_size": size, **limits}
    plan = make_plan(**request)
    assert as_lists(plan) == as_lists(reference.make_plan(**request))
    seen = []
    for step in plan.steps():
        bounds = plan.rows(step.segments)
        cells = list(zip(plan.labels(step.segments), plan.image_ids(step.segments), strict=True))
        for k, segment in enumerate(step.segments):
            mine = cells[bounds[k] : bounds[k + 1]]
            assert {label for label, _ in mine} == {plan.first_class[segment]}
            assert [image for _, image in mine] == list(range(plan.image_id[segment], plan.end_image[segment]))
            assert len(mine) <= size
            assert len(plan.priors([segment])[0]) == 0
        seen += cells
    assert sorted(seen) == [(k, i) for k in range(plan.classes) for i in range(plan.ipc)]
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_segments_within_a_class_have_no_order():
    for make in (make_plan, reference.make_plan):
        with pytest.raises(ValueError, match="group_size must be 1 for segments within a class, got 4"):
            make(3, 4, layout="within")
        with pytest.raises(ValueError, match="segment larger than the images of a class: 5 > 4"):
            make(3, 4, layout="within", group_size=1, segment_size=5)


@settings(quick, max_examples=300)
@given(requests(valid=False))
def test_bad_requests_are_refused_alike(request):
    assert outcome(make_plan, request) == outcome(reference.make_plan, request)


@quick
@given(requests())
def test_every_image_once_dependencies_and_limits_kept(request):
    plan = make_plan(**request)
    images = set()
    wave_of = {}
    for step in plan.steps():
        rows = plan.rows(step.segments)
        labels = plan.labels(step.segments)
        assert len(labels) == rows[-1]
        for k, segment in enumerate(step.segments):
            assert segment not in wave_of
            wave_of[segment] = step.wave
            image = plan.image_id[segment]
            assert segment == image * plan.n_blocks + plan.block[segment]
            assert (plan.group[segment], plan.slot[segment]) == divmod(image, plan.group_size)
            assert plan.slot[segment] == step.wave
            mine = labels[rows[k] : rows[k + 1]].tolist()
            assert mine == list(range(plan.first_class[segment], plan.end_class[segment]))
            assert len(mine) == plan.segment_size or mine[-1] == plan.classes - 1
            new = {(c, int(image)) for c in mine}
            assert not new & images
            images |= new
        assert 1 <= len(step.segments) <= plan.segments_per_step
        if request["segments_per_step"] != "max":
            assert plan.segments_per_step == request["segments_per_step"]
        assert rows[-1] <= (request["max_rows_per_step"] or math.inf)
        if request["memory_limit"]:
            assert request["bytes_fixed"] + rows[-1] * request["bytes_per_row"] <= request["memory_limit"]
        if plan.bucket_sizes and len(step.segments) not in plan.bucket_sizes:
            assert len(step.segments) < plan.bucket_sizes[0]
    assert images == {(c, i) for c in range(plan.classes) for i in range(plan.ipc)}
    assert plan.step_wave.tolist() == sorted(plan.step_wave)
    assert set(plan.step_wave.tolist()) == set(range(plan.n_waves))

    for segment in range(plan.n_segments):
        ids, offsets = plan.priors([segment])
        wanted = [
            s for s in range(segment) if plan.block[s] == plan.block[segment] and plan.group[s] == plan.group[segment]
        ]
        assert ids.tolist() == wanted
        assert offsets.tolist() == [0, plan.slot[segment]]
        assert all(wave_of[s] < wave_of[segment] for s in wanted)


@quick
@given(requests())
def test_full_segments_first_so_that_at_most_one_step_of_a_wave_is_mixed(request):
    plan = make_plan(**request)
    mixed = [0] * plan.n_waves
    for step in plan.steps():
        mixed[step.wave] += len(set(np.diff(plan.rows(step.segments)).tolist())) > 1
    assert max(mixed) <= 1


def test_buckets_keep_step_sizes_few():
    plan = make_plan(10, 50, segments_per_step="max", bucket_sizes=[1, 2, 4, 8, 16, 32])
    sizes = [np.diff(plan.step_offsets)[plan.step_wave == wave].tolist() for wave in range(4)]
    assert sizes == [[8, 4, 1], [8, 4, 1], [8, 4], [8, 4]]
    free = make_plan(10, 50, segments_per_step="max")
    assert np.diff(free.step_offsets).tolist() == [13, 13, 12, 12]


def test_cars_shape():
    plan = make_plan(196, 5, segments_per_step=4)
    assert plan.first_class[:2].tolist() == [0, 100]
    assert plan.end_class[:2].tolist() == [100, 196]
    assert [step.segments.tolist() for step in plan.steps()] == [[0, 8, 1, 9], [2, 3], [4, 5], [6, 7]]
    assert plan.rows([0, 8, 1, 9]).tolist() == [0, 100, 200, 296, 392]
    ids, offsets = plan.priors([7, 4])
    assert ids.tolist() == [1, 3, 5, 0, 2]
    assert offsets.tolist() == [0, 3, 5]
    assert [a.tolist() for a in plan.priors([])] == [[], [0]]
    assert plan.rows([]).tolist() == [0]
    assert plan.labels([]).tolist() == []


def test_without_group_loss_all_is_one_wave():
    plan = make_plan(20, 6, group_size=1, segment_size=10, segments_per_step="max")
    assert plan.n_waves == plan.n_steps == 1
    assert len(plan.prior_segments) == 0


def test_plan_is_immutable_and_recorded():
    plan = make_plan(30, 5, segment_size=7, segments_per_step=3, max_rows_per_step=20, bucket_sizes=(2, 1))
    for name in planner._ARRAYS:
        with pytest.raises(ValueError, match="read-only"):
            getattr(plan, name)[0] = 1
    record = plan.to_json()
    assert planner.Plan.from_json(record) == plan
    assert hash(planner.Plan.from_json(record)) == hash(plan)
    changes = {
        "classes": 31,
        "ipc": 6,
        "group_size": 3,
        "segment_size": 8,
        "segments_per_step": 2,
        "max_rows_per_step": 14,
        "bucket_sizes": [2],
    }
    for name, value in changes.items():
        with pytest.raises(UserError, match="the recorded plan has digest"):
            planner.Plan.from_json({**record, name: value})
    assert plan != make_plan(30, 5, segment_size=7)
    assert plan != "plan"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": 0}, "classes must be at least 1, got 0"),
        ({"ipc": 0}, "ipc must be at least 1, got 0"),
        ({"ipc": 2**31}, "ipc must be at most 2147483647, got 2147483648"),
        ({"ipc": 2**63}, "ipc must fit 64 bits, got 9223372036854775808"),
        ({"ipc": 1.5}, "ipc must be an integer, got 1.5"),
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"segment_size": 0}, "segment_size must be at least 1, got 0"),
        ({"segment_size": 12}, "segment larger than the class count: 12 > 10"),
        ({"segments_per_step": 0}, "segments_per_step must be at least 1, got 0"),
        ({"max_rows_per_step": 9}, "max_rows_per_step too small for one segment: 10 rows needed, got 9"),
        (
            {"memory_limit": 106, "bytes_per_row": 10, "bytes_fixed": 7},
            r"memory_limit too small for one segment: 107 bytes needed \(7 \+ 10 rows of 10\), got 106",
        ),
        ({"memory_limit": 5}, "memory_limit and bytes_per_row go together, got memory_limit=5, bytes_per_row=None"),
        ({"bytes_per_row": 5}, "go together"),
        ({"memory_limit": 5, "bytes_per_row": 0}, "bytes_per_row must be at least 1, got 0"),
        ({"bucket_sizes": []}, "bucket_sizes must hold at least one size, got none"),
        ({"bucket_sizes": [2, 0]}, "bucket_sizes must be at least 1, got 0"),
        ({"segment_size": 1, "ipc": 2**30}, "number of segments must be at most 2147483647, got 10737418240"),
        ({"ipc": 10**5, "group_size": 10**5}, "number of priors must be at most 2147483647, got 4999950000"),
    ],
)
def test_errors_name_what_was_wanted_and_what_came(change, message):
    with pytest.raises(UserError, match=f"^{message}" if not message.startswith("go") else message):
        make_plan(**{"classes": 10, "ipc": 4, **change})


@pytest.mark.parametrize("segments", [[-1], [0, 20], [[1]], [0.5]])
def test_unknown_segments_are_refused(segments):
    plan = make_plan(10, 20)
    for ask in (plan.rows, plan.labels, plan.priors):
        with pytest.raises(UserError, match="segments must"):
            ask(segments)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
def test_imagenet_21k_is_planned_small_and_without_torch():
    code = r"""
import re, sys
from fd2fast.distillation.planner import make_plan
plan = make_plan(21841, 50, segments_per_step=8)
single = make_plan(21841, 50, segment_size=1, segments_per_step=800)
assert plan.rows(plan.step_segments)[-1] == single.n_segments == 21841 * 50
status = open("/proc/self/status").read()  # ru_maxrss would begin at the parent's peak
peak = int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) / 1024
assert peak < 500, peak
assert "torch" not in sys.modules and "triton" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- draws ----

PI = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]


@pytest.mark.parametrize(
    ("seed", "counter", "bits"),
    [
        (0, [0] * 4, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (2**64 - 1, [2**32 - 1] * 4, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (0x299F31D0A4093822, PI, [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ],
)
def test_philox_known_answers(seed, counter, bits):
    """Test vectors of Random123 (kat_vectors, philox 4x32 10)."""
    assert list(reference.philox(seed, tuple(counter))) == bits
    assert reference.philox_array(seed, np.array([counter], np.uint32)).tolist() == [bits]
    assert philox_uniform(seed, [counter]).tolist() == [[x / 2**32 for x in bits]]


def test_exponential_is_accurate():
    x = np.linspace(-15, 15, 20001)
    assert np.max(np.abs(reference.exponential(x) / np.exp(x) - 1)) < 4e-16
    assert reference.exponential(0.0) == 1.0


unit = st.floats(0.001, 1)


@quick
@given(
    seed=st.integers(0, 2**64 - 1),
    segments=st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 9), min_size=0, max_size=5),
    first=st.integers(0, 2**32 - 6),
    count=st.integers(0, 5),
    size=st.integers(1, 600),
    jitter=st.integers(0, 64),
    augment=st.booleans(),
    scale=st.just((0.08, 1.0)) | st.tuples(unit, unit).map(sorted),
    ratio=st.just((3 / 4, 4 / 3)) | st.tuples(st.floats(0.01, 50), st.floats(0.01, 50)).map(sorted),
    threads=st.integers(0, 3),
)
def test_table_equals_reference(seed, segments, first, count, size, jitter, augment, scale, ratio, threads):
    arguments = (seed, segments, first, count, size)
    options = {"jitter": jitter, "augment": augment, "scale": tuple(scale), "ratio": tuple(ratio)}
    table = iteration_table(*arguments, **options, threads=threads)
    assert table.dtype == np.int32
    assert table.shape == (count, len(segments), 7)
    assert table.tolist() == reference.iteration_table(*arguments, **options)
    assert np.array_equal(table, reference.iteration_array(*arguments, **options))


def test_many_rows_equal_the_vectorised_reference():
    segments = np.arange(3, 403)
    table = iteration_table(11, segments, 50, 400, 224, jitter=32)
    assert np.array_equal(table, reference.iteration_array(11, segments, 50, 400, 224, jitter=32))


def test_draws_do_not_depend_on_company_or_chunks():
    segments = np.array([5, 2**40, 0, 77])
    whole = iteration_table(3, segments, 10, 40, 96, jitter=4)
    for column, segment in enumerate(segments):
        alone = [iteration_table(3, [segment], t, 8, 96, jitter=4) for t in range(10, 50, 8)]
        assert np.array_equal(np.concatenate(alone)[:, 0], whole[:, column])
    for other in (
        iteration_table(4, segments, 10, 40, 96, jitter=4),
        iteration_table(3, segments, 11, 40, 96, jitter=4),
    ):
        assert np.mean(np.all(other == whole, axis=2)) < 0.01
    assert len(np.unique(whole.reshape(-1, 7), axis=0)) > 150


def test_distribution_of_the_draws():
    size, jitter = 224, 32
    table = iteration_table(0, np.arange(200), 0, 1000, size, jitter=jitter).reshape(-1, 7)
    top, left, height, width, flip, down, right = table.T.astype(np.int64)
    assert top.min() == left.min() == 0
    assert (height >= 1).all()
    assert (width >= 1).all()
    assert (top + height).max() == (left + width).max() == size
    area = height * width / size**2
    assert area.min() > 0.07
    assert area.max() > 0.97
    ratio = width / height
    assert ratio.min() > 0.73
    assert ratio.max() < 1.37
    n = len(table)
    assert abs(np.log(ratio).mean()) < 4 * np.log(ratio).std() / n**0.5
    assert abs(flip.mean() - 0.5) < 4 * 0.5 / n**0.5
    for roll in (down, right):
        counts = np.bincount(roll)
        assert len(counts) == jitter + 1
        assert np.sum((counts - n / (jitter + 1)) ** 2 / (n / (jitter + 1))) < 80  # chi2, 32 degrees: p = 5e-6
    # independent of each other: each correlation is 0 within its error; the margins of a crop depend on its size
    columns = np.stack([area, np.log(ratio), flip, down, right])
    correlation = np.corrcoef(columns) - np.eye(5)
    assert np.abs(correlation).max() < 5 / n**0.5
    room = size - height > 0
    place = (top[room] + 0.5) / (size - height[room] + 1)
    assert abs(place.mean() - 0.5) < 4 * place.std() / len(place) ** 0.5


def test_crops_follow_torchvision():
    torch = pytest.importorskip("torch")
    transforms = pytest.importorskip("torchvision.transforms")
    image = torch.empty(3, 224, 224)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        theirs = np.array(
            [transforms.RandomResizedCrop.get_params(image, [0.08, 1.0], [3 / 4, 4 / 3]) for _ in range(1500)]
        )
    ours = iteration_table(0, np.arange(100), 0, 400, 224, jitter=0).reshape(-1, 7)[:, :4]
    for a, b in ((ours, theirs), (ours**2, theirs**2)):
        error = (a.var(0) / len(a) + b.var(0) / len(b)) ** 0.5
        assert (np.abs(a.mean(0) - b.mean(0)) < 4.5 * error).all()
    for ratio in ((2.0, 3.0), (0.2, 0.3), (1.7, 1.8)):
        fallback = transforms.RandomResizedCrop.get_params(image, [0.999, 1.0], list(ratio))
        crop = iteration_table(0, [0], 0, 1, 224, jitter=0, scale=(0.999, 1.0), ratio=ratio)[0, 0, :4]
        assert crop.tolist() == list(fallback)


def test_without_augmentation_the_whole_image_and_the_same_rolls():
    plain = iteration_table(5, np.arange(50), 0, 20, 64, jitter=4, augment=False)
    assert (plain[..., :5] == [0, 0, 64, 64, 0]).all()
    assert np.array_equal(plain[..., 5:], iteration_table(5, np.arange(50), 0, 20, 64, jitter=4)[..., 5:])
    assert (iteration_table(5, [1], 0, 20, 64, jitter=0)[..., 5:] == 0).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, r"seed must lie in \[0, 2\*\*64\), got -1"),
        ({"segments": [-2]}, "segment id must be at least 0, got -2"),
        ({"segments": [[1]]}, r"segments must be integers \[n\], got int64 \[1, 1\]"),
        ({"first_iteration": -1}, "first_iteration must be at least 0, got -1"),
        ({"first_iteration": 2**32 - 1}, r"iterations must stay below 4294967296, got 4294967295 \+ 2"),
        ({"count": -1}, "count must be at least 0, got -1"),
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"jitter": -1}, "jitter must be at least 0, got -1"),
        ({"scale": (0.5, 0.4)}, r"scale must be 0 < low <= high <= 1, got 0.500000, 0.400000"),
        ({"scale": (float("nan"), 1)}, "scale must be"),
        ({"ratio": (0, 1)}, "ratio must be 0.001 <= low <= high <= 1000, got 0.000000, 1.000000"),
    ],
)
def test_table_errors(change, message):
    wanted = {"seed": 0, "segments": [0], "first_iteration": 0, "count": 2, "size": 8, "jitter": 1}
    with pytest.raises(UserError, match=message):
        iteration_table(**{**wanted, **change})


@quick
@given(st.floats(1e-6, 10), st.integers(0, 3000), st.integers(0, 30), st.integers(1, 4000))
def test_rates_equal_reference(lr, first, count, total):
    total = max(total, first + count)
    assert cosine_rates(lr, first, count, total).tolist() == reference.cosine_rates(lr, first, count, total)


def test_rates_fall_from_lr_to_zero_and_no_further():
    rates = cosine_rates(0.25, 0, 1000, 1000)
    assert rates[0] == 0.25
    assert rates[500] == pytest.approx(0.125)
    assert 0 < rates[-1] < 1e-6
    assert (np.diff(rates) < 0).all()
    with pytest.raises(UserError, match=r"iterations run past the schedule: 990 \+ 11 > 1000"):
        cosine_rates(0.25, 990, 11, 1000)
    with pytest.raises(UserError, match="lr must be finite, got inf"):
        cosine_rates(math.inf, 0, 1, 10)
    with pytest.raises(UserError, match="total must be at least 1, got 0"):
        cosine_rates(0.1, 0, 0, 0)


# ---- the stream ----


def open_stream(first=5, count=50, **options):
    options = {"jitter": 4, "lr": 0.1, "total": 100, "chunk": 8, **options}
    return TableStream(9, [3, 1, 4], first, count, 32, **options)


@pytest.mark.parametrize(
    "options", [{}, {"chunk": 1}, {"chunk": 50, "depth": 2}, {"chunk": 64}, {"depth": 9, "keep": 8}]
)
def test_stream_gives_the_tables_and_ends(options):
    with open_stream(**options) as stream:
        tables = [(params.copy(), rates.copy()) for params, rates in stream]
        with pytest.raises(StopIteration):
            stream.next()
    chunk = options.get("chunk", 8)
    assert [len(rates) for _, rates in tables] == [min(chunk, 50 - k) for k in range(0, 50, chunk)]
    assert np.array_equal(np.concatenate([p for p, _ in tables]), iteration_table(9, [3, 1, 4], 5, 50, 32, jitter=4))
    assert np.array_equal(np.concatenate([r for _, r in tables]), cosine_rates(0.1, 5, 50, 100))
    assert tables[0][0].dtype == np.int32
    assert tables[0][1].dtype == np.float64


def test_stream_passes_the_augmentation_on():
    options = {"augment": True, "scale": (0.5, 0.6), "ratio": (1.0, 1.5)}
    with open_stream(**options) as stream:
        assert np.array_equal(stream.next()[0], iteration_table(9, [3, 1, 4], 5, 8, 32, jitter=4, **options))
    with open_stream(augment=False) as stream:
        assert (stream.next()[0][..., 2:4] == 32).all()


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_tables_stay_untouched_while_kept(keep):
    wanted = iteration_table(9, [3, 1, 4], 0, 400, 32, jitter=4).reshape(200, 2, 3, 7)
    held = []
    with open_stream(first=0, count=400, chunk=2, total=400, depth=4, keep=keep) as stream:
        for params, _ in stream:
            held = [*held, params][-keep:]
            done = len(held) if len(held) < keep else keep
            newest = int(np.flatnonzero((wanted == held[-1]).all((1, 2, 3)))[0])
            for back in range(done):
                assert np.array_equal(held[-1 - back], wanted[newest - back])


def test_ring_is_aligned_pinnable_and_outlives_the_stream():
    stream = open_stream()
    memory = stream.memory
    begin = memory.ctypes.data
    assert begin % 4096 == 0
    assert memory.nbytes % 4096 == 0
    params, rates = stream.next()
    for view in (params, rates):
        assert view.ctypes.data % 64 == 0
        assert begin <= view.ctypes.data
        assert view.ctypes.data + view.nbytes <= begin + memory.nbytes
    stream.close()
    stream.close()
    del stream
    assert np.array_equal(params, iteration_table(9, [3, 1, 4], 5, 8, 32, jitter=4))
    params[:] = 0  # still mapped and writable


def test_closed_stream_refuses_and_a_waiting_reader_wakes():
    stream = open_stream(first=0, count=10**7, total=10**7, chunk=1)
    seen = []

    def read():
        try:
            while True:
                stream.next()
        except UserError as error:
            seen.append(str(error))

    reader = threading.Thread(target=read)
    reader.start()
    stream.close()
    reader.join(timeout=30)
    assert not reader.is_alive()
    assert seen == ["the table stream is closed"]
    with pytest.raises(UserError, match="closed"):
        stream.next()


def test_errors_of_the_thread_surface_where_the_table_would_have_come():
    with open_stream(first=90, count=20, chunk=5) as stream:
        assert len(stream.next()[1]) == 5
        assert len(stream.next()[1]) == 5
        for _ in range(3):
            with pytest.raises(UserError, match=r"iterations run past the schedule: 100 \+ 5 > 100"):
                stream.next()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chunk": 0}, "chunk must be at least 1, got 0"),
        ({"depth": 1}, "depth must be at least 2, got 1"),
        ({"depth": 3, "keep": 3}, "keep must be at most 2, got 3"),
        ({"jitter": -1}, "jitter must be at least 0, got -1"),
        ({"count": -1}, "count must be at least 0, got -1"),
        ({"scale": (0, 1)}, "scale must be"),
    ],
)
def test_stream_errors(options, message):
    with pytest.raises(UserError, match=message):
        open_stream(**options)


def test_stream_of_nothing():
    assert list(open_stream(count=0)) == []
    with pytest.raises(UserError, match="number of segments must be at least 1, got 0"):
        TableStream(0, [], 0, 1, 8, jitter=0, lr=1, total=1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_neither_reads_nor_hangs():
    code = """
import os, signal
from fd2fast.distillation.planner import TableStream
stream = TableStream(0, [1], 0, 1000, 8, jitter=1, lr=.1, total=1000, chunk=1)
stream.next()
child = os.fork()
if child == 0:
    signal.alarm(20)
    try:
        stream.next()
    except ValueError as error:
        refused = "another process" in str(error)
    stream.close()
    del stream
    os._exit(0 if refused else 1)
assert os.waitpid(child, 0)[1] == 0
assert len(list(stream)) == 999
"""
    subprocess.run([sys.executable, "-c", code], check=True)
