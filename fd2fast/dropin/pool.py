"""Teachers of the published model pools: `{Model}_M{M}_{a}cal.pth` and plain `{Model}.pth`, read strictly, executing nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fd2fast.dropin.networks import SMALL, STOCKED, small_backbone, stock_backbone, stocked
from fd2fast.errors import UserError
from fd2fast.models.attention_head import AttentionHead
from fd2fast.models.backbone import Backbone
from fd2fast.models.released_checkpoints import CENTERS, HEAD, alpha_text
from fd2fast.models.teacher import Teacher
from fd2fast.models.weights_file import Foreign, read_tensors

# Keys of the files beside the network's own; the first ones whose shapes differ are named.
_SHOWN = 3


@dataclass(frozen=True)
class Member:
    """A teacher as the command line names it; maps None: a plain network without CAL head."""

    model: str
    maps: int | None = None
    alpha: float = 0.0

    @property
    def file(self) -> str:
        """Its file's name in a pool."""
        if self.maps is None:
            return f"{self.model}.pth"
        return f"{self.model}_M{self.maps}_{alpha_text(self.alpha)}cal.pth"


@dataclass(frozen=True)
class Loaded:
    """A teacher, and which of the two architectures of its name its weights are of ("CVDD" or "torchvision")."""

    teacher: Teacher
    source: str


def check_names(members: Sequence[Member]) -> None:
    """UserError where two members of different alpha would be read from one file: its name has one digit of alpha."""
    known: dict[str, Member] = {}
    for member in members:
        other = known.setdefault(member.file, member)
        if other.alpha != member.alpha:
            raise UserError(
                f"cal_ratio {other.alpha} and {member.alpha} of {member.model} have one file name, {member.file}: the name "
                "keeps one digit of alpha; give ratios that differ in it"
            )


def is_rounded(member: Member) -> bool:
    """Whether the file's name says another alpha than the member's."""
    return member.maps is not None and float(alpha_text(member.alpha)) != member.alpha


def load_pooled(
    member: Member,
    folder: Path,
    *,
    classes: int,
    size: int,
    sources: Sequence[str] = (SMALL, STOCKED),
    half_shuffle: bool = True,
) -> Loaded:
    """The teacher in `folder`, in eval mode without gradients.

    sources: architectures tried, in this order. Raises UserError for a file that is missing, no such checkpoint, or whose
    shapes differ from the network's, the head's or the prototypes': it names the first tensors with both shapes.
    """
    path = folder / member.file
    if not path.is_file():
        raise UserError(f"{path} is missing; wanted the weights of {member.model} ({_what(member)})")
    content = read_tensors(path)
    if member.maps is None:
        weights: Any = content
    else:
        weights = content.get(member.model)
        for key, kind in ((member.model, dict), (HEAD, dict), (CENTERS, Tensor)):
            if not isinstance(content.get(key), kind):
                raise UserError(f"{path} holds no {key!r}: {_holds(content)}; wanted {_what(member)}")
    backbone, source = _fitting(member.model, weights, path, classes, sources, half_shuffle)
    maps = 1 if member.maps is None else member.maps
    teacher = Teacher(backbone, maps, alpha=member.alpha, size=size)
    if member.maps is not None:
        head, centers = content[HEAD], content[CENTERS]
        _load(teacher.head, head, f"{path}: {HEAD!r}", f"M = {maps} and {classes} classes")
        wanted = teacher.prototypes_last.shape
        if centers.shape != wanted:
            raise UserError(
                f"{path}: {CENTERS!r} is {list(centers.shape)}, wanted [K, M*C] = {list(wanted)} for M = {maps}, "
                f"{classes} classes"
            )
        teacher.prototypes_last.copy_(centers)
        teacher.prototypes_ema.copy_(F.normalize(centers.float(), dim=1, eps=1e-12))
    return Loaded(teacher.eval().requires_grad_(False), source)


