"""Views: draws as functions of seed and epoch, boxes by hand, replay against a loop over single images, stored arrays."""

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as tv

from fd2fast.artifacts import Labels, write_npy
from fd2fast.data.views import (
    PER_EPOCH,
    TRIES,
    Source,
    Views,
    ViewSettings,
    array_types,
    batch_offsets,
    check_views,
    cut_box,
    draw_crops,
    draw_views,
    grouped,
    images_at_once,
    open_array,
    open_views,
    replay,
    usual_batch_size,
)
from fd2fast.errors import UserError
from fd2fast.settings.config import EvaluateConfig, RelabelConfig, replace

SETTINGS = ViewSettings(seed=7)
SIZE, IMAGES = 16, 11
OFFSETS = batch_offsets(IMAGES, 4)  # 4, 4, 3
MEAN, STD = (0.5, 0.45, 0.4), (0.25, 0.3, 0.2)


def equal(a: Views, b: Views) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in (*PER_EPOCH, "offsets"))


def per_batch(views: Views) -> Iterator[tuple[int, int, slice]]:
    for epoch in range(views.epochs):
        for b in range(views.batches):
            yield epoch, b, slice(int(views.offsets[b]), int(views.offsets[b + 1]))


def test_draws_do_not_depend_on_the_parts() -> None:
    whole = draw_views(SETTINGS, OFFSETS, SIZE, 0, 6)
    assert equal(whole, draw_views(SETTINGS, OFFSETS, SIZE, 0, 6))
    for first, end in ((0, 1), (1, 4), (5, 6)):
        assert equal(whole.part(first, end), draw_views(SETTINGS, OFFSETS, SIZE, first, end))


def test_seeds_and_epochs_differ() -> None:
    views = draw_views(SETTINGS, OFFSETS, SIZE, 0, 2)
    other = draw_views(replace(SETTINGS, seed=8), OFFSETS, SIZE, 0, 2)
    for name in PER_EPOCH:
        assert not np.array_equal(getattr(views, name), getattr(other, name))
        assert not np.array_equal(getattr(views, name)[0], getattr(views, name)[1])


def test_draws_are_in_range() -> None:
    views = draw_views(SETTINGS, OFFSETS, SIZE, 0, 40)
    for name, (shape, dtype) in array_types(OFFSETS).items():
        assert getattr(views, name).shape == (40, *shape)
        assert getattr(views, name).dtype == dtype
    np.testing.assert_array_equal(np.sort(views.order, 1), np.broadcast_to(np.arange(IMAGES), (40, IMAGES)))
    for epoch, b, rows in per_batch(views):
        mixed = views.mix_index[epoch, rows]
        assert sorted(mixed) == list(range(len(mixed)))
        row0, row1, column0, column1 = views.bbox[epoch, b]
        assert 0 <= row0 <= row1 <= SIZE
        assert 0 <= column0 <= column1 <= SIZE
    top, left, height, width = np.moveaxis(views.crop.astype(int), -1, 0)
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= SIZE).all()
    assert (left + width <= SIZE).all()
    assert min(height.min(), width.min()) >= 1
    assert 0.4 < views.flip.mean() < 0.6
    assert 0.35 < views.lam.mean() < 0.65  # Beta(1, 1): standard error .03


def test_order_of_partners_is_uniform() -> None:
    """Every image of a batch is the partner of the first equally often: 300 draws, expected 75 each, deviation 7.5."""
    first = draw_views(SETTINGS, OFFSETS, SIZE, 0, 300).mix_index[:, 0]
    assert np.abs(np.bincount(first, minlength=4) - 75).max() < 30


def test_settings_switch_off() -> None:
    none = draw_views(ViewSettings(mix="none", flip=0.0, min_crop=1.0), OFFSETS, SIZE, 0, 3)
    assert (none.lam == 1).all()
    assert (none.pasted_share(SIZE) == 0).all()
    for epoch, _, rows in per_batch(none):
        np.testing.assert_array_equal(none.mix_index[epoch, rows], np.arange(rows.stop - rows.start))
    assert not none.flip.any()
    assert draw_views(ViewSettings(flip=1.0), OFFSETS, SIZE, 0, 3).flip.all()


