"""Campaign: mutated inputs of every kind at the functions that read them: read, or refused in one line, and nothing else.

    python -m tests.campaign.inputs --count 10000 --seed 0 --out runs/campaign

Each input is a function of its key, KIND/SEED/NUMBER, and is made again by --again KEY. A reader may not raise anything but
UserError, take more than ten seconds or PATIENCE bytes, run what is in a file, begin a process, open a connection, or change
a file outside the folder it was given.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from . import forks, material, mutate, results

SECONDS = 10
MEMORY = 3 << 30  # bytes of address space beyond what the worker begins with
# What an audit hook sees of a change to a file: event -> positions of paths.
CHANGES = {
    "os.mkdir": (0,),
    "os.remove": (0,),
    "os.rmdir": (0,),
    "os.rename": (0, 1),
    "os.link": (1,),
    "os.symlink": (1,),
    "os.truncate": (0,),
    "os.chmod": (0,),
    "os.chown": (0,),
    "shutil.rmtree": (0,),
}
NEVER = (
    "os.system",
    "os.exec",
    "os.forkpty",
    "os.posix_spawn",
    "subprocess.Popen",
    "socket.connect",
    "pty.spawn",
)


class Room:
    """What a trial works with: good files below `made`, an empty folder `here`, and a file that hostile pickles touch."""

    def __init__(self, folder: Path):
        self.made, self.data = folder / "material" / "made", folder / "material" / "data"
        self.here, self.canary = folder / "inputs" / "here", folder / "inputs" / "canary"

    def clear(self) -> None:
        shutil.rmtree(self.here, ignore_errors=True)
        self.here.mkdir(parents=True)
        os.chdir(self.here)  # where paths without a folder lead
        tempfile.tempdir = str(self.here)
        self.canary.unlink(missing_ok=True)

    def good(self, name: str) -> Path:
        """The folder of a stage's result."""
        return self.made / name / "result"

    def copy(self, name: str) -> Path:
        """A copy of it that may be changed."""
        target = self.here / name
        shutil.copytree(self.good(name), target)
        return target


Kind = Callable[[Room, random.Random], Callable[[], Any]]


def image(room: Room, rng: random.Random) -> Callable[[], Any]:
    """One image file of any format, with its ending or another's."""
    import numpy as np
    from PIL import Image

    from fd2fast.data.pixels import decode, read_image, resized

    good = Image.open(rng.choice(sorted(room.data.rglob("*.png")))).convert("RGB")
    mode = rng.choice(("RGB", "RGB", "L", "P", "RGBA", "CMYK", "I;16", "1"))
    if mode == "I;16":
        good = Image.fromarray(np.asarray(good.convert("L")).astype(np.uint16) * 257)
    else:
        good = good.convert(mode)
    kind = rng.choice(("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"))
    buffer = io.BytesIO()
    try:
        good.save(buffer, kind)
    except (OSError, ValueError):  # a format without this mode
        buffer = io.BytesIO()
        Image.new("RGB", good.size, (90, 60, 30)).save(buffer, kind)
    content = mutate.damaged(buffer.getvalue(), rng, other=b"P6 99999 99999 255 ")
    if rng.random() < 0.1:
        side = rng.choice((0, 1, 70_000, 2**31 - 1))
        content = (
            struct.pack(">8sI4sII5s", b"\x89PNG\r\n\x1a\n", 13, b"IHDR", side, side, b"\x08\x02\0\0\0") + content[29:]
        )
    path = room.here / f"image.{rng.choice(('png', 'jpg', 'gif', 'tif', 'webp', 'bmp', 'ppm', 'x'))}"
    path.write_bytes(content)

    def read() -> None:
        read_image(path, rng.choice((None, 16)))
        resized(decode(path)[0], 16)

    return read


def image_folder(room: Room, rng: random.Random) -> Callable[[], Any]:
    """A folder data set with bad files, names, links and folders, prepared."""
    from fd2fast.data.prepare import describe, prepare
    from fd2fast.settings.config import DataConfig

    root = room.here / "data"
    shutil.copytree(room.data, root)
    for _ in range(rng.choice((1, 2, 4))):
        _upset(root, rng, room)
    config = DataConfig(dataset="folder", root=root, size=16, bad_images=rng.choice(("error", "skip")))
    return lambda: describe(prepare(config, room.here / "out"))