def load_online(model: str, *, size: int, half_shuffle: bool) -> Loaded:
    """torchvision's own ImageNet weights (1000 classes); UserError where they are neither cached nor reachable."""
    chosen = stocked(model, half_shuffle=half_shuffle)
    backbone = stock_backbone(model, 1000, half_shuffle=half_shuffle, new_head=False)
    try:
        import torchvision

        weights = torchvision.models.get_model_weights(chosen.builder)["IMAGENET1K_V1"]
        state = weights.get_state_dict(progress=False, check_hash=True)
    except Exception as error:  # urllib, ssl and hashing each raise their own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"the online weights of {model} cannot be fetched ({reason}); give --pretrained-model-type offline and a pool "
            f"folder with {model}.pth"
        ) from error
    _load(backbone.net, state, f"the online weights of {model}", "1000 classes")
    return Loaded(Teacher(backbone, 1, alpha=0.0, size=size).eval().requires_grad_(False), STOCKED)


def consume_initial_weights(
    member: Member,
    source: str,
    *,
    classes: int,
    sources: Sequence[str] = (SMALL, STOCKED),
    half_shuffle: bool = True,
    new_head: bool = True,
) -> None:
    """Draw from the global generator what the published code draws to make this teacher before it loads its weights."""
    channels = 0
    for tried in sources:
        made = (
            small_backbone(member.model, classes)
            if tried == SMALL
            else stock_backbone(member.model, classes, half_shuffle=half_shuffle, new_head=new_head)
        )
        channels = made.channels
        if tried == source:
            break
    if member.maps is not None:
        AttentionHead(channels, classes, member.maps)


def _fitting(
    model: str, weights: Any, path: Path, classes: int, sources: Sequence[str], half_shuffle: bool
) -> tuple[Backbone, str]:
    """The network, of those tried, that the weights are of."""
    faults: dict[str, list[str]] = {}
    made: dict[str, Backbone] = {}
    for source in sources:
        build = small_backbone if source == SMALL else stock_backbone
        options: dict[str, Any] = {} if source == SMALL else {"half_shuffle": half_shuffle}
        with torch.device("meta"):
            shapes = build(model, classes, **options).net.state_dict()
        faults[source] = _faults(weights, shapes)
        if not faults[source]:
            with torch.random.fork_rng(devices=[]):
                made[source] = build(model, classes, **options)
            made[source].net.load_state_dict(weights)
            return made[source], source
    nearest = min(faults, key=lambda source: len(faults[source]))
    raise UserError(
        f"{path}: the weights are not of {nearest}'s {model} with {classes} classes: {_first(faults[nearest])}"
    )


def _load(module: torch.nn.Module, weights: Mapping[str, Tensor], origin: str, wanted: str) -> None:
    found = _faults(weights, module.state_dict())
    if found:
        raise UserError(f"{origin} does not fit {wanted}: {_first(found)}")
    module.load_state_dict(weights)


def _faults(weights: Any, shapes: Mapping[str, Tensor]) -> list[str]:
    """What keeps the weights from being those of a network with these shapes."""
    if not isinstance(weights, Mapping):
        return [f"they are a {type(weights).__name__}"]
    found = []
    for name, wanted in shapes.items():
        value = weights.get(name)
        if not isinstance(value, Tensor):
            found.append(f"{name} is missing")
        elif value.shape != wanted.shape:
            found.append(f"{name} is {list(value.shape)}, wanted {list(wanted.shape)}")
    return found + [f"{name} is strange to it" for name in weights if name not in shapes]


def _first(faults: Sequence[str]) -> str:
    more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return f"{'; '.join(faults[:_SHOWN])}{more}"


def _what(member: Member) -> str:
    if member.maps is None:
        return "a plain state dict"
    return f"a dict of {member.model!r}, {HEAD!r} and {CENTERS!r} with M = {member.maps}"


def _holds(content: Mapping[str, Any]) -> str:
    strange = [key for key, value in content.items() if isinstance(value, Foreign)]
    told = f"it holds {[str(key)[:40] for key in list(content)[:5]]}"
    return f"{told}, of which {strange[:3]} are no tensors" if strange else told
