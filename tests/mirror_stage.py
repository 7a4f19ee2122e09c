"""A stage of a test's own: distilled images, turned left to right or passed on as they are."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from fd2fast.artifacts import Images, open_stage
from fd2fast.data.pixels import read_image, save_image
from fd2fast.entries import Entry, folder_name, methods_of
from fd2fast.graph import Job, StageSpec
from fd2fast.settings.config import RunConfig, wrong_settings
from fd2fast.settings.ranges import NotNegative


@dataclass(frozen=True)
class MirrorConfig:
    """How often images are turned."""

    # Turns; an even number passes the images on.
    turns: NotNegative = 0


def run(config: MirrorConfig, out: Path | str, images: Images, *, overwrite: bool = False) -> Images:
    stage = open_stage(out, Images, config, {"images": images}, overwrite=overwrite)
    if stage.finished:
        return stage.finished
    for name in images.image_names().values():
        pixels = read_image(images.file(name))
        save_image(stage.path / name, pixels.flip(2) if config.turns % 2 else pixels)
    return stage.finish_like(images, images.facts)


def faults(config: MirrorConfig) -> list[str]:
    return wrong_settings(config, "mirror")


def _jobs(run: RunConfig, entries: Sequence[Entry]) -> Iterator[Job]:
    for method in methods_of(entries):
        folder = f"mirrored/{folder_name(method)}"
        yield Job(f"mirror {method}", folder, SPEC.settings(run), key=method, keys={"images": method})


SPEC = StageSpec(run, _jobs, faults)
