"""The built-in fine-grained data set: which typeface is this word set in?

Every image shows one word of three to five letters, whole and large. Classes differ in the face only. Within a class
these vary: word, capital, size, angle, position, colours of letters and ground, a gradient and slight noise. Training and test
use different words. An image is a function of (seed, split, face, number, size): asking for more classes or images adds to
a set and leaves the rest as it was.
"""

from __future__ import annotations

import functools
import io
import logging
import math
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fd2fast.artifacts import writing
from fd2fast.data.walk import walk
from fd2fast.errors import UserError
from fd2fast.pictures import font_folder
from fd2fast.seeding import numpy_generator
from fd2fast.settings.config import DataConfig
from fd2fast.system.progress import Progress, track

log = logging.getLogger("fd2fast")

SUFFIXES = (".ttf", ".otf", ".ttc", ".otc", ".woff2", ".woff")
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
DIGITS = "0123456789"

TRAIN_WORDS = tuple(
    """
    ash bay bed bow box bud cab cup dew dog egg elk fan fig fox gem gum hat hen ice ink jam jug key kid lap leg log
    map mud net nut oak oar owl pan peg pie pot ram rug rye saw sky sun tea toy urn van vow wax web yak yam zip zoo
    acre aqua atom bark bean bell bird boat bolt bond bush cake calm camp cave chef clay coal coin cork crab crew cube
    dart dawn deer desk disk dock dove drum dusk echo edge envy exit face farm fern film fish flag foam fork frog fuel
    gate gift glow goat gold grid gull hail harp hawk herb hill hive holy hook horn iris iron jazz jade joke judo jury
    keel kelp kiln king kite knee lace lake lamb lamp leaf lens lily lion loaf loom lynx mask maze melt mesh milk mint
    moon moss navy nest next node noon oath onyx opal oven palm park path peak pear plum poem pond quay quiz raft rain
    reef ring road rock root rope rose ruby sage salt seal seed shed ship silk snow soap sofa star stew swan tank tent
    tide toad tofu tree tuna type unit vase veil view vine wave whey wind wolf wood yard yarn yoga zeal zero zinc zone
    acorn amber apple badge basil birch blaze bread brick cabin camel cedar chalk chess cider cloud coral crown daisy
    delta eagle ember fable ferry fjord flute frost ghost giant grape guava hazel honey ivory jelly jewel kayak knife
    koala lemon lilac llama lotus mango maple melon movie ocean olive opera orbit otter ozone panda pearl piano pixel
    plaza quilt raven river robin royal salad sheep solar spice squid sugar swamp table tiger topaz tulip umbra vapor
    viola vivid waltz whale xenon yacht zebra
    """.split()
)
TEST_WORDS = tuple(
    """
    ant arc axe bat bee bus cat cow cub den dye ear eel elm fin fir fog fur gap gas gin ham hay hip hub ivy jar jet
    joy keg kit lab lid lip mat mop mug nib oil ore paw pen pig pug quo rag ray rib rod sap sea spy tap tin tub vat
    vet wig yen yew zen able axis baby bake barn beef belt blue bone brow calf card cart chip city clan claw club coat
    cone corn cove crow dash deck dice dome door dune dust east epic even fair fawn fire five flax flea foil folk font
    fury game gaze glue gong gown gulf hand haze hemp hero hood host hour hymn idea inch item jail jeep jest join jolt
    jump kale keen kick kind knit knot lard lark lava lawn lime link lock luck lung mail mane mark meal mice mild mole
    monk mule myth nail neon nine nova oboe omen oval oxen pace page pale pane pawn pike pine pipe pony pool port quad
    quip race rail reed rice rift rind roof ruin rust saga sail sand scar self shoe silo sink site skin slab sled song
    soup spur stag stem surf tail tart taxi team tile time tone toga tray tusk tutu urge user vest vibe void volt wage
    wall wand warm wasp well whip wick wing wisp wren yawn year yolk yule zest zoom agate alder arrow aspen azure
    bagel beach beech bison bloom brook cacao cairn canoe cargo cello cliff clove cobra comet crane cubic dairy dingo
    dough drift easel elbow fairy fence finch flame fleet gecko globe grain grove heron hinge hound hydra igloo index
    ingot jumbo karma kiosk knoll lapis larch latch linen lunar macaw magma medal metro moose mural north novel nylon
    oasis onion oxide petal pilot polar poppy prism quail queen query quota radar realm rhyme rumba scarf shell skate
    slate snail spark
    """.split()
)


