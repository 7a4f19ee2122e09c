"""Pixels: reading and writing image files, 8 bits to normalised floats and back, preview grids."""

from __future__ import annotations

import errno
import io
import math
import os
import stat
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageFont, TiffImagePlugin, WebPImagePlugin

from fd2fast.artifacts import atomic_path, write_bytes
from fd2fast.errors import UserError
from fd2fast.system.streams import plain

# A file may decode to at most this many pixels: a few kilobytes can otherwise ask for all memory.
MAX_PIXELS = 80_000_000
# Formats that Pillow decodes by itself; EPS, for one, would start a PostScript interpreter.
FORMATS = (
    "JPEG",
    "PNG",
    "BMP",
    "GIF",
    "PPM",
    TiffImagePlugin.TiffImageFile.format,
    WebPImagePlugin.WebPImageFile.format,
)
CONVERSIONS = ("grey", "palette", "cmyk", "alpha", "16bit", "other")
# Said of a file beside the conversions: its EXIF orientation is not the one that it is stored in.
ORIENTED = "oriented"
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Said once by Pillow for a file that is read all the same; a filter for a block would not be safe among threads.
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)

# A preview is made smaller, or shows fewer rows and columns, beyond these: pixels of the sheet, and of one side.
_SHEET_PIXELS, _SHEET_SIDE = 80_000_000, 16_000
# Side of the smallest image in a preview, pixels.
_LEAST_TILE = 8
# Characters of a title.
_TITLE = 60

Quantization = Literal["round", "truncate"]


