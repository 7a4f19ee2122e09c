"""The kinds of result that the stages hand to each other: what each is called, where its files lie, what it tells."""

from __future__ import annotations

import re
from pathlib import Path

from fd2fast.artifacts.artifact import Artifact
from fd2fast.artifacts.facts import DatasetFacts, ImagesFacts, LabelsFacts, MetricsFacts, PatchesFacts, TeacherFacts
from fd2fast.errors import UserError

_IMAGE = re.compile(r"images/new(\d{1,9})/class(\d{1,9})_id(\d{1,9})\.(png|jpg)")


class Dataset(Artifact):
    """A prepared data set: for each split (train, test) its images uint8 [N, 3, S, S] and labels int64 [N]."""

    KIND = "dataset"
    NOUN = "a dataset"
    PREVIEW = "preview.png"
    RENDERED = "images"  # folder of the typefaces' pictures

    @property
    def facts(self) -> DatasetFacts:
        return DatasetFacts.read(self.manifest["facts"], f"dataset {self.path}")

    @staticmethod
    def images_name(split: str) -> str:
        """Of the file with the images of a split."""
        return f"{split}_images.npy"

    @staticmethod
    def labels_name(split: str) -> str:
        """Of the file with the labels of a split."""
        return f"{split}_labels.npy"


class TeacherArtifact(Artifact):
    """A teacher's network, saved as fd2fast.models.teacher.Teacher, with pictures of how it was trained."""

    KIND = "teacher"
    NOUN = "a teacher artifact"
    WEIGHTS = "teacher.safetensors"
    ATTENTION = "attention.png"
    CURVES = "curves.json"
    CURVES_PICTURE = "curves.png"

    @property
    def facts(self) -> TeacherFacts:
        return TeacherFacts.read(self.manifest["facts"], f"teacher {self.path}")

    @property
    def weights(self) -> Path:
        """The file of the network."""
        return self.file(self.WEIGHTS)


class Patches(Artifact):
    """Initial images: of each class the ids 0 .. per_class-1."""

    KIND = "patches"
    NOUN = "patches"
    PREVIEW = "preview.png"

    @property
    def facts(self) -> PatchesFacts:
        return PatchesFacts.read(self.manifest["facts"], f"patches {self.path}")

    @staticmethod
    def image_name(label: int, image_id: int) -> str:
        """Of the file of one image (the layout of RDED)."""
        return f"images/{label:05d}/class{label:05d}_id{image_id:05d}.png"

    def image(self, label: int, image_id: int) -> Path:
        """The file of one image."""
        return self.file(self.image_name(label, image_id))


class Images(Artifact):
    """Distilled images: of each class the same ids 0 .. n-1."""

    KIND = "images"
    NOUN = "an images artifact"
    FOLDER = "images"
    GRID = "grid.png"
    PLAN = "plan.json"
    LOSSES = "losses.json"
    LOSSES_PICTURE = "losses.png"

    @property
    def facts(self) -> ImagesFacts:
        return ImagesFacts.read(self.manifest["facts"], f"images {self.path}")

    @staticmethod
    def image_name(label: int, image_id: int, extension: str) -> str:
        """Of the file of one image (the layout of the reference)."""
        return f"images/new{label:03d}/class{label:03d}_id{image_id:03d}.{extension}"

    def image_names(self) -> dict[tuple[int, int], str]:
        """The file's name of every (class, image id); UserError for an image in the folder of another class."""
        names = {}
        for name in self.manifest["files"]:
            if match := _IMAGE.fullmatch(name):
                folder, label, image_id = (int(match[i]) for i in (1, 2, 3))
                if folder != label:
                    raise UserError(f"{self.path / name}: class {label} in the folder of class {folder}")
                names[label, image_id] = name
        return names

    def per_class(self) -> int:
        """The number of ids 0..n-1 that every class has; UserError where a class lacks one or has none."""
        names = self.image_names()
        count = max((image_id for _, image_id in names), default=-1) + 1
        if count == 0:
            raise UserError(f"{self.path} holds no images")
        for label, name in enumerate(self.classes):
            for image_id in range(count):
                if (label, image_id) not in names:
                    raise UserError(f"{self.path} lacks id {image_id} of class {label} ({name}): distil it again")
        if len(names) != count * len(self.classes):
            raise UserError(f"{self.path} holds images of more classes than the {len(self.classes)} of its manifest")
        return count


class Labels(Artifact):
    """Soft labels: the views of every epoch (fd2fast.data.views) and the teachers' logits for them, float16 [E, N, K]."""

    KIND = "labels"
    NOUN = "a labels artifact"
    LOGITS = "logits.npy"

    @property
    def facts(self) -> LabelsFacts:
        return LabelsFacts.read(self.manifest["facts"], f"labels {self.path}")

    @staticmethod
    def view_name(array: str) -> str:
        """Of the file that holds this array of the views."""
        return f"views/{array}.npy"


class Metrics(Artifact):
    """Accuracies of students, and the students."""

    KIND = "metrics"
    NOUN = "a metrics artifact"
    RESULTS = "metrics.json"
    CURVES_PICTURE = "curves.png"
    STUDENTS = "students"

    @property
    def facts(self) -> MetricsFacts:
        return MetricsFacts.read(self.manifest["facts"], f"metrics {self.path}")

    @staticmethod
    def student_name(seed: int) -> str:
        """Of the file of the student of this seed."""
        return f"students/{seed}.safetensors"
