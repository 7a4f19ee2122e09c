"""The teacher: backbone + CAL head + class prototypes, saved as one safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fd2fast.artifacts import TeacherArtifact, write_safetensors
from fd2fast.errors import UserError
from fd2fast.models.attention_head import AttentionHead
from fd2fast.models.backbone import Backbone, build_backbone
from fd2fast.system.device import channels_last

# Side of the largest training images that a file may speak of, pixels: its network is tried on one.
_MOST_SIDE = 4096
_METADATA = "fd2fast"  # one key: safetensors writes several in an arbitrary order


class TeacherOutput(NamedTuple):
    """What a teacher says about N images."""

    features: Tensor  # [N, C, h, w], the final map
    attention: Tensor  # [N, M, h, w]
    z: Tensor  # [N, M*C], unit norm
    logits: Tensor  # [N, K] of the backbone branch, p_bb
    cal_logits: Tensor  # [N, K] of the CAL branch, p_raw


class Teacher(nn.Module):
    """Backbone, CAL head and both kinds of class prototypes (Eq. 5).

    `prototypes_ema` and `prototypes_last` are buffers [K, M*C]; `alpha` is the CAL share of Eq. 8 it was trained with,
    `accuracy` the backbone's test accuracy in percent, `size` the side of its training images in pixels.
    """

    prototypes_ema: Tensor
    prototypes_last: Tensor

    def __init__(
        self,
        backbone: Backbone,
        attention_maps: int,
        *,
        alpha: float,
        size: int,
        accuracy: float = float("nan"),
    ):
        super().__init__()
        self.name = backbone.name
        self.classes = backbone.classes
        self.attention_maps = attention_maps
        self.alpha = float(alpha)
        self.accuracy = float(accuracy)
        self.size = int(size)
        self.backbone = backbone
        self.head = AttentionHead(backbone.channels, backbone.classes, attention_maps)
        shape = (backbone.classes, attention_maps * backbone.channels)
        self.register_buffer("prototypes_ema", torch.zeros(shape))
        self.register_buffer("prototypes_last", torch.zeros(shape))

    def forward(self, x: Tensor) -> TeacherOutput:
        """[N, 3, H, W], normalised -> TeacherOutput; one pass, no counterfactual."""
        features = self.backbone.features(x)
        logits = self.backbone.logits(features)
        cal = self.head(features)
        return TeacherOutput(features, cal.attention, cal.z, logits, cal.logits)

    def bn_layers(self) -> list[tuple[str, nn.BatchNorm2d]]:
        """The backbone's BN layers in registration order, then ("cal", the head's)."""
        return [*self.backbone.bn_layers(), ("cal", self.head.attentions.bn)]

    def save(self, path: Path | str) -> None:
        """Write backbone.*, head.* and prototypes with the settings as metadata, atomically; equal teachers, equal bytes."""
        tensors = {f"backbone.{key}": value for key, value in self.backbone.net.state_dict().items()}
        tensors |= {f"head.{key}": value for key, value in self.head.state_dict().items()}
        tensors |= {"prototypes_ema": self.prototypes_ema, "prototypes_last": self.prototypes_last}
        settings = {
            "name": self.name,
            "classes": self.classes,
            "attention_maps": self.attention_maps,
            "alpha": self.alpha,
            "accuracy": self.accuracy,
            "size": self.size,
        }
        write_safetensors(Path(path), tensors, {_METADATA: json.dumps(settings)})

    @staticmethod
    def load(path: Path | str) -> Teacher:
        """Read what `save` wrote, on the CPU in fp32; UserError for any other file."""
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        try:
            with safe_open(path, "pt") as file:
                settings = json.loads((file.metadata() or {})[_METADATA])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
            size = settings["size"]
            if not isinstance(size, int) or not 1 <= size <= _MOST_SIDE:
                raise ValueError(f"size must be 1 to {_MOST_SIDE} pixels, got {str(size)[:20]}")
            backbone = build_backbone(settings["name"], settings["classes"], size)
            teacher = Teacher(
                backbone,
                settings["attention_maps"],
                alpha=settings["alpha"],
                size=size,
                accuracy=settings["accuracy"],
            )
            backbone.net.load_state_dict(_below(tensors, "backbone."))
            teacher.head.load_state_dict(_below(tensors, "head."))
            for name in ("prototypes_ema", "prototypes_last"):
                getattr(teacher, name).copy_(tensors[name])
        except UserError:
            raise
        except (OSError, SafetensorError, LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise UserError(f"{path} is not a teacher of fd2fast: {reason[:300]}; make the teacher again") from error
        return teacher


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}


def load_teacher(
    artifact: TeacherArtifact, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Teacher:
    """The teacher of an artifact on `device` in `dtype`, in eval mode, channels_last, without gradients for its weights.

    Raises UserError if the artifact is no teacher or its class count and the file's differ.
    """
    artifact = TeacherArtifact.of(artifact)
    teacher = Teacher.load(artifact.weights)
    if teacher.classes != len(artifact.classes):
        raise UserError(
            f"teacher {artifact.path} has {teacher.classes} outputs, its manifest {len(artifact.classes)} classes"
        )
    teacher = teacher.to(device=device, dtype=dtype).eval().requires_grad_(False)
    channels_last(teacher)
    return teacher