def _channel(values: Sequence[float] | torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(values, dtype=like.dtype, device=like.device).view(3, 1, 1)


def _check(name: str, images: torch.Tensor) -> None:
    if images.dim() < 3 or images.shape[-3] != 3:
        raise ValueError(f"{name} must be [..., 3, H, W], got {list(images.shape)}")


def to_unit(images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """uint8 [..., 3, H, W] to floats in [0, 1]; floats are only cast."""
    if images.dtype == torch.uint8:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return images.to(wide).div_(255).to(dtype)
    if not images.is_floating_point():
        raise ValueError(f"images must be uint8 or floats in [0, 1], got {images.dtype}")
    return images.to(dtype)


def normalise(
    images: torch.Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """(x - mean) / std per channel of uint8 or [0, 1] float images [..., 3, H, W]; half types are rounded once, at the end.

    Raises ValueError for another channel count or integer type.
    """
    _check("images", images)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    unit = to_unit(images, wide)
    return ((unit - _channel(mean, unit)) / _channel(std, unit)).to(dtype)


def denormalise(images: torch.Tensor, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """x * std + mean of normalised images [..., 3, H, W]: back to [0, 1], not clamped; fp64 stays, all else gives fp32."""
    _check("images", images)
    wide = images if images.dtype == torch.float64 else images.float()
    return wide * _channel(std, wide) + _channel(mean, wide)


def bounds(
    mean: Sequence[float], std: Sequence[float], dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised values of black and white: low [3] = -mean/std and high [3] = (1 - mean)/std, computed in fp64."""
    centre = torch.as_tensor(mean, dtype=torch.float64)
    scale = torch.as_tensor(std, dtype=torch.float64)
    return (-centre / scale).to(dtype), ((1 - centre) / scale).to(dtype)


def quantize(
    images: torch.Tensor, mean: Sequence[float], std: Sequence[float], mode: Quantization = "round"
) -> torch.Tensor:
    """Normalised images [..., 3, H, W] to uint8: denormalise, clamp to [0, 1], times 255, round or truncate (released code).

    Raises ValueError where an image holds NaN: its optimisation has diverged.
    """
    if mode not in ("round", "truncate"):
        raise ValueError(f"mode must be 'round' or 'truncate', got {mode!r}")
    values = denormalise(images, mean, std)
    if bool(torch.isnan(values).any()):
        raise ValueError("images hold NaN: the optimisation diverged")
    values = values.clamp_(0, 1).mul_(255)
    return (values.round_() if mode == "round" else values.trunc_()).to(torch.uint8)


def encode(image: torch.Tensor | np.ndarray, format: Literal["png", "jpg"] = "png") -> bytes:
    """A uint8 [3, H, W] image as the bytes of a PNG or a JPEG (Pillow's defaults, quality 75)."""
    array = image.cpu().numpy() if isinstance(image, torch.Tensor) else image
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[0] != 3:
        raise ValueError(f"image must be uint8 [3, H, W], got {array.dtype} {list(array.shape)}")
    if format not in ("png", "jpg"):
        raise ValueError(f"format must be 'png' or 'jpg', got {format!r}")
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0))).save(buffer, "PNG" if format == "png" else "JPEG")
    return buffer.getvalue()


def save_image(path: Path | str, image: torch.Tensor | np.ndarray, format: Literal["png", "jpg"] | None = None) -> None:
    """Write a uint8 [3, H, W] image atomically; `format` None: by the ending of `path`."""
    path = Path(path)
    kind = format or ("jpg" if path.suffix.lower() in (".jpg", ".jpeg") else "png")
    write_bytes(path, encode(image, kind))


def decode(path: Path | str, *, turn: bool = False) -> tuple[Image.Image, tuple[str, ...]]:
    """The file as an RGB Pillow image, and which of CONVERSIONS it took, then ORIENTED if it has an EXIF orientation.

    Alpha and transparent colours are composited on white; 16 bits are scaled to 8; EXIF orientation is ignored, as
    torchvision's ImageFolder does, unless `turn` (Pillow always applies that of a TIFF). Raises UserError that names the file
    when it is missing, no regular file (it is not opened then), empty, truncated, no image of a known format, or larger than
    MAX_PIXELS.
    """
    path = Path(path)
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{path}: not a file but {'a folder' if path.is_dir() else 'a pipe, socket or device'}")
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UserError(
                    f"{path}: {image.width} x {image.height} pixels are more than the {MAX_PIXELS} that one file may hold"
                )
            rgb, kinds = _to_rgb(image)
            orientation = _orientation(image)
            if orientation is None:
                return rgb, kinds
            return rgb.transpose(_TURNS[orientation]) if turn else rgb, (*kinds, ORIENTED)
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{path}: more than the {MAX_PIXELS} pixels that one file may hold") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error and more
        raise UserError(f"{path}: {_reason(path, error)}") from error


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno in (errno.ENOENT, errno.ENOTDIR):
        return f"a link to {os.readlink(path)}, which does not exist" if path.is_symlink() else "no such file"
    if isinstance(error, OSError) and error.errno:
        return error.strerror or str(error)
    if path.is_file() and path.stat().st_size == 0:
        return "the file is empty (0 bytes)"
    if "cannot identify" in str(error):
        return "not an image file (JPEG, PNG, BMP, GIF, TIFF, WebP or PPM)"
    if "truncated" in str(error).lower():
        return "the image is truncated"
    return f"cannot be decoded ({str(error).splitlines()[0] if str(error) else type(error).__name__})"


def _orientation(image: Image.Image) -> int | None:
    """EXIF orientation 2 to 8 of a loaded image; None where there is none, a damaged one, or the usual 1."""
    try:
        value = image.getexif().get(ExifTags.Base.Orientation)
        return value if value in _TURNS else None
    except Exception:  # damaged EXIF data raise many kinds of errors and are no reason to refuse an image
        return None


def _to_rgb(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
    kinds = []
    if image.mode.startswith("I") or any("16" in str(tile[3]) for tile in getattr(image, "tile", ())):
        kinds.append("16bit")
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image.convert("RGB"), tuple(kinds)
    if mode in ("1", "L", "LA", "La", "I", "I;16", "I;16L", "I;16B", "I;16N"):
        kinds.append("grey")
    if mode in ("P", "PA"):
        kinds.append("palette")
    if mode == "CMYK":
        kinds.append("cmyk")
    if mode in ("YCbCr", "LAB", "HSV", "RGBX"):
        kinds.append("other")
    if mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels have no known range")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB"), tuple(kinds)
    if image.has_transparency_data:
        kinds.append("alpha")
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, layer).convert("RGB"), tuple(kinds)
    return image.convert("RGB"), tuple(kinds)


def resized(image: Image.Image, size: int | None) -> np.ndarray:
    """An RGB Pillow image squashed to `size` x `size` (bilinear, antialiased) as uint8 [3, H, W]."""
    if size is not None and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def read_image(path: Path | str, size: int | None = None) -> torch.Tensor:
    """Read any supported image file as uint8 [3, H, W], squashed to `size` x `size` if given; errors as `decode`."""
    image, _ = decode(path)
    return torch.from_numpy(resized(image, size).copy())


def grid(
    images: torch.Tensor | np.ndarray,
    columns: int,
    *,
    titles: Sequence[str] | None = None,
    scale: int = 1,
    path: Path | str | None = None,
) -> bytes:
    """A picture of uint8 images [N, 3, H, W], `columns` to a row, as PNG bytes (also written to `path` if given).

    titles: one for each row (shown at its left) or one for each image (shown above it). scale: pixels are repeated.
    A sheet stays below 16,000 pixels a side and 80 million in all: images are made smaller, then rows and columns left out.
    """
    array = images.cpu().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1] != 3 or len(array) == 0:
        raise ValueError(f"images must be uint8 [N, 3, H, W] with N > 0, got {array.dtype} {list(array.shape)}")
    if columns < 1 or scale < 1:
        raise ValueError(f"columns and scale must be at least 1, got {columns} and {scale}")
    count, _, height, width = array.shape
    rows = math.ceil(count / columns)
    titles = [plain(title, _TITLE) for title in titles or []]
    if titles and len(titles) not in (rows, count):
        raise ValueError(f"titles must hold one for each of {rows} rows or {count} images, got {len(titles)}")
    left, above = bool(titles) and len(titles) == rows, bool(titles) and len(titles) != rows
    font = ImageFont.load_default(11)
    gap = 2
    tile_width, tile_height, shown_columns, rows = _bounded(width * scale, height * scale, columns, rows, gap)
    margin = gap + (int(max(font.getlength(t) for t in titles)) + 6 if left else 0)
    caption = 14 if above else 0
    cell = (tile_width + gap, tile_height + gap + caption)
    sheet = Image.new("RGB", (margin + shown_columns * cell[0], gap + rows * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    for n in range(count):
        if n % columns >= shown_columns or n // columns >= rows:
            continue
        x, y = margin + n % columns * cell[0], gap + n // columns * cell[1]
        tile = Image.fromarray(np.ascontiguousarray(array[n].transpose(1, 2, 0)))
        if (tile_width, tile_height) != (width, height):
            larger = tile_width >= width and tile_height >= height
            tile = tile.resize((tile_width, tile_height), Image.Resampling.NEAREST if larger else Image.Resampling.BOX)
        sheet.paste(tile, (x, y + caption))
        if above:
            text = titles[n]
            while text and font.getlength(text) > tile_width:
                text = text[:-1]
            draw.text((x, y), text, fill="black", font=font)
    if left:
        for row, text in enumerate(titles[:rows]):
            draw.text((gap, gap + row * cell[1] + tile_height // 2), text, fill="black", font=font, anchor="lm")
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    if path is not None:
        with atomic_path(Path(path)) as temporary:
            temporary.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def _bounded(width: int, height: int, columns: int, rows: int, gap: int) -> tuple[int, int, int, int]:
    """Tile width and height, columns and rows of a sheet within the limits: as given where those allow it."""
    sides = columns * (width + gap), rows * (height + gap)
    share = min(1.0, math.sqrt(_SHEET_PIXELS / (sides[0] * sides[1])), *(_SHEET_SIDE / side for side in sides))
    if share == 1:
        return width, height, columns, rows
    width, height = (max(min(_LEAST_TILE, side), int((side + gap) * share) - gap) for side in (width, height))
    columns, rows = min(columns, _SHEET_SIDE // (width + gap)), min(rows, _SHEET_SIDE // (height + gap))
    most = _SHEET_PIXELS // (columns * (width + gap) * (height + gap))
    return width, height, columns, min(rows, max(1, most))