def _upset(root: Path, rng: random.Random, room: Room) -> None:
    """One accident in a folder: a file damaged, emptied, lost, renamed, linked or made a folder, and strange new ones."""
    entries = sorted(root.rglob("*"))
    files, folders = [e for e in entries if e.is_file()], [root, *(e for e in entries if e.is_dir())]
    file, folder = rng.choice(files) if files else None, rng.choice(folders)
    names = (
        "new",
        "..x",
        "a\nb",
        "\u202ex",
        "e\u0301",
        " ",
        "-rf",
        "x" * 200,
        "$HOME",
        "class999_id999.png",
        "\x1b[31m",
        "%s.png",
    )
    name: Any = rng.choice((*names, b"\xff\xfe.png"))
    there = os.path.join(os.fsencode(folder), os.fsencode(name))
    kind = rng.randrange(11)
    with contextlib.suppress(OSError):
        if file is not None and kind < 3:
            file.write_bytes(mutate.damaged(file.read_bytes(), rng))
        elif file is not None and kind == 3:
            file.unlink()
        elif file is not None and kind == 4:
            os.rename(file, there)
        elif file is not None and kind == 5:
            file.unlink()
            os.symlink(rng.choice(("/etc/passwd", str(file), "nowhere", str(root), "/", "/dev/zero", "..")), file)
        elif file is not None and kind == 6:
            file.unlink()
            rng.choice((file.mkdir, lambda: os.mkfifo(file)))()
        elif kind == 7:
            os.symlink(rng.choice((str(root), "..", ".", "/", str(folder))), there)
        elif kind == 8:
            os.mkdir(there)
        elif kind == 9:
            with open(there, "wb") as new:
                new.write(mutate.pickled(rng, room.canary) if rng.random() < 0.3 else rng.randbytes(50))
        elif folder != root:
            shutil.rmtree(folder)


def manifest(room: Room, rng: random.Random) -> Callable[[], Any]:
    """manifest.json of each kind of artifact, then everything that reads such an artifact."""
    name = rng.choice(("datasets", "pretrain", "patches", "distill", "relabel", "evaluate"))
    path = room.copy(name)
    good = json.loads((path / "manifest.json").read_text())
    if rng.random() < 0.5:  # one field that readers take at its word
        key = rng.choice(
            ("kind", "id", "classes", "size", "mean", "std", "facts", "files", "parents", "config", "measured")
        )
        if rng.random() < 0.5:
            good[key] = mutate.value(good[key], rng)
        else:
            good[key] = rng.choice(mutate.STRANGE)
        content = json.dumps(good).encode("utf-8", "surrogatepass")
    else:
        content = mutate.as_json(good, rng)
    (path / "manifest.json").write_bytes(content)
    return lambda: _read_artifact(name, path, room)


def _read_artifact(name: str, path: Path, room: Room) -> None:
    """As the stages do that take it as an input."""
    from fd2fast import artifacts
    from fd2fast.data.distilled import load_images
    from fd2fast.data.store import load_split
    from fd2fast.models.teacher import load_teacher
    from fd2fast.settings.config import EvaluateConfig
    from fd2fast.stages.exchange import export_artifact
    from fd2fast.students import student

    kind = {
        "datasets": "dataset",
        "pretrain": "teacher",
        "distill": "images",
        "relabel": "labels",
        "evaluate": "metrics",
    }
    made = artifacts.load(path, kind.get(name, name))
    made.verify()
    if name == "datasets":
        from fd2fast.data.prepare import describe

        describe(made)
        for split in ("train", "test"):
            images = load_split(made, split)
            images.tensor([0, len(images) - 1])
            images.require(1, "a test")
    elif name in ("pretrain", "distill"):
        made.must_fit(artifacts.load(room.good("datasets"), "dataset"))
        if name == "pretrain":
            load_teacher(made)
        else:
            load_images(made)
        export_artifact(made, room.here / "export")
    elif name == "relabel":
        images = artifacts.load(room.good("distill"), "images")
        dataset = artifacts.load(room.good("datasets"), "dataset")
        lessons, _ = student.prepare(EvaluateConfig(device="cpu"), dataset, images, made)
        for epoch in range(lessons.epochs):
            for _ in lessons.epoch(epoch):
                pass
    elif name == "patches":
        from fd2fast.settings.config import DistillConfig
        from fd2fast.stages.distill import _fitting_parents

        dataset = artifacts.load(room.good("datasets"), "dataset")
        teacher = artifacts.load(room.good("pretrain"), "teacher")
        _fitting_parents(DistillConfig(ipc=2, init="patches", group_size=2), dataset, [teacher], made)


