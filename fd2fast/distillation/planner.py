"""Which segments share a step, and each segment's crop, flip, roll and learning rate: the typed face of the C++ planner."""

import contextlib
import hashlib
import json
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fd2fast import _planner
from fd2fast.errors import UserError

# Which images share a segment, and with it BN statistics: one image of each class of a block, or images of one class.
Layout = Literal["across", "within"]

# Columns of an iteration table.
COLUMNS = ("top", "left", "height", "width", "flip", "roll_down", "roll_right")

_ARRAYS = (
    "first_class",
    "end_class",
    "block",
    "image_id",
    "group",
    "slot",
    "step_segments",
    "step_offsets",
    "step_wave",
    "prior_segments",
    "prior_offsets",
)


@dataclass(frozen=True, eq=False)
class Step:
    """One pass over `segments` (int64 ids), all of wave `wave`."""

    index: int
    wave: int
    segments: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Plan:
    """Segments, their dependencies and the steps that run them; immutable, and a function of its settings only.

    Segment s holds, of each class in [first_class[s], end_class[s]), the images [image_id[s], end_image[s]), class by class:
    across classes s = image_id * n_blocks + block and one image of each; within a class s = class * n_blocks + block.
    It may start when the segments of `priors([s])` are finished; they lie in earlier waves. Arrays are read-only; S segments.
    """

    classes: int
    ipc: int
    group_size: int
    segment_size: int
    segments_per_step: int  # most segments in one step
    max_rows_per_step: int  # most images in one step, the memory limit included; 0: no limit
    bucket_sizes: tuple[int, ...]  # segments; empty: any step size
    first_class: NDArray[np.int32]  # [S]
    end_class: NDArray[np.int32]  # [S]
    block: NDArray[np.int32]  # [S]
    image_id: NDArray[np.int32]  # [S]
    group: NDArray[np.int32]  # [S]
    slot: NDArray[np.int32]  # [S]
    step_segments: NDArray[np.int64]  # [S], ids in execution order
    step_offsets: NDArray[np.int64]  # [n_steps + 1], into step_segments
    step_wave: NDArray[np.int32]  # [n_steps], ascending
    prior_segments: NDArray[np.int64]  # [P], ids of the same block and group and a lower slot, ascending
    prior_offsets: NDArray[np.int64]  # [S + 1], into prior_segments
    layout: Layout = "across"

    def __post_init__(self) -> None:
        for name in _ARRAYS:
            getattr(self, name).flags.writeable = False

    @property
    def n_segments(self) -> int:
        return len(self.block)

    @property
    def n_steps(self) -> int:
        return len(self.step_wave)

    @property
    def n_waves(self) -> int:
        return min(self.group_size, self.ipc)

    @property
    def n_blocks(self) -> int:
        """Of classes, or of the images of a class."""
        return -(-(self.classes if self.layout == "across" else self.ipc) // self.segment_size)

    @cached_property
    def end_image(self) -> NDArray[np.int32]:
        """[S]: after the last image of each class in a segment."""
        count = 1 if self.layout == "across" else self.segment_size
        return np.minimum(self.image_id + np.int32(count), np.int32(self.ipc))

    def step(self, index: int) -> Step:
        """The step at this place of the execution order."""
        begin, end = self.step_offsets[index], self.step_offsets[index + 1]
        return Step(index, int(self.step_wave[index]), self.step_segments[begin:end])

    def steps(self) -> Iterator[Step]:
        """All steps in execution order; those of one wave are independent of each other."""
        return (self.step(index) for index in range(self.n_steps))

    def rows(self, segments: ArrayLike) -> NDArray[np.int64]:
        """Row offsets int64 [len + 1] of these segments stacked in one batch; UserError for an unknown segment."""
        ids = self._ids(segments)
        offsets = np.zeros(len(ids) + 1, np.int64)
        np.cumsum((self.end_class - self.first_class)[ids] * (self.end_image - self.image_id)[ids], out=offsets[1:])
        return offsets

    def labels(self, segments: ArrayLike) -> NDArray[np.int64]:
        """Class int64 [rows] of each row of these segments stacked in one batch; UserError for an unknown segment."""
        return self._cells(segments)[0]

    def image_ids(self, segments: ArrayLike) -> NDArray[np.int64]:
        """Image id int64 [rows] of each row, as `labels`."""
        return self._cells(segments)[1]

    def _cells(self, segments: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        ids = self._ids(segments)
        offsets = self.rows(ids)
        lengths = np.diff(offsets)
        images = np.repeat((self.end_image - self.image_id)[ids], lengths)
        row = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        return np.repeat(self.first_class[ids], lengths) + row // images, np.repeat(
            self.image_id[ids], lengths
        ) + row % images

    def priors(self, segments: ArrayLike) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ragged list of the segments whose attention each of these is kept away from.

        Returns ids int64 [P] and offsets int64 [len + 1]: segments[k] has ids[offsets[k]:offsets[k + 1]], as many as
        its slot. UserError for an unknown segment.
        """
        ids = self._ids(segments)
        begins, ends = self.prior_offsets[ids], self.prior_offsets[ids + 1]
        offsets = np.zeros(len(ids) + 1, np.int64)
        np.cumsum(ends - begins, out=offsets[1:])
        return self.prior_segments[np.arange(offsets[-1]) + np.repeat(begins - offsets[:-1], ends - begins)], offsets

    def _ids(self, segments: ArrayLike) -> NDArray[np.int64]:
        ids = _segment_ids(segments)
        if len(ids) and not (0 <= ids.min() and ids.max() < self.n_segments):
            raise UserError(f"segments must lie in [0, {self.n_segments}), got {ids.min()} to {ids.max()}")
        return ids

    @cached_property
    def _settings(self) -> dict[str, Any]:
        return {
            "classes": self.classes,
            "ipc": self.ipc,
            "group_size": self.group_size,
            "segment_size": self.segment_size,
            "segments_per_step": self.segments_per_step,
            "max_rows_per_step": self.max_rows_per_step,
            "bucket_sizes": list(self.bucket_sizes),
            # plans across classes keep the digest that they had before there were others
            **({"layout": self.layout} if self.layout != "across" else {}),
        }

    @cached_property
    def _digest(self) -> str:
        sha = hashlib.sha256(json.dumps(self._settings, sort_keys=True).encode())
        for name in _ARRAYS:
            array = getattr(self, name)
            sha.update(array.astype(array.dtype.newbyteorder("<"), copy=False))
        return sha.hexdigest()

    def digest(self) -> str:
        """sha256 (hex) over settings and arrays: equal plans, and only they, have equal digests."""
        return self._digest

    def to_json(self) -> dict[str, Any]:
        """What a manifest records: the settings that make this plan again, its counts and its digest."""
        counts = {"segments": self.n_segments, "steps": self.n_steps, "waves": self.n_waves}
        return {**self._settings, **counts, "digest": self.digest()}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        """The plan that `to_json` recorded; UserError if today's planner would group the segments differently."""
        plan = make_plan(
            record["classes"],
            record["ipc"],
            group_size=record["group_size"],
            segment_size=record["segment_size"],
            segments_per_step=record["segments_per_step"],
            max_rows_per_step=record["max_rows_per_step"] or None,
            bucket_sizes=record["bucket_sizes"] or None,
            layout=record.get("layout", "across"),
        )
        if plan.digest() != record["digest"]:
            raise UserError(f"the recorded plan has digest {record['digest']}, this planner makes {plan.digest()}")
        return plan  # type: ignore[return-value]

    def __eq__(self, other: object) -> bool:
        return self.digest() == other.digest() if isinstance(other, Plan) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest())