@pytest.mark.parametrize(
    ("lam", "centre", "wanted"),
    [
        (0.75, (5, 5), (3, 7, 3, 7)),  # side 5, half 2
        (0.0, (5, 5), (0, 10, 0, 10)),  # the whole image
        (0.0, (0, 9), (0, 5, 4, 10)),  # cut above and at the right
        (0.0, (9, 0), (4, 10, 0, 5)),  # cut below and at the left
        (0.75, (1, 9), (0, 3, 7, 10)),
        (0.99, (4, 6), (4, 4, 6, 6)),  # side 1, half 0: empty
        (1.0, (4, 6), (4, 4, 6, 6)),
    ],
)
def test_boxes_by_hand(lam: float, centre: tuple[int, int], wanted: tuple[int, ...]) -> None:
    box = cut_box(np.array([lam]), np.array([centre]), 10)
    assert box.dtype == np.int16
    assert tuple(box[0]) == wanted


def test_pasted_share_is_the_area_of_the_box_not_of_the_draw() -> None:
    views = draw_views(SETTINGS, OFFSETS, 10, 0, 1)
    bbox = cut_box(np.zeros(3), np.array([[5, 5], [0, 9], [0, 5]]), 10)[None]
    moved = Views(**{name: getattr(views, name) for name in PER_EPOCH if name != "bbox"}, bbox=bbox, offsets=OFFSETS)
    np.testing.assert_allclose(moved.pasted_share(10), [[1.0, 5 * 6 / 100, 5 * 10 / 100]])


def test_crops_by_hand() -> None:
    """Share .25 at ratio 1: half the side, anywhere; a first try that does not fit gives way to the second."""
    quarter = [0.25, 0.5, 0.5, 0.999]
    too_wide = [0.9999, 0.9999, 0.1, 0.1]  # 4:3 of nearly the whole area
    uniform = np.array([[quarter] + [too_wide] * 9, [too_wide, quarter] + [too_wide] * 8, [too_wide] * TRIES])
    crops = draw_crops(uniform, 8, 1e-9)
    assert crops.tolist() == [[2, 4, 4, 4], [2, 4, 4, 4], [0, 0, 8, 8]]


def test_crops_keep_area_and_ratio() -> None:
    crops = draw_crops(np.random.default_rng(0).random((2000, TRIES, 4)), 224, 0.3).astype(float)
    ratio, area = crops[:, 3] / crops[:, 2], crops[:, 2] * crops[:, 3] / 224**2
    assert 0.74 < ratio.min() < 0.8 < 1.25 < ratio.max() < 1.35
    assert 0.29 < area.min() < 0.32
    assert 0.95 < area.max() <= 1


@pytest.mark.parametrize(
    ("images", "size"), [(2, 2), (7, 7), (20, 20), (196, 14), (200, 20), (60, 20), (23, 20), (100, 20), (36, 18)]
)
def test_usual_batch_size(images: int, size: int) -> None:
    assert usual_batch_size(images) == size


def test_batches() -> None:
    assert batch_offsets(10, 4).tolist() == [0, 4, 8, 10]
    assert batch_offsets(9, 4).tolist() == [0, 4, 9]  # a single image joins
    assert batch_offsets(3, 8).tolist() == [0, 3]
    assert batch_offsets(28, None).tolist() == [0, 14, 28]
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        batch_offsets(1, None)
    with pytest.raises(UserError, match="batch_size must be at least 2, got 1"):
        batch_offsets(4, 1)


def test_groups_keep_order_and_limit() -> None:
    rows = [(epoch, b) for epoch in range(2) for b in range(3)]
    groups = list(grouped(rows, OFFSETS, 8))
    assert [pair for group in groups for pair in group] == rows
    assert groups == [[(0, 0), (0, 1)], [(0, 2), (1, 0)], [(1, 1), (1, 2)]]
    assert list(grouped(rows[:2], OFFSETS, 1)) == [[(0, 0)], [(0, 1)]]
    assert (images_at_once(224), images_at_once(64), images_at_once(10_000)) == (128, 512, 1)