def run_folder(room: Room, rng: random.Random) -> Callable[[], Any]:
    """The index and manifests of a finished run, reported."""
    from fd2fast.pipeline import report_of

    path = room.copy("run")
    file = rng.choice([path / "run.json", *sorted(path.rglob("manifest.json"))])
    file.write_bytes(mutate.as_json(json.loads(file.read_text()), rng))
    return lambda: report_of(path)


def output_folder(room: Room, rng: random.Random) -> Callable[[], Any]:
    """A begun or finished output folder with damaged records, given to the stage that it belongs to."""
    from fd2fast.data.prepare import prepare
    from fd2fast.settings.config import DataConfig

    path, state = room.here / "out", room.here / "out" / "state"
    shutil.copytree(room.good("datasets"), path)
    finished = json.loads((path / "manifest.json").read_text())
    if rng.random() < 0.6:
        (path / "manifest.json").unlink()
        state.mkdir()
        begun = {key: finished[key] for key in ("kind", "config", "parents")}
        (state / "begun.json").write_bytes(
            mutate.as_json(begun, rng) if rng.random() < 0.5 else json.dumps(begun).encode()
        )
        (state / "seconds.json").write_bytes(mutate.as_json(1.5, rng))
        for split in ("train", "test"):
            (state / f"{split}.json").write_bytes(mutate.as_json({"size": 32, "keys": [["x", 1, 2]]}, rng))
            (state / f"{split}_status.npy").write_bytes(mutate.npy(_zeros((4,)), rng, room.canary))
    else:
        (path / "manifest.json").write_bytes(mutate.as_json(finished, rng))
    config = DataConfig(dataset="folder", root=room.data, size=32)
    return lambda: prepare(config, path, overwrite=rng.random() < 0.3)


def _zeros(shape: tuple[int, ...]) -> Any:
    import numpy as np

    return np.zeros(shape, np.uint8)


def toml(room: Room, rng: random.Random) -> Callable[[], Any]:
    """Settings of a run."""
    from fd2fast.pipeline import check
    from fd2fast.settings.presets import from_toml, preset

    good = material.RUN + '\nout = "x"\n[data]\nroot = "~/x"\n' if rng.random() < 0.1 else material.RUN
    kind = rng.random()
    if kind < 0.7:
        content = mutate.text(good, rng).encode("utf-8", "surrogatepass")
    elif kind < 0.9:
        content = mutate.damaged(good.encode(), rng)
    else:
        deep, dotted = b"a = " + b"[" * 50_000, b"a" + b".a" * 5000 + b" = 1"
        content = rng.choice((deep, dotted, good.encode("utf-16"), b"\xef\xbb\xbf" + good.encode()))
    path = room.here / "mine.toml"
    path.write_bytes(content)
    return lambda: check(from_toml(path, preset("typefaces")))


def teacher_file(room: Room, rng: random.Random) -> Callable[[], Any]:
    """teacher.safetensors, and students' weights as starting weights."""
    from fd2fast.models.backbone import build_backbone, load_weights
    from fd2fast.models.teacher import Teacher

    path = room.here / "teacher.safetensors"
    if rng.random() < 0.6:
        path.write_bytes(mutate.safetensors((room.good("pretrain") / path.name).read_bytes(), rng))
        return lambda: Teacher.load(path)
    good = sorted(room.good("evaluate").rglob("*.safetensors"))[0].read_bytes()
    path.write_bytes(mutate.safetensors(good, rng))
    return lambda: load_weights(build_backbone(material.MODEL, 3), path)