def make_plan(
    classes: int,
    ipc: int,
    *,
    group_size: int = 4,
    segment_size: int | None = None,
    segments_per_step: int | Literal["max"] = 1,
    max_rows_per_step: int | None = None,
    bytes_per_row: int | None = None,
    memory_limit: int | None = None,
    bytes_fixed: int = 0,
    bucket_sizes: Sequence[int] | None = None,
    layout: Layout = "across",
) -> Plan:
    """Plan `classes` x `ipc` images: waves by slot, and each wave cut into steps, full segments before shorter ones.

    group_size is N_S, the images of a class that repel each other's attention (paper, Alg. 1); 1 where there is no
    such loss: all segments are then one wave. segment_size None: 100, or all classes when there are fewer; the last
    block may be shorter. A step holds as many segments as segments_per_step ("max": the whole wave),
    max_rows_per_step (images) and memory_limit (bytes; a step of r rows needs bytes_fixed + r * bytes_per_row) allow;
    with bucket_sizes (segments) the largest bucket that fits, so that few step sizes occur; only a remainder below
    the smallest bucket is another size.

    layout "within": segments of images of one class; segment_size (None: all) counts images, blocks are of images, and
    group_size must be 1: images of one class that are optimised together cannot wait for each other.

    UserError: counts below 1, a segment larger than the class count, a limit too small for one segment.
    """
    classes, ipc = _at_least_one("classes", classes), _at_least_one("ipc", ipc)
    group_size = _at_least_one("group_size", group_size)
    if segment_size is None:
        segment_size = min(100, classes) if layout == "across" else ipc
    segment_size = _at_least_one("segment_size", segment_size)
    if layout == "within" and group_size != 1:
        raise UserError(f"group_size must be 1 for segments within a class, got {group_size}")
    if layout == "within" and segment_size > ipc:
        raise UserError(f"segment larger than the images of a class: {segment_size} > {ipc}")
    per_step = 0 if segments_per_step == "max" else _at_least_one("segments_per_step", segments_per_step)
    if (memory_limit is None) != (bytes_per_row is None):
        raise UserError(
            "memory_limit and bytes_per_row go together, "
            f"got memory_limit={memory_limit}, bytes_per_row={bytes_per_row}"
        )
    if bucket_sizes is not None and len(bucket_sizes) == 0:
        raise UserError("bucket_sizes must hold at least one size, got none")
    buckets = tuple(sorted({_at_least_one("bucket_sizes", size) for size in bucket_sizes or ()}))
    with _user_errors():
        arrays = _planner.make_plan(
            # within a class the planner's classes are its images, and its images the classes
            classes=classes if layout == "across" else ipc,
            ipc=ipc if layout == "across" else classes,
            group_size=group_size,
            segment_size=segment_size,
            segments_per_step=per_step,
            max_rows=_limit("max_rows_per_step", max_rows_per_step),
            memory_limit=_limit("memory_limit", memory_limit),
            bytes_per_row=_limit("bytes_per_row", bytes_per_row),
            bytes_fixed=_integer("bytes_fixed", bytes_fixed),
            bucket_sizes=buckets,
        )
    if layout == "within":
        label, first = arrays["image_id"], arrays["first_class"]
        arrays |= {"first_class": label, "end_class": label + np.int32(1), "image_id": first, "group": first.copy()}
    return Plan(
        classes=classes,
        ipc=ipc,
        group_size=group_size,
        segment_size=segment_size,
        bucket_sizes=buckets,
        layout=layout,
        **arrays,
    )