def seen_by_loop(views: Views, pixels: np.ndarray, epoch: int, b: int) -> torch.Tensor:
    """One batch, image by image, with torchvision."""
    low, high = int(views.offsets[b]), int(views.offsets[b + 1])
    single = []
    for n in range(low, high):
        x = torch.from_numpy(pixels[views.order[epoch, n]]).double() / 255
        x = (x - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(STD).double().view(3, 1, 1)
        x = tv.resized_crop(x[None], *(int(v) for v in views.crop[epoch, n]), [SIZE, SIZE], antialias=True)[0]
        single.append(x.flip(-1) if views.flip[epoch, n] else x)
    mixed = torch.stack(single)
    row0, row1, column0, column1 = (int(v) for v in views.bbox[epoch, b])
    for n in range(high - low):
        partner = single[int(views.mix_index[epoch, low + n])]
        mixed[n, :, row0:row1, column0:column1] = partner[:, row0:row1, column0:column1]
    return mixed


def test_replay_is_the_loop_over_images(device: torch.device) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (IMAGES, 3, SIZE, SIZE), dtype=np.uint8)
    views = draw_views(SETTINGS, OFFSETS, SIZE, 3, 5)
    source = Source(pixels, MEAN, STD, device)
    rows = [(epoch, b) for epoch in range(2) for b in range(3)]
    wanted = torch.cat([seen_by_loop(views, pixels, *pair) for pair in rows])
    found = replay(views, source, rows)
    torch.testing.assert_close(found.cpu().double(), wanted, rtol=0, atol=5e-5)
    assert found.shape == (2 * IMAGES, 3, SIZE, SIZE)
    # alone or together, a batch is the same
    torch.testing.assert_close(torch.cat([replay(views, source, [pair]) for pair in rows]), found, rtol=0, atol=1e-6)


def test_stored_views_come_back(tmp_path: Path) -> None:
    views = draw_views(SETTINGS, OFFSETS, SIZE, 0, 3)
    for name in (*PER_EPOCH, "offsets"):
        write_npy(tmp_path / Labels.view_name(name), getattr(views, name))
    back = open_views(tmp_path)
    assert equal(back, views)
    with pytest.raises(ValueError, match="read-only"):
        back.order[0, 0] = 1
    (tmp_path / Labels.view_name("lam")).unlink()
    with pytest.raises(UserError, match=r"lam\.npy is missing"):
        open_views(tmp_path)


def test_pickles_are_refused(tmp_path: Path) -> None:
    views = draw_views(SETTINGS, OFFSETS, SIZE, 0, 1)
    for name in (*PER_EPOCH, "offsets"):
        write_npy(tmp_path / Labels.view_name(name), getattr(views, name))
    np.save(tmp_path / Labels.view_name("order"), np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"order\.npy is not a plain array"):
        open_views(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"PK\3\4", b"\x93NUMPY\x01\x00v\x00{'descr': '<i4', 'shape': (99999999999,)}", b"<html>"]
)
def test_files_that_are_no_arrays_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "order.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"order\.npy is not a plain array"):
        open_array(tmp_path / "order.npy")


def test_archives_of_arrays_are_refused(tmp_path: Path) -> None:
    with open(tmp_path / "order.npy", "wb") as file:
        np.savez(file, np.zeros(3))
    with pytest.raises(UserError, match=r"order\.npy is not a plain array"):
        open_array(tmp_path / "order.npy")


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("offsets", lambda a: a[::-1]),
        ("offsets", lambda a: a.astype(np.int32)),
        ("offsets", lambda a: a + 1),
        ("order", lambda a: a[:, :-1]),
        ("order", lambda a: np.where(a == 3, 4, a)),
        ("order", lambda a: a - 1),
        ("crop", lambda a: a - 1),
        ("crop", lambda a: np.where(a == a.max(), SIZE + 1, a)),
        ("crop", lambda a: a * 0),
        ("crop", lambda a: a[..., None]),
        ("flip", lambda a: a.astype(np.int8)),
        ("mix_index", lambda a: a + 1),
        ("mix_index", lambda a: a * 0 - 1),
        ("lam", lambda a: a[:2]),
        ("bbox", lambda a: a + SIZE),
        ("bbox", lambda a: a - SIZE),
    ],
)
def test_arrays_that_cannot_be_replayed_are_named(name: str, spoil: Callable[[np.ndarray], np.ndarray]) -> None:
    views = draw_views(SETTINGS, OFFSETS, SIZE, 0, 3)
    check_views(views, 3, IMAGES, SIZE, Path("labels"))
    spoilt = dataclasses.replace(views, **{name: spoil(getattr(views, name))})
    with pytest.raises(UserError, match=rf"{name}\.npy must hold"):
        check_views(spoilt, 3, IMAGES, SIZE, Path("labels"))


def test_settings_come_from_either_stage() -> None:
    assert ViewSettings.of(RelabelConfig(seed=3, flip=0.25)) == ViewSettings(seed=3, flip=0.25)
    assert ViewSettings.of(EvaluateConfig(mix="none")) == ViewSettings(mix="none")
    for changes in ({"min_crop": 0.0}, {"min_crop": 1.5}, {"flip": 1.1}, {"mix_alpha": 0.0}, {"mix": "mixup"}):
        name, value = next(iter(changes.items()))
        with pytest.raises(UserError, match=f"{name} must .*{value}"):
            ViewSettings.of(replace(RelabelConfig(), **changes))