def checkpoint(room: Room, rng: random.Random) -> Callable[[], Any]:
    """Starting weights and the reference's checkpoints, as torch files."""
    import torch

    from fd2fast.artifacts import read_torch
    from fd2fast.models.backbone import build_backbone, load_weights
    from fd2fast.models.released_checkpoints import import_checkpoint

    torch.manual_seed(0)
    reference = rng.random() < 0.3
    name = "ShuffleNetV2_x0.5" if reference else material.MODEL
    backbone = build_backbone(name, 3)
    content: dict[str, Any] = dict(backbone.net.state_dict())
    path = room.here / rng.choice(("weights.pth", "ShuffleNetV2_M2_5e-1cal.pth", "model.bin", "x.pt"))
    if reference:
        from fd2fast.models.attention_head import AttentionHead

        head = AttentionHead(backbone.channels, 3, 2).state_dict()
        content = {"ShuffleNetV2": content, "cal": dict(head), "feature_center": torch.zeros(3, 2 * backbone.channels)}
    elif rng.random() < 0.3:
        content = {"epoch": 3, "state_dict": content, "best": 1.5}
    path.write_bytes(mutate.state(content, rng, room.canary))
    if reference:
        return lambda: import_checkpoint(path, size=32, model=rng.choice((None, "ShuffleNetV2")))
    if rng.random() < 0.2:
        return lambda: read_torch(path)
    return lambda: load_weights(backbone, path)


def arrays(room: Room, rng: random.Random) -> Callable[[], Any]:
    """Arrays of a data set or of a label store, in a folder whose manifest vouches for them."""
    import numpy as np

    name = rng.choice(("datasets", "relabel", "relabel"))
    path = room.copy(name)
    file = rng.choice(sorted(path.rglob("*.npy")))
    file.write_bytes(mutate.npy(np.load(file), rng, room.canary))
    written = json.loads((path / "manifest.json").read_text())
    from fd2fast.artifacts import file_digest, identity_digest

    written["files"][file.relative_to(path).as_posix()] = file_digest(file)
    written["id"] = identity_digest(written)
    (path / "manifest.json").write_text(json.dumps(written))
    return lambda: _read_artifact(name, path, room)


def distilled(room: Room, rng: random.Random) -> Callable[[], Any]:
    """A folder of patches or distilled images with accidents in it, its manifest in step with it or not."""
    name = rng.choice(("distill", "patches"))
    path = room.copy(name)
    for _ in range(rng.choice((1, 2, 3))):
        _upset(path, rng, room)
    if rng.random() < 0.5 and (path / "manifest.json").is_file():
        with contextlib.suppress(ValueError, KeyError, OSError):
            written = json.loads((path / "manifest.json").read_text())
            from fd2fast.artifacts import file_digest, identity_digest

            files = [p for p in path.rglob("*") if p.is_file() and p.name != "manifest.json"]
            written["files"] = {p.relative_to(path).as_posix(): file_digest(p) for p in files}
            written["id"] = identity_digest(written)
            (path / "manifest.json").write_text(json.dumps(written))
    return lambda: _read_artifact(name, path, room)


def font(room: Room, rng: random.Random) -> Callable[[], Any]:
    """A folder of typefaces, one of them bad, chosen from and drawn."""
    import matplotlib

    from fd2fast.data import typefaces
    from fd2fast.settings.config import DataConfig

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    good = sorted(fonts.glob("DejaVuSans*.ttf"))
    folder = room.here / "fonts"
    folder.mkdir()
    shutil.copyfile(good[0], folder / "a.ttf")
    content = bytearray((fonts / "DejaVuSansMono.ttf").read_bytes())
    if rng.random() < 0.5:  # the table of tables
        at = 12 + 16 * rng.randrange(12) + rng.choice((0, 8, 12))
        content[at : at + 4] = rng.choice((bytes(4), b"\xff" * 4, rng.randbytes(4)))
    else:
        content = bytearray(mutate.damaged(bytes(content), rng))
    (folder / f"b.{rng.choice(('ttf', 'otf', 'ttc', 'woff2', 'woff'))}").write_bytes(content)
    config = DataConfig(classes=2, size=16, train_per_class=1, test_per_class=1, fonts=folder)

    def read() -> None:
        faces = typefaces.choose(2, folder)
        typefaces.render_set(config, faces, room.here / "out")

    return read


def annotations(room: Room, rng: random.Random) -> Callable[[], Any]:
    """CUB's, Aircraft's and Cars' own files."""
    from fd2fast.data.layouts import read_layout

    root, kind = room.here / "data", rng.choice(("cub", "aircraft", "cars", "cars", "cars"))
    root.mkdir()
    files = _OFFICIAL[kind](root, rng)
    for _ in range(rng.choice((1, 1, 2))):
        file = rng.choice(files)
        if file.suffix == ".mat" or rng.random() < 0.2:
            if file.suffix != ".mat" or rng.random() < 0.6:
                file.write_bytes(mutate.damaged(file.read_bytes(), rng))
        else:
            content = file.read_text(encoding="utf-8", errors="replace")
            file.write_bytes(mutate.text(content, rng).encode("utf-8", "surrogatepass"))
    return lambda: read_layout(kind, root)