def philox_uniform(seed: int, counters: ArrayLike) -> NDArray[np.float64]:
    """Philox4x32-10 uniforms in [0, 1): counters uint32 [n, 4] -> float64 [n, 4], each 32 random bits * 2^-32."""
    with _user_errors():
        return _planner.philox(_seed(seed), np.asarray(counters, np.uint32)) * np.float64(2.0**-32)


def iteration_table(
    seed: int,
    segments: ArrayLike,
    first_iteration: int,
    count: int,
    size: int,
    *,
    jitter: int,
    augment: bool = True,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    threads: int = 0,
) -> NDArray[np.int32]:
    """Crop, flip and roll of these segments in `count` iterations: int32 [count, n_segments, 7], columns `COLUMNS`.

    A row depends on (seed, iteration, segment) and the augmentation's settings only, not on what is asked with it.
    Crop as torchvision's RandomResizedCrop for square images of `size` pixels, flip with probability 1/2, both rolls
    uniform in [0, jitter]. augment=False: whole image, no flip; the rolls stay the same. The draws are specified in
    fd2fast/reference/planner.py. threads 0: as many as pay. UserError: values out of range.
    """
    with _user_errors():
        return _planner.iteration_table(
            segments=_segment_ids(segments),
            first_iteration=_integer("first_iteration", first_iteration),
            count=_integer("count", count),
            threads=threads,
            **_draws(seed, size, jitter, augment, scale, ratio),
        )


