"""Pixels: every kind of image file, the normalisation round trip, bounds, files written atomically, preview grids."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from fd2fast.data import pixels
from fd2fast.errors import UserError

MEAN, STD = (0.4857, 0.4994, 0.4326), (0.2260, 0.2215, 0.2595)


def every_value() -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16).contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_normalise_then_quantize_is_the_identity(dtype: torch.dtype) -> None:
    images = every_value()
    normal = pixels.normalise(images, MEAN, STD, dtype)
    assert normal.dtype == dtype
    assert torch.equal(pixels.quantize(normal, MEAN, STD), images)


def test_normalise_agrees_with_its_formula_and_accepts_floats() -> None:
    images = every_value()
    expected = (images.double() / 255 - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(STD).double().view(
        3, 1, 1
    )
    torch.testing.assert_close(pixels.normalise(images, MEAN, STD, torch.float64), expected, atol=1e-6, rtol=1e-6)
    unit = pixels.to_unit(images)
    assert torch.equal(pixels.normalise(unit, MEAN, STD), pixels.normalise(images, MEAN, STD))
    half = pixels.normalise(images, MEAN, STD, torch.bfloat16)
    assert torch.equal(half, pixels.normalise(images, MEAN, STD).to(torch.bfloat16))
    torch.testing.assert_close(pixels.denormalise(pixels.normalise(images, MEAN, STD), MEAN, STD), unit)


def test_bounds_are_black_and_white() -> None:
    low, high = pixels.bounds(MEAN, STD, torch.float64)
    black_white = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    normal = pixels.normalise(black_white, MEAN, STD, torch.float64)[:, :, 0, 0]
    torch.testing.assert_close(torch.stack([low, high]), normal)


def test_quantize_modes_clamp_and_nan() -> None:
    values = torch.tensor([-0.3, 0.0, 100.6 / 255, 1.0, 1.7]).view(1, 1, 1, 5).expand(1, 3, 1, 5)
    one = (1.0, 1.0, 1.0)
    zero = (0.0, 0.0, 0.0)
    assert pixels.quantize(values, zero, one)[0, 0, 0].tolist() == [0, 0, 101, 255, 255]
    assert pixels.quantize(values, zero, one, "truncate")[0, 0, 0].tolist() == [0, 0, 100, 255, 255]
    with pytest.raises(ValueError, match="NaN"):
        pixels.quantize(values * torch.nan, zero, one)
    with pytest.raises(ValueError, match="floor"):
        pixels.quantize(values, zero, one, "floor")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\[\.\.\., 3, H, W\].*\[1, 4, 2, 2\]"):
        pixels.normalise(torch.zeros(1, 4, 2, 2), zero, one)


def test_png_round_trip_is_exact_and_jpg_is_quality_75(tmp_path) -> None:
    image = torch.randint(0, 256, (3, 12, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels.save_image(tmp_path / "a.png", image)
    assert torch.equal(pixels.read_image(tmp_path / "a.png"), image)
    pixels.save_image(tmp_path / "a.jpg", image)
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(buffer, "JPEG", quality=75)
    assert (tmp_path / "a.jpg").read_bytes() == buffer.getvalue()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jpg", "a.png"]
    with pytest.raises(ValueError, match=r"uint8 \[3, H, W\]"):
        pixels.save_image(tmp_path / "b.png", image.float())
    with pytest.raises(ValueError, match="bmp"):
        pixels.save_image(tmp_path / "b.bmp", image, "bmp")  # type: ignore[arg-type]
    assert not (tmp_path / "b.png").exists()


def save(path, image: Image.Image, **options) -> tuple[np.ndarray, tuple[str, ...]]:
    image.save(path, **options)
    result, kinds = pixels.decode(path)
    assert result.mode == "RGB"
    return np.asarray(result), kinds


def test_every_kind_of_file_is_converted(tmp_path) -> None:
    ramp = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    rgb = np.stack([ramp, ramp.T, 255 - ramp], -1)
    three = np.repeat(ramp[:, :, None], 3, 2)

    got, kinds = save(tmp_path / "rgb.png", Image.fromarray(rgb))
    np.testing.assert_array_equal(got, rgb)
    assert kinds == ()
    got, kinds = save(tmp_path / "grey.png", Image.fromarray(ramp))
    np.testing.assert_array_equal(got, three)
    assert kinds == ("grey",)
    got, kinds = save(tmp_path / "bits.png", Image.fromarray(ramp > 128))
    np.testing.assert_array_equal(got, np.repeat(((ramp > 128) * 255).astype(np.uint8)[:, :, None], 3, 2))
    assert kinds == ("grey",)
    got, kinds = save(tmp_path / "deep.png", Image.fromarray(ramp.astype(np.uint16) * 257))
    np.testing.assert_array_equal(got, three)
    assert kinds == ("16bit", "grey")
    got, kinds = save(tmp_path / "palette.gif", Image.fromarray(rgb).quantize(32))
    assert kinds == ("palette",)
    assert np.abs(got.astype(int) - rgb).mean() < 20
    got, kinds = save(tmp_path / "ink.jpg", Image.fromarray(three).convert("CMYK"), quality=95)
    assert kinds == ("cmyk",)
    assert np.abs(got.astype(int) - three).max() < 12
    for name in ("bmp", "tiff", "webp", "ppm"):
        got, kinds = save(
            tmp_path / f"rgb.{name}", Image.fromarray(rgb), **({"lossless": True} if name == "webp" else {})
        )
        np.testing.assert_array_equal(got, rgb)
        assert kinds == ()


def test_alpha_is_composited_on_white(tmp_path) -> None:
    red = Image.new("RGBA", (3, 1), (200, 0, 0, 255))
    red.putpixel((1, 0), (200, 0, 0, 0))
    red.putpixel((2, 0), (200, 0, 0, 128))
    got, kinds = save(tmp_path / "alpha.png", red)
    assert kinds == ("alpha",)
    assert got[0, :2].tolist() == [[200, 0, 0], [255, 255, 255]]
    np.testing.assert_allclose(got[0, 2], [227, 127, 127], atol=1)
    got, kinds = save(tmp_path / "grey.png", Image.fromarray(np.array([[[9, 255], [9, 0]]], dtype=np.uint8), "LA"))
    assert kinds == ("grey", "alpha")
    assert got[0].tolist() == [[9, 9, 9], [255, 255, 255]]
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60])
    got, kinds = save(tmp_path / "palette.png", palette, transparency=1)
    assert kinds == ("palette", "alpha")
    assert got[0].tolist() == [[10, 20, 30], [255, 255, 255]]
    got, kinds = save(tmp_path / "key.png", Image.new("RGB", (1, 1), (1, 2, 3)), transparency=(1, 2, 3))
    assert kinds == ("alpha",)
    assert got[0].tolist() == [[255, 255, 255]]


def png(width: int, height: int, depth: int, color: int, raw: bytes) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def test_sixteen_bit_colour_is_scaled(tmp_path) -> None:
    (tmp_path / "deep.png").write_bytes(png(1, 1, 16, 2, b"\0" + struct.pack(">HHH", 0, 0x8080, 0xFFFF)))
    image, kinds = pixels.decode(tmp_path / "deep.png")
    assert kinds == ("16bit",)
    assert image.getpixel((0, 0)) == (0, 128, 255)


def test_bad_files_are_named_with_the_reason(tmp_path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    pixels.save_image(tmp_path / "whole.jpg", noise.transpose(2, 0, 1))
    pixels.save_image(tmp_path / "whole.png", noise.transpose(2, 0, 1))
    cases = {
        "missing.png": (None, "no such file"),
        "empty.jpg": (b"", "empty"),
        "text.jpg": (b"hello " * 9, "not an image"),
    }
    for name in ("whole.jpg", "whole.png"):
        data = (tmp_path / name).read_bytes()
        cases[f"half-{name}"] = (data[: len(data) // 2], "truncated|decoded")
    damaged = bytearray((tmp_path / "whole.png").read_bytes())
    damaged[200:260] = bytes(60)
    cases["damaged.png"] = (bytes(damaged), "decoded|truncated")
    cases["script.png"] = (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image")
    for name, (data, reason) in cases.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=f"{name}: .*({reason})"):
            pixels.decode(tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="folder.png"):
        pixels.decode(tmp_path / "folder.png")


def test_decompression_bombs_are_refused(tmp_path) -> None:
    for side, name in ((9500, "big.png"), (60000, "huge.png")):
        (tmp_path / name).write_bytes(png(side, side, 1, 0, b"\0"))
        with pytest.raises(UserError, match=f"{name}: .*pixels"):
            pixels.decode(tmp_path / name)


def test_read_image_squashes_as_torchvision_does_on_pillow_images(tmp_path) -> None:
    from torchvision.transforms import functional

    array = np.random.default_rng(1).integers(0, 256, (40, 23, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    got = pixels.read_image(tmp_path / "a.png", 16)
    expected = functional.pil_to_tensor(functional.resize(Image.fromarray(array), [16, 16]))
    assert torch.equal(got, expected)
    assert pixels.read_image(tmp_path / "a.png").shape == (3, 40, 23)


def test_grid_places_every_image(tmp_path) -> None:
    images = torch.stack([torch.full((3, 4, 5), 10 * n, dtype=torch.uint8) for n in range(5)])
    data = pixels.grid(images, 3, scale=2, path=tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes() == data
    sheet = Image.open(io.BytesIO(data))
    assert sheet.size == (2 + 3 * 12, 2 + 2 * 10)
    for n in range(5):
        assert sheet.getpixel((2 + n % 3 * 12 + 9, 2 + n // 3 * 10 + 7)) == (10 * n,) * 3
    rows = Image.open(io.BytesIO(pixels.grid(images, 3, titles=["first", "second"])))
    assert rows.width > 2 + 3 * 7
    assert Image.open(io.BytesIO(pixels.grid(images, 3, titles=list("abcde")))).height == 2 + 2 * (4 + 2 + 14)
    with pytest.raises(ValueError, match="titles"):
        pixels.grid(images, 3, titles=["a", "b", "c"])
    with pytest.raises(ValueError, match="uint8"):
        pixels.grid(images.float(), 3)


def oriented(path, orientation, **options) -> np.ndarray:
    """A 2 x 3 picture of four colours with an EXIF orientation; its pixels as stored."""
    colours = np.array([[[0, 0, 0], [250, 0, 0], [0, 250, 0]], [[0, 0, 250], [250, 250, 0], [0, 250, 250]]], np.uint8)
    image = Image.fromarray(colours.repeat(16, 0).repeat(16, 1))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif, **options)
    return np.asarray(image)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_exif_orientation_is_said_and_applied_when_asked(tmp_path, orientation: int, name: str) -> None:
    stored = oriented(
        tmp_path / name, orientation, **({"lossless": True} if name == "a.webp" else {"quality": 100, "subsampling": 0})
    )
    plain, kinds = pixels.decode(tmp_path / name)
    assert kinds == ((pixels.ORIENTED,) if orientation > 1 else ())
    np.testing.assert_allclose(np.asarray(plain).astype(int), stored, atol=90 if name == "a.jpg" else 0)
    turned, same = pixels.decode(tmp_path / name, turn=True)
    assert same == kinds
    with Image.open(tmp_path / name) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    np.testing.assert_array_equal(np.asarray(turned), np.asarray(expected))
    assert (turned.size == plain.size[::-1]) == (orientation >= 5)


@pytest.mark.parametrize("value", [0, 9, 65535])
def test_orientations_that_mean_nothing_are_none(tmp_path, value: int) -> None:
    oriented(tmp_path / "a.jpg", value)
    plain, kinds = pixels.decode(tmp_path / "a.jpg", turn=True)
    assert kinds == ()
    assert plain.size == (48, 32)


@pytest.mark.parametrize(
    "data", [b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0" + b"x" * 40]
)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_damaged_exif_data_are_no_reason_to_refuse_an_image(tmp_path, data: bytes, name: str) -> None:
    Image.new("RGB", (9, 4), (200, 0, 0)).save(tmp_path / name, exif=data)
    for turn in (False, True):
        plain, kinds = pixels.decode(tmp_path / name, turn=turn)
        assert (plain.size, kinds) == ((9, 4), ())


def test_a_tiff_comes_as_pillow_turns_it(tmp_path) -> None:
    Image.new("RGB", (9, 4)).save(tmp_path / "a.tif", tiffinfo={0x0112: 6})
    for turn in (False, True):
        plain, kinds = pixels.decode(tmp_path / "a.tif", turn=turn)
        assert (plain.size, kinds) == ((4, 9), ())


def test_orientation_goes_with_every_conversion(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    for mode, kinds in (("L", ("grey",)), ("RGBA", ("alpha",)), ("P", ("palette",)), ("1", ("grey",))):
        Image.new(mode, (6, 2)).save(tmp_path / "a.png", exif=exif)
        assert pixels.decode(tmp_path / "a.png")[1] == (*kinds, pixels.ORIENTED)
        assert pixels.decode(tmp_path / "a.png", turn=True)[0].size == (2, 6)


@pytest.mark.parametrize("kind", ["pipe", "device", "link to a pipe", "folder"])
def test_what_is_no_file_is_not_opened(tmp_path, kind: str) -> None:
    path = tmp_path / "a.jpg"
    if kind == "folder":
        path.mkdir()
    elif kind == "device":
        path.symlink_to(os.devnull)
    else:
        os.mkfifo(tmp_path / "pipe" if kind == "link to a pipe" else path)
        if kind == "link to a pipe":
            path.symlink_to("pipe")
    with pytest.raises(UserError, match="a.jpg: not a file but a (folder|pipe, socket or device)"):
        pixels.decode(path)


def test_links_without_a_target_are_named_with_it(tmp_path) -> None:
    (tmp_path / "a.jpg").symlink_to("../store/a.jpg")
    with pytest.raises(UserError, match="a.jpg: a link to ../store/a.jpg, which does not exist"):
        pixels.decode(tmp_path / "a.jpg")
    with pytest.raises(UserError, match="b.jpg: no such file"):
        pixels.decode(tmp_path / "b.jpg")