@dataclass(frozen=True)
class Face:
    """One usable typeface: file and index in it (collections), family, style, class name, tiles of its letters for comparison."""

    path: Path
    index: int
    family: str
    style: str
    name: str
    tiles: np.ndarray  # float32 [52, 28, 56], ink in [0, 1], capital H 18 rows high

    @property
    def source(self) -> str:
        """File name, with the index for a collection."""
        return f"{self.path.name}#{self.index}" if self.index else self.path.name


# Height of a capital H, rows above the base line, and shape of a letter's tile.
_CAP, _BASE, _TILE = 18, 21, (28, 56)
# Share of a face's letters that must look most like themselves among all letters of the known Latin faces (chance: 0.04).
_RECOGNISED = 0.12
# Two faces whose letters differ by less than this share of their ink are one class.
_DISTINCT = 0.2


def builtin_folder() -> Path:
    """The folder of typefaces that come with matplotlib."""
    return font_folder()


def choose(classes: int, folder: Path | str | None = None, *, skip: bool = False) -> list[Face]:
    """`classes` distinct Latin faces below `folder` (None: matplotlib's), spread over families first, always the same ones.

    Raises UserError when the folder is missing or holds fewer, with the count found, and for one that cannot be read below it
    (unless `skip`: it is then only said).
    """
    place = Path(folder).expanduser() if folder is not None else builtin_folder()
    faces, dropped = find_faces(place, skip=skip)
    if len(faces) < classes:
        reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items() if count)
        more = "" if folder is not None else "; fonts may name a folder with more"
        raise UserError(
            f"{classes} typefaces wanted, {len(faces)} usable found in {place}"
            f"{f' (left out: {reasons})' if reasons else ''}{more}"
        )
    families: dict[str, list[Face]] = {}
    for face in faces:
        families.setdefault(face.family.lower(), []).append(face)
    rounds = [members[n] for n in range(len(faces)) for members in families.values() if n < len(members)]
    return sorted(rounds[:classes], key=lambda face: face.name)


