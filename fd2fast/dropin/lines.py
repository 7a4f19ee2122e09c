"""What the published recover scripts print and draw while they work, told by the engine's onlooker."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from fd2fast.artifacts import atomic_path
from fd2fast.data.pixels import decode
from fd2fast.dropin.draws import Block, Drawn
from fd2fast.dropin.recovery import Recovery
from fd2fast.pictures import figure, picture, plotting, png
from fd2fast.system.streams import say

# Quality of the copies of initial images (OpenCV's default).
_QUALITY = 95


class Lines:
    """Lines that all recover scripts share; each script's own are in its file."""

    every = 50
    ends = True  # the last iteration has lines, too

    def __init__(
        self, recovery: Recovery, *, initial: Path | None = None, curves: Callable[[Block], Path] | None = None
    ):
        """initial: folder for copies of the initial images; curves: where a task's picture of its losses lies."""
        self.recovery, self._initial, self._curves = recovery, initial, curves
        self.series: dict[Block, list[tuple[int, dict[str, float]]]] = {}

    def due(self, iteration: int) -> bool:
        return iteration % self.every == 0 or (self.ends and iteration == sum(self.recovery.iterations) - 1)

    def begun(self, block: Block, drawn: Drawn) -> None:
        say(f"currently processing label from {block.first} to {self.last(block)}")
        self._keep_initial(block, drawn)

    def names(self, drawn: Drawn) -> str:
        """The task's teachers."""
        return ", ".join(self.recovery.members[index].model for index in drawn.models)

    def last(self, block: Block) -> int:
        """How the script tells the end of a task's classes."""
        return block.end - 1

    def told_initial(self, separator: str, patches: str) -> None:
        """Which initial images there are."""
        method = "Guassian" if self.recovery.initial == "noise" else f"Patches{separator}{patches} "
        say(f"initialisation method: {method}")

    def lines(self, block: Block, drawn: Drawn, iteration: int, losses: Mapping[str, float], seconds: float) -> None:
        if self._curves is not None:
            self.series.setdefault(block, []).append((iteration, dict(losses)))
        self.report(block, drawn, iteration, losses)
        say(f"time for previous iterations: {seconds}")

    def report(self, block: Block, drawn: Drawn, iteration: int, losses: Mapping[str, float]) -> None:
        """The script's lines on one iteration."""

    def images(self, block: Block, images: Tensor) -> None:
        """Nothing, unless the script looks at them."""

    def phase(self, number: int, size: int, block: Block) -> None:
        """Nothing, where there is one phase."""

    def ended(self, block: Block, seconds: float) -> None:
        if self.recovery.keep:
            say("save_images call")
        if self._curves is not None:
            path = self._curves(block)
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(
                path, functools.partial(_drawn, self.series.pop(block, []), f"{block.image_id}: {path.parent.name}")
            )

    def id_ended(self, image_id: int, seconds: float) -> None:
        say(f"time for ipc_id({image_id}) = {seconds}")

    def _keep_initial(self, block: Block, drawn: Drawn) -> None:
        """Copies of the initial images, where they are wanted."""
        if self._initial is None or drawn.patches is None or self.recovery.patches is None:
            return
        folder = self._initial / f"call_{block.image_id}" / f"{block.first}_to_{block.end}"
        folder.mkdir(parents=True, exist_ok=True)
        say(f"Initialisation dir: {folder}")
        for label, name in zip(block.classes, drawn.patches, strict=True):
            image = decode(self.recovery.patches / name)[0]
            with atomic_path(folder / f"{label}.jpg") as temporary, open(temporary, "wb") as file:
                Image.fromarray(np.asarray(image)).save(file, "JPEG", quality=_QUALITY)


@plotting()
def _drawn(series: Sequence[tuple[int, Mapping[str, float]]], title: str) -> bytes:
    """The losses over the iterations, one picture each."""
    names = [name for name in (series[0][1] if series else {}) if any(losses[name] for _, losses in series)]
    drawn: Any = figure(3.2 * max(1, len(names)), 2.8, layout="constrained")
    for column, name in enumerate(names):
        axes = drawn.add_subplot(1, len(names), column + 1)
        axes.plot([iteration for iteration, _ in series], [losses[name] for _, losses in series], linewidth=0.8)
        axes.set_title(name)
        axes.set_xlabel("iteration")
    drawn.suptitle(title)
    return png(drawn, 90)
