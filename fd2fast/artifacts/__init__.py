"""Stage results on disk: a folder with its files and a manifest.json, written atomically, resumable, checked when read."""

from fd2fast.artifacts.artifact import Artifact, load
from fd2fast.artifacts.facts import (
    DatasetFacts,
    Facts,
    ImagesFacts,
    LabelsFacts,
    MetricsFacts,
    PatchesFacts,
    TeacherFacts,
    TrainedTeacherFacts,
)
from fd2fast.artifacts.files import (
    atomic_path,
    new_array,
    read_json,
    read_torch,
    resumable,
    sync_folder,
    write_bytes,
    write_json,
    write_npy,
    write_safetensors,
    write_torch,
    writing,
)
from fd2fast.artifacts.folder import MANIFEST, STAMPS, STATE, made, started
from fd2fast.artifacts.identity import config_dict, digest, identity_digest
from fd2fast.artifacts.kinds import Dataset, Images, Labels, Metrics, Patches, TeacherArtifact
from fd2fast.artifacts.opening import obstacle, open_stage
from fd2fast.artifacts.stage import Stage
from fd2fast.system.sources import file_digest

__all__ = [
    "MANIFEST",
    "STAMPS",
    "STATE",
    "Artifact",
    "Dataset",
    "DatasetFacts",
    "Facts",
    "Images",
    "ImagesFacts",
    "Labels",
    "LabelsFacts",
    "Metrics",
    "MetricsFacts",
    "Patches",
    "PatchesFacts",
    "Stage",
    "TeacherArtifact",
    "TeacherFacts",
    "TrainedTeacherFacts",
    "atomic_path",
    "config_dict",
    "digest",
    "file_digest",
    "identity_digest",
    "load",
    "made",
    "new_array",
    "obstacle",
    "open_stage",
    "read_json",
    "read_torch",
    "resumable",
    "started",
    "sync_folder",
    "write_bytes",
    "write_json",
    "write_npy",
    "write_safetensors",
    "write_torch",
    "writing",
]