def font_files(folder: Path, *, skip: bool = False, dropped: dict[str, int] | None = None) -> list[Path]:
    """Font files below a folder, hidden ones too; links without a target are counted as unreadable in `dropped`.

    Raises UserError where there is none, and for what cannot be read below the folder (unless `skip`: it is then only said).
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} {'is not a folder' if folder.exists() else 'does not exist'}; wanted a folder of fonts"
        )
    below = walk(folder, hidden=True, wanted=_is_font)
    if dropped is not None:
        dropped["unreadable"] += sum(_is_font(path.name) for path, _ in below.dangling)
    if text := below.left_out.say(folder):
        log.info("%s: left out %s", folder, text)
    if below.faults:
        lines = "; ".join(text for _, text in below.faults[:5]) + (" ..." if len(below.faults) > 5 else "")
        if not skip:
            raise UserError(f"fonts below {folder} cannot all be read (bad_images 'skip' goes on without): {lines}")
        log.warning("fonts left out: %s", lines)
    if not below.files:
        raise UserError(f"{folder} holds no font files ({', '.join(SUFFIXES)})")
    return below.files


def find_faces(folder: Path, *, skip: bool = False) -> tuple[list[Face], dict[str, int]]:
    """Usable faces below a folder (links followed), look-alikes once, regular styles first; and why others were left out.

    A face is usable when a-z, A-Z and 0-9 are there and most letters, as drawn, look like Latin letters (symbol and other
    scripts' faces often claim the codes). Files that are no fonts are counted as unreadable.
    """
    dropped = {"unreadable": 0, "without all Latin letters and digits": 0, "not Latin letters": 0, "look-alikes": 0}
    found: list[Face] = []
    files = font_files(folder, skip=skip, dropped=dropped)
    for path in track(files, "typefaces", unit="file") if len(files) > 100 else files:
        for index in range(256):
            try:
                face = _load(path, index)
            except OSError:
                dropped["unreadable"] += index == 0
                break
            if isinstance(face, str):
                dropped[face] += 1
            else:
                found.append(face)
            if path.suffix.lower() not in (".ttc", ".otc"):
                break
    found.sort(key=lambda f: (f.family.lower(), _style_rank(f.style), f.style.lower(), str(f.path), f.index))
    kept = _distinct(found)
    dropped["look-alikes"] = len(found) - len(kept)
    return _named(kept), dropped


def _is_font(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _style_rank(style: str) -> int:
    plain = style.lower()
    for rank, words in enumerate((("regular", "book", "roman", "medium", "normal"), ("bold",), ("italic", "oblique"))):
        if plain in words or (not plain and rank == 0):
            return rank
    return 3


def _load(path: Path, index: int) -> Face | str:
    """The face, or why it is not usable; OSError when the file holds no such face."""
    try:
        font = ImageFont.truetype(str(path), 64, index=index, layout_engine=ImageFont.Layout.BASIC)
    except OSError:
        raise
    except Exception as error:
        raise OSError(str(error)) from error
    try:
        family, style = font.getname()
    except UnicodeDecodeError:
        family, style = None, None
    try:
        if not _complete(font):
            return "without all Latin letters and digits"
        tiles = _tiles(path, index)
    except (OSError, ValueError, MemoryError):  # a damaged glyph, or one of absurd size
        return "unreadable"
    if _recognised(tiles) < _RECOGNISED:
        return "not Latin letters"
    return Face(path, index, family or path.stem, style or "", "", tiles)


def _ink(font: ImageFont.FreeTypeFont, text: str) -> tuple[tuple[int, int, int, int], np.ndarray]:
    """Bounding box (left, top, right, bottom) of the ink relative to the base line's start, and the ink uint8 [h, w]."""
    left, top, right, bottom = (int(v) for v in font.getbbox(text, anchor="ls"))
    if not 0 < right - left < 1024 or not 0 < bottom - top < 1024:
        return (0, 0, 0, 0), np.zeros((0, 0), np.uint8)
    canvas = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(canvas).text((-left, -top), text, fill=255, font=font, anchor="ls")
    ink = np.asarray(canvas)
    return (left, top, right, bottom), ink


def _complete(font: ImageFont.FreeTypeFont) -> bool:
    """Whether each letter and digit has ink of its own: neither blank, nor the sign for a missing character, nor all alike."""
    missing = _ink(font, "\uffff")[1]
    drawn = [_ink(font, c)[1] for c in LETTERS + DIGITS]
    if len({(ink.shape, ink.tobytes()) for ink in drawn[: len(LETTERS)]}) < len(LETTERS) / 2:
        return False
    if any(ink.size == 0 or not ink.any() for ink in drawn):
        return False
    return not any(ink.shape == missing.shape and np.array_equal(ink, missing) for ink in drawn)


def _tiles(path: Path, index: int) -> np.ndarray:
    """Ink of the 52 letters at equal height of the capital H, left edges and base lines aligned, float32 [52, 28, 56]."""
    probe = ImageFont.truetype(str(path), 200, index=index, layout_engine=ImageFont.Layout.BASIC)
    height = -probe.getbbox("H", anchor="ls")[1]
    if height < 20:
        raise ValueError("the capital H is hardly higher than nothing")
    scale = 2
    size = max(1.0, 200 * scale * _CAP / height)
    font = ImageFont.truetype(str(path), size, index=index, layout_engine=ImageFont.Layout.BASIC)
    tiles = np.zeros((len(LETTERS), *_TILE), np.float32)
    for n, letter in enumerate(LETTERS):
        canvas = Image.new("L", (_TILE[1] * scale, _TILE[0] * scale))
        left = font.getbbox(letter, anchor="ls")[0]
        ImageDraw.Draw(canvas).text((scale - left, _BASE * scale), letter, fill=255, font=font, anchor="ls")
        tiles[n] = np.asarray(canvas.reduce(scale), np.float32) / 255
    return tiles


def _soft(tiles: np.ndarray) -> np.ndarray:
    """Letters stretched to one width, blurred, at unit norm, [52, 28 * 24]: width, stroke and slant then count for less."""
    shapes = np.zeros((len(tiles), _TILE[0], 24), np.float32)
    for n, tile in enumerate(tiles):
        columns = np.flatnonzero(tile.max(0) > 0.1)
        if len(columns):
            ink = Image.fromarray(tile[:, columns[0] : columns[-1] + 1])
            shapes[n, :, 2:-2] = np.asarray(ink.resize((20, _TILE[0]), Image.Resampling.BILINEAR))
    for axis in (1, 2):
        padded = np.pad(shapes, [(0, 0)] + [(2, 2) if a == axis else (0, 0) for a in (1, 2)])
        weights, full = (1, 2, 3, 2, 1), shapes.shape[axis]
        shapes = np.sum([w * np.take(padded, range(n, n + full), axis) for n, w in enumerate(weights)], 0)
    flat = shapes.reshape(len(tiles), -1)
    return flat / np.maximum(np.linalg.norm(flat, axis=1, keepdims=True), 1e-6)


@functools.cache
def _latin() -> np.ndarray:
    """Soft tiles of the faces that Latin letters are known by: sans, serif, mono, each upright and slanted."""
    names = ("Sans", "Sans-Oblique", "Sans-Bold", "Serif", "Serif-Italic", "Serif-Bold", "SansMono")
    tiles = [_soft(_tiles(builtin_folder() / f"DejaVu{name}.ttf", 0)) for name in names]
    tiles += [_soft(_tiles(builtin_folder() / f"STIXGeneral{name}.ttf", 0)) for name in ("", "Italic")]
    return np.stack(tiles)  # [R, 52, 28 * 24]


def _recognised(tiles: np.ndarray) -> float:
    """Share of letters whose most alike letter of the known faces is the same one; the lower of small letters and capitals."""
    likeness = np.einsum("ld,rkd->lrk", _soft(tiles), _latin()).max(1)  # [52, 52]
    best = likeness.argmax(1)
    right = [LETTERS[k].lower() == LETTERS[n].lower() for n, k in enumerate(best)]
    return float(min(np.mean(right[:26]), np.mean(right[26:])))


def _distinct(faces: list[Face]) -> list[Face]:
    """The faces in order without those that look like an earlier one."""
    kept: list[Face] = []
    flat: list[np.ndarray] = []
    for face in faces:
        mine = face.tiles.reshape(-1)
        if all(np.linalg.norm(mine - other) >= _DISTINCT * np.linalg.norm(other) for other in flat):
            kept.append(face)
            flat.append(mine)
    return kept


def _named(faces: list[Face]) -> list[Face]:
    """Class names from family and style, fit for folders (100 letters, digits and hyphens at most), made unique by a number."""
    seen: dict[str, int] = {}
    named = []
    for face in faces:
        style = "" if face.style.lower() in ("regular", "book", "roman", "normal") else face.style
        plain = re.sub(r"[^A-Za-z0-9]+", "-", f"{face.family} {style}").strip("-")[:100] or "face"
        count = seen[plain.lower()] = seen.get(plain.lower(), 0) + 1
        name = plain if count == 1 else f"{plain}-{count}"
        named.append(Face(face.path, face.index, face.family, face.style, name, face.tiles))
    return named


def render_set(config: DataConfig, faces: list[Face], folder: Path) -> dict[str, str]:
    """Write folder/{train,test}/CLASS/NNN.png for every face, leaving files of an interrupted run; class name to font file."""
    jobs: list[Callable[[], None]] = []
    done = 0
    for split, count in (("train", config.train_per_class), ("test", config.test_per_class)):
        digits = max(3, len(str(count - 1)))
        for face in faces:
            here = folder / split / face.name
            with writing(here):
                here.mkdir(parents=True, exist_ok=True)
                there = set(os.listdir(here))
            for number in range(count):
                name = f"{number:0{digits}d}.png"
                if name in there and _whole(here / name):
                    done += 1
                else:
                    jobs.append(functools.partial(_write, here / name, face, config.seed, split, number, config.size))
    total = done + len(jobs)
    with Progress("typefaces", total, done=done, unit="img") as bar:
        for job in jobs:  # threads make it slower: nearly all of it holds Python's lock
            job()
            bar.step()
    # only now: between the images it would take longer than they do
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(_sync, sorted(folder.glob("*/*/*.png"))))
    return {face.name: face.source for face in faces}


