"""Distilled images from their artifact's files, in class-major order."""

from __future__ import annotations

import numpy as np
import torch

from fd2fast.artifacts import Images
from fd2fast.data.pixels import read_image
from fd2fast.errors import UserError


def load_images(images: Images, ipc: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The distilled images uint8 [K*ipc,3,S,S] and their labels int64 [K*ipc], class by class, each by ascending id.

    ipc: take the ids 0..ipc-1, None takes all. Raises UserError if the artifact holds fewer, lacks a file, or an image has
    another size than the manifest says.
    """
    images = Images.of(images)
    held = images.per_class()
    count = held if ipc is None else ipc
    if not 1 <= count <= held:
        raise UserError(f"images per class must be 1 to {held}, all that {images.path} holds; got {count}")
    names = images.image_names()
    out = np.empty((len(images.classes) * count, 3, images.size, images.size), np.uint8)
    for label in range(len(images.classes)):
        for image_id in range(count):
            path = images.file(names[label, image_id])
            pixels: torch.Tensor = read_image(path)
            if tuple(pixels.shape) != out.shape[1:]:
                raise UserError(
                    f"{path} must be {images.size} x {images.size} pixels, got {pixels.shape[2]} x {pixels.shape[1]}"
                )
            out[label * count + image_id] = pixels.numpy()
    return out, np.repeat(np.arange(len(images.classes), dtype=np.int64), count)