def _cub(root: Path, rng: random.Random) -> list[Path]:
    (root / "images").mkdir()
    names = [f"{k:03d}.bird/{n}.jpg" for k in (1, 2) for n in range(4)]
    lines = {
        "classes.txt": ["1 001.bird", "2 002.bird"],
        "images.txt": [f"{n} {name}" for n, name in enumerate(names, 1)],
        "image_class_labels.txt": [f"{n} {1 + (n > 4)}" for n in range(1, 9)],
        "train_test_split.txt": [f"{n} {n % 2}" for n in range(1, 9)],
    }
    return _write_lines(root, lines)


def _aircraft(root: Path, rng: random.Random) -> list[Path]:
    (root / "data" / "images").mkdir(parents=True)
    lines = {
        "variants.txt": ["707-320", "A300B4"],
        "images_variant_trainval.txt": [f"000{n} {('707-320', 'A300B4')[n % 2]}" for n in range(4)],
        "images_variant_test.txt": [f"100{n} {('707-320', 'A300B4')[n % 2]}" for n in range(4)],
    }
    return _write_lines(root / "data", lines)


def _write_lines(folder: Path, lines: dict[str, list[str]]) -> list[Path]:
    for name, content in lines.items():
        (folder / name).write_text("\n".join(content) + "\n")
    return [folder / name for name in lines]


def _cars(root: Path, rng: random.Random) -> list[Path]:
    import numpy as np
    from scipy.io import savemat

    (root / "devkit").mkdir()
    for folder in ("cars_train", "cars_test"):
        (root / folder).mkdir()
    strange = [s for s in mutate.STRANGE if not isinstance(s, dict) and s is not None and s not in ([], [[]])]
    files = {}
    for name in ("cars_train_annos.mat", "cars_test_annos_withlabels.mat"):
        rows = np.zeros(4, dtype=[("fname", "O"), ("class", "O")])
        for n in range(4):
            rows[n] = (f"0{n}.jpg", 1 + n % 2)
        if rng.random() < 0.5:
            rows[rng.randrange(4)][rng.choice(("fname", "class"))] = rng.choice(strange)
        files[name] = {"annotations": rows}
    files["cars_meta.mat"] = {"class_names": np.array(["a", "b"], object)}
    for name, content in files.items():
        try:
            savemat(root / "devkit" / name, content)
        except Exception:  # a value that MATLAB's format does not hold
            savemat(root / "devkit" / name, {"annotations": np.array([1.0, np.nan])})
    return [root / "devkit" / name for name in files]


_OFFICIAL: dict[str, Callable[[Path, random.Random], list[Path]]] = {"cub": _cub, "aircraft": _aircraft, "cars": _cars}

# Kinds of input, and how often each is chosen.
KINDS: dict[str, tuple[Kind, float]] = {
    "image": (image, 3),
    "image folder": (image_folder, 1),
    "manifest": (manifest, 3),
    "run folder": (run_folder, 0.5),
    "output folder": (output_folder, 1),
    "TOML": (toml, 2),
    "safetensors": (teacher_file, 2),
    "checkpoint": (checkpoint, 2),
    "arrays": (arrays, 2),
    "distilled images and patches": (distilled, 1.5),
    "font": (font, 0.5),
    "annotations": (annotations, 2),
}