def cosine_rates(lr: float, first_iteration: int, count: int, total: int) -> NDArray[np.float64]:
    """Learning rates float64 [count] of iterations t from first_iteration: (1 + cos(pi t / total)) / 2 * lr."""
    with _user_errors():
        return _planner.cosine_rates(
            float(lr),
            _integer("first_iteration", first_iteration),
            _integer("count", count),
            _integer("total", total),
        )


class TableStream:
    """Iteration tables and learning rates of `count` iterations, made ahead by a C++ thread without the GIL.

    Each `next()` (or loop turn) gives params int32 [k, n_segments, 7] and rates float64 [k], k = `chunk` or, in the
    last, what is left: the rows of `iteration_table` and `cosine_rates`. Both are views of a ring of `depth` tables
    and stay untouched for `keep` more calls of `next()`; copy what must live longer. `memory` is the ring itself
    (uint8, page aligned), which a caller may pin; it lives as long as any view of it.
    """

    def __init__(
        self,
        seed: int,
        segments: ArrayLike,
        first_iteration: int,
        count: int,
        size: int,
        *,
        jitter: int,
        lr: float,
        total: int,
        augment: bool = True,
        scale: tuple[float, float] = (0.08, 1.0),
        ratio: tuple[float, float] = (3 / 4, 4 / 3),
        chunk: int = 64,
        depth: int = 3,
        keep: int = 1,
    ) -> None:
        with _user_errors():
            self._stream = _planner.TableStream(
                segments=_segment_ids(segments),
                first_iteration=_integer("first_iteration", first_iteration),
                count=_integer("count", count),
                lr=float(lr),
                total=_integer("total", total),
                chunk=_integer("chunk", chunk),
                depth=_integer("depth", depth),
                keep=_integer("keep", keep),
                **_draws(seed, size, jitter, augment, scale, ratio),
            )

    def next(self) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
        """The next table and its rates; StopIteration after the last, UserError once closed or if filling failed."""
        with _user_errors():
            return self._stream.next()

    def close(self) -> None:
        """Stop the thread; a waiting `next()` in another thread raises. Views stay valid. May be called twice."""
        self._stream.close()

    @property
    def memory(self) -> NDArray[np.uint8]:
        """The whole ring; unpin it, if pinned, before the last view of it goes."""
        return self._stream.memory

    def __iter__(self) -> Self:
        return self

    __next__ = next

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@contextlib.contextmanager
def _user_errors() -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None


def _integer(name: str, value: int) -> int:
    try:
        value = operator.index(value)
    except TypeError:
        raise UserError(f"{name} must be an integer, got {value!r}") from None
    if not -(2**63) <= value < 2**63:
        raise UserError(f"{name} must fit 64 bits, got {value}")
    return value


def _at_least_one(name: str, value: int) -> int:
    value = _integer(name, value)
    if value < 1:
        raise UserError(f"{name} must be at least 1, got {value}")
    return value


def _limit(name: str, value: int | None) -> int:
    return 0 if value is None else _at_least_one(name, value)


def _seed(seed: int) -> int:
    seed = operator.index(seed)
    if not 0 <= seed < 2**64:
        raise UserError(f"seed must lie in [0, 2**64), got {seed}")
    return seed


def _segment_ids(segments: ArrayLike) -> NDArray[np.int64]:
    ids = np.asarray(segments)
    if ids.ndim != 1 or (ids.size and not np.issubdtype(ids.dtype, np.integer)):
        raise UserError(f"segments must be integers [n], got {ids.dtype} {list(ids.shape)}")
    return np.ascontiguousarray(ids, np.int64)


def _draws(
    seed: int, size: int, jitter: int, augment: bool, scale: tuple[float, float], ratio: tuple[float, float]
) -> dict[str, Any]:
    return {
        "seed": _seed(seed),
        "size": _integer("size", size),
        "jitter": _integer("jitter", jitter),
        "augment": bool(augment),
        "scale": (float(scale[0]), float(scale[1])),
        "ratio": (float(ratio[0]), float(ratio[1])),
    }