def _write(path: Path, face: Face, seed: int, split: str, number: int, size: int) -> None:
    content = io.BytesIO()
    Image.fromarray(render(face, seed, split, number, size)).save(content, "PNG", compress_level=1)
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        try:
            temporary.write_bytes(content.getbuffer())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _whole(path: Path) -> bool:
    """Whether a file of an interrupted run is a PNG to its end: after a power cut it may hold less, or zeros."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            image.verify()
    except Exception:  # Pillow raises many kinds for a damaged file
        return False
    return True


def _sync(path: Path) -> None:
    with writing(path):
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


@functools.lru_cache(maxsize=512)
def _font(path: str, index: int, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, size, index=index, layout_engine=ImageFont.Layout.BASIC)


def render(face: Face, seed: int, split: str, number: int, size: int) -> np.ndarray:
    """One image uint8 [size, size, 3]: a word of `split` in `face`."""
    random = numpy_generator(seed, "typefaces", split, face.name, number)
    words = TRAIN_WORDS if split == "train" else TEST_WORDS
    word = words[int(random.integers(len(words)))]
    if random.random() < 0.4:
        word = word.capitalize()
    mask = _mask(face, word, size, random) / np.float32(255)
    ground, letters = _colours(random)
    angle = random.uniform(0, 2 * math.pi)
    axis = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    slope = np.float32(math.cos(angle)) * axis[None, :] + np.float32(math.sin(angle)) * axis[:, None]  # [S, S]
    drift = random.uniform(-0.1, 0.1, 3).astype(np.float32)
    base = ground + slope[:, :, None] * drift
    picture = base + mask[:, :, None] * (letters - base)
    noise = random.standard_normal((size, size, 1), dtype=np.float32) * np.float32(random.uniform(0, 0.025))
    return ((picture + noise).clip(0, 1) * 255 + np.float32(0.5)).astype(np.uint8)


def _mask(face: Face, word: str, size: int, random: np.random.Generator) -> np.ndarray:
    """Ink uint8 [size, size] of the word, turned and shifted, wholly inside; small images are drawn at twice the size."""
    scale = 2 if size < 128 else 1
    side = scale * size
    probe = _font(str(face.path), face.index, 100).getbbox(word, anchor="ls")
    width, height = max(1.0, probe[2] - probe[0]), max(1.0, probe[3] - probe[1])
    tilt = math.radians(random.uniform(-8, 8))
    cos, sin = math.cos(tilt), math.sin(tilt)
    across, down = width * cos + height * abs(sin), height * cos + width * abs(sin)
    fill = random.uniform(0.8, 0.96)
    points = max(4, int(100 * fill * side / max(across, down)))
    font = _font(str(face.path), face.index, points)
    left, top, right, bottom = font.getbbox(word, anchor="ls")
    canvas = Image.new("L", (side, side))
    start = (side / 2 - (left + right) / 2, side / 2 - (top + bottom) / 2)
    ImageDraw.Draw(canvas).text(start, word, fill=255, font=font, anchor="ls")
    ratio = points / 100
    free_x, free_y = (min(0.12 * side, max(0.0, side * 0.97 - extent * ratio) / 2) for extent in (across, down))
    dx, dy = random.uniform(-free_x, free_x), random.uniform(-free_y, free_y)
    half = side / 2  # output pixel to source pixel: turn about the centre, after undoing the shift
    matrix = (
        cos,
        sin,
        half - cos * (half + dx) - sin * (half + dy),
        -sin,
        cos,
        half + sin * (half + dx) - cos * (half + dy),
    )
    turned = canvas.transform((side, side), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
    return np.asarray(turned.reduce(scale))


def _colours(random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Ground and letter colours float32 [3]: any hue, muted, dark on light or light on dark, luma at least 0.4 apart."""
    low = random.uniform(0.08, 0.42)
    high = random.uniform(low + 0.4, 0.92)
    tones = (high, low) if random.random() < 0.5 else (low, high)
    colours = []
    for tone in tones:
        tint = random.uniform(-1, 1, 3)
        tint -= tint @ np.array([0.2989, 0.587, 0.114])
        colours.append((tone + tint * (0.16 / np.abs(tint).max())).clip(0, 1).astype(np.float32))
    return colours[0], colours[1]