class Worker:
    """A forked process that reads one input after the other, watched by an audit hook and by the clock."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._to, self._from = os.pipe(), os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if not self.pid:
            _serve(Room(folder), self._to[0], self._from[1])
        os.close(self._to[0])
        os.close(self._from[1])
        self._answers = os.fdopen(self._from[0], encoding="utf-8")

    def ask(self, key: str) -> dict[str, str] | None:
        """What became of the input; None where there was no answer in time, after which the worker is dead."""
        os.write(self._to[1], (key + "\n").encode())
        if select.select([self._answers], [], [], SECONDS)[0] and (line := self._answers.readline()):
            return json.loads(line)
        self.end()
        return None

    def end(self) -> int:
        """Its signal or exit code."""
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        os.close(self._to[1])
        self._answers.close()
        return os.waitstatus_to_exitcode(status)


def _serve(room: Room, questions: int, answers: int) -> NoReturn:
    """The worker's side."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, resource.RLIM_INFINITY))
    sink = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(sink, number)
    room.here.parent.mkdir(parents=True, exist_ok=True)
    broken: list[str] = []
    watching = False
    allowed = os.path.realpath(room.here) + os.sep

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if not watching:
            return
        if event in NEVER:
            broken.append(f"{event} {arguments!r:.200}")
            raise PermissionError(f"the campaign does not allow {event}")
        paths = [arguments[n] for n in CHANGES.get(event, ())]
        if event == "open" and isinstance(arguments[2], int):
            path, mode, flags = arguments
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC) or set(mode or "") & set("wax+"):
                paths = [path]
        for path in paths:
            if isinstance(path, int):
                continue
            real = os.path.realpath(os.fsdecode(path))
            if not (real + os.sep).startswith(allowed) and real != os.devnull and os.path.isabs(os.fsdecode(path)):
                broken.append(f"{event} {real:.200}")

    sys.addaudithook(hook)
    from fd2fast.errors import UserError

    with os.fdopen(questions, encoding="utf-8") as keys, os.fdopen(answers, "w", encoding="utf-8") as replies:
        for line in keys:
            key = line.strip()
            room.clear()
            broken.clear()
            rng = random.Random(key)
            found = {"outcome": "read", "fault": ""}
            read = KINDS[key.split("/")[0]][0](room, rng)
            watching = True
            try:
                read()
            except UserError as error:
                found["outcome"] = "refused"
                if len(str(error)) > 20_000:
                    found["fault"] = f"a message of {len(str(error))} characters"
            except BaseException as error:
                place = traceback.extract_tb(error.__traceback__)
                inner = next((f for f in reversed(place) if "fd2fast" in f.filename), place[-1])
                where = f"{Path(inner.filename).name}:{inner.lineno}"
                found = {"outcome": "raised", "fault": f"{type(error).__name__} at {where}: {str(error)[:160]!r}"}
            watching = False
            if room.canary.exists():
                found["fault"] = "a file was executed"
            elif broken:
                found["fault"] = broken[0]
            replies.write(json.dumps(found) + "\n")
            replies.flush()
    os._exit(0)


class Inputs:
    """The trials of a folder, which is made ready when the first is run."""

    def __init__(self, folder: Path, only: str = ""):
        """only: as in `keys`."""
        names = [name for name in KINDS if only in name]
        # what is needed for all others comes before these
        late = (
            "export" if "run folder" in names else "evaluate" if {"safetensors", "manifest"} & set(names) else "relabel"
        )
        material.prepare(folder / "material", late)
        self.folder = folder
        self._worker: Worker | None = None

    def trial(self, key: str) -> results.Trial:
        """One input."""
        if self._worker is None:
            self._worker = Worker(self.folder)
        found = self._worker.ask(key)
        if found is None:
            self._worker = None
            found = {"outcome": "raised", "fault": f"no answer in {SECONDS} s, or the process died"}
        return results.Trial(key, key.split("/")[0], {found["outcome"]: 1}, found["fault"])

    def close(self) -> None:
        if self._worker is not None:
            self._worker.end()


def keys(count: int, seed: int, only: str = "") -> list[str]:
    """The inputs of a campaign."""
    names = [name for name in KINDS if only in name]
    rng = random.Random(seed)
    chosen = rng.choices(names, [KINDS[name][1] for name in names], k=count)
    return [f"{name}/{seed}/{number}" for number, name in enumerate(chosen)]


def again(folder: Path, key: str) -> None:
    """Make one input and read it in this process, with its traceback."""
    forks.load()
    room = Room(folder)
    room.clear()
    print(KINDS[key.split("/")[0]][0](room, random.Random(key))())


def main(arguments: list[str] | None = None) -> int:
    """Run the campaign; 1 where a trial went wrong."""
    parser = results.options(__doc__.splitlines()[0], 10_000)
    parser.add_argument("--again", default="", help="one key, read in this process")
    given = parser.parse_args(arguments)
    folder = given.out.resolve()
    if given.again:
        again(folder, given.again)
        return 0
    found = results.Results(given.out, "inputs")
    inputs = Inputs(folder, given.only)
    found.run(keys(given.count, given.seed, given.only), inputs.trial)
    inputs.close()
    return results.end(found)


if __name__ == "__main__":
    sys.exit(main())
