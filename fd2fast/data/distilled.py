"""Distilled images from their artifact's files, in class-major order."""

from __future__ import annotations

import re

import numpy as np
import torch

from fd2fast.artifacts import Artifact
from fd2fast.data.pixels import read_image
from fd2fast.errors import UserError

_NAME = re.compile(r"images/new(\d{1,9})/class(\d{1,9})_id(\d{1,9})\.(png|jpg)")


def image_files(images: Artifact) -> dict[tuple[int, int], str]:
    """Name of the file of every (class, image id) of an "images" artifact; UserError for another kind of artifact."""
    if images.kind != "images":
        raise UserError(f"{images.path} holds a {images.kind} artifact; wanted an images artifact")
    found = {}
    for name in images.manifest["files"]:
        if match := _NAME.fullmatch(name):
            folder, label, image_id = (int(match[i]) for i in (1, 2, 3))
            if folder != label:
                raise UserError(f"{images.path / name}: class {label} in the folder of class {folder}")
            found[label, image_id] = name
    return found


def images_per_class(images: Artifact) -> int:
    """The number of ids 0..n-1 that every class has; UserError where a class lacks one or has none."""
    files = image_files(images)
    count = max((image_id for _, image_id in files), default=-1) + 1
    if count == 0:
        raise UserError(f"{images.path} holds no images")
    for label, name in enumerate(images.classes):
        for image_id in range(count):
            if (label, image_id) not in files:
                raise UserError(f"{images.path} lacks id {image_id} of class {label} ({name}): distil it again")
    if len(files) != count * len(images.classes):
        raise UserError(f"{images.path} holds images of more classes than the {len(images.classes)} of its manifest")
    return count


def load_images(images: Artifact, ipc: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The distilled images uint8 [K*ipc,3,S,S] and their labels int64 [K*ipc], class by class, each by ascending id.

    ipc: take the ids 0..ipc-1, None takes all. Raises UserError if the artifact holds fewer, lacks a file, or an image has
    another size than the manifest says.
    """
    held = images_per_class(images)
    count = held if ipc is None else ipc
    if not 1 <= count <= held:
        raise UserError(f"images per class must be 1 to {held}, all that {images.path} holds; got {count}")
    files = image_files(images)
    out = np.empty((len(images.classes) * count, 3, images.size, images.size), np.uint8)
    for label in range(len(images.classes)):
        for image_id in range(count):
            path = images.file(files[label, image_id])
            pixels: torch.Tensor = read_image(path)
            if tuple(pixels.shape) != out.shape[1:]:
                raise UserError(
                    f"{path} must be {images.size} x {images.size} pixels, got {pixels.shape[2]} x {pixels.shape[1]}"
                )
            out[label * count + image_id] = pixels.numpy()
    return out, np.repeat(np.arange(len(images.classes), dtype=np.int64), count)
