"""Teachers in the file format of the released reference code: read with weights_only, and written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fd2fast.artifacts import read_torch, write_torch
from fd2fast.errors import UserError, nearest
from fd2fast.models.backbone import build_backbone, canonical_name, load_state
from fd2fast.models.matching import check_values
from fd2fast.models.teacher import Teacher
from fd2fast.models.weights_file import read_tensors

# our name -> the reference's, which is the key in the file and the begin of its name
REFERENCE_NAMES = {
    "ResNet18": "ResNet18",
    "ResNet50": "ResNet50",
    "DenseNet121": "Densenet121",
    "MobileNetV2": "MobileNetV2",
    "ShuffleNetV2": "ShuffleNetV2",
    "ShuffleNetV2_x0.5": "ShuffleNetV2",
}
HEAD, CENTERS = "cal", "feature_center"
_NAME = re.compile(r"(?P<model>\w+?)_M(?P<maps>\d+)_(?P<alpha>\de-?\d+)cal")


def alpha_text(alpha: float) -> str:
    """alpha as the reference writes it into file names: one digit, 0.5 -> 5e-1, 1.0 -> 1e-0, 0.25 -> 2e-1."""
    digit, exponent = f"{alpha:.0e}".split("e")
    return f"{digit}e{'' if int(exponent) > 0 else '-'}{abs(int(exponent))}"


def pool_name(teacher: Teacher) -> str:
    """{Model}_M{M}_{alpha}cal.pth; UserError for a backbone the reference does not have."""
    if teacher.name not in REFERENCE_NAMES:
        raise UserError(
            f"teacher {teacher.name!r} has no place in a reference model pool; it holds {', '.join(REFERENCE_NAMES.values())}"
        )
    return f"{REFERENCE_NAMES[teacher.name]}_M{teacher.attention_maps}_{alpha_text(teacher.alpha)}cal.pth"


def export_teacher(teacher: Teacher, folder: Path | str) -> Path:
    """Write the checkpoint the reference's recover and relabel read; the path. UserError if another teacher has its name there.

    A dict {Model: backbone state dict, "cal": head state dict, "feature_center": prototypes of the released rule [K, M*C]}.
    """
    path = Path(folder) / pool_name(teacher)
    content = {
        REFERENCE_NAMES[teacher.name]: _plain(teacher.backbone.net.state_dict()),
        HEAD: _plain(teacher.head.state_dict()),
        CENTERS: teacher.prototypes_last.detach().float().cpu().clone(),
    }
    if path.exists():
        if not _same_content(read_torch(path), content):
            raise UserError(f"{path} is there and holds another teacher; remove it or export to another folder")
        return path
    write_torch(path, content)
    return path


def _same_content(found: Any, content: Any) -> bool:
    if isinstance(content, dict):
        return (
            isinstance(found, dict)
            and found.keys() == content.keys()
            and all(_same_content(found[key], value) for key, value in content.items())
        )
    return isinstance(found, Tensor) and found.dtype == content.dtype and torch.equal(found, content)


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().clone(memory_format=torch.contiguous_format) for key, value in state.items()}


def import_checkpoint(
    path: Path | str, *, size: int, model: str | None = None, alpha: float | None = None
) -> tuple[Teacher, list[str]]:
    """The teacher in a checkpoint of the reference, and notices on what the file does not say.

    path: {Model}_M{M}_{alpha}cal.pth. size: side of its training images, pixels. model and alpha: as in the file's name if
    None. Class count and M come from the tensors. `prototypes_last` are the stored centres; the file has no EMA prototypes:
    `prototypes_ema` are the stored ones at unit norm. The accuracy is unknown (NaN).
    Raises UserError for a file that is no such checkpoint or does not fit the model; nothing in it is executed.
    """
    path = Path(path)
    content = read_tensors(path)
    named = _NAME.match(path.name)
    key = _model_key(path, content, model, named)
    for part, kind in ((key, dict), (HEAD, dict), (CENTERS, Tensor)):
        if not isinstance(content.get(part), kind):
            raise UserError(
                f"{path} is no checkpoint of the reference: {part!r} is missing; it holds {_shown(content)}; weights of a "
                "plain model serve as starting weights: fd2fast pretrain --weights FILE"
            )
    if alpha is None:
        if named is None:
            raise UserError(f"{path}: the name does not tell alpha (wanted Model_M8_5e-1cal.pth); give alpha")
        alpha = float(named["alpha"])
    head, centers = _without_prefix(content[HEAD], "attentions.conv.weight"), content[CENTERS]
    try:
        maps, classes = head["attentions.conv.weight"].shape[0], head["fc.weight"].shape[0]
    except (KeyError, AttributeError, IndexError) as error:
        raise UserError(f"{path}: 'cal' holds no CAL head ({error})") from error
    check_values(
        {**{f"cal.{k}": v for k, v in head.items() if isinstance(v, Tensor)}, CENTERS: centers}, origin=str(path)
    )
    if maps < 1:
        raise UserError(f"{path}: 'cal' has no attention maps ({list(head['attentions.conv.weight'].shape)})")
    backbone = build_backbone(_our_name(key, content[key]), classes)
    load_state(backbone, content[key], origin=str(path), allow_new_head=False)
    teacher = Teacher(backbone, maps, alpha=alpha, size=size)
    try:
        teacher.head.load_state_dict(head)
    except (RuntimeError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path}: 'cal' does not fit {backbone.name}: {' '.join(str(error).split())[:300]}") from error
    if centers.shape != teacher.prototypes_last.shape:
        wanted = list(teacher.prototypes_last.shape)
        raise UserError(f"{path}: 'feature_center' must be [K, M*C] = {wanted}, got {list(centers.shape)}")
    teacher.prototypes_last.copy_(centers)
    teacher.prototypes_ema.copy_(F.normalize(centers.float(), dim=1, eps=1e-12))
    notices = ["the checkpoint has no EMA prototypes: the stored ones at unit norm stand for them"]
    if named is not None and int(named["maps"]) != maps:
        notices.append(f"the file's name says M = {named['maps']}, its tensors {maps}")
    return teacher, notices


def _model_key(path: Path, content: dict[str, Any], model: str | None, named: re.Match[str] | None) -> str:
    if model is not None:
        name = canonical_name(model)
        if name not in REFERENCE_NAMES:
            raise UserError(f"model {model!r} is not in the reference's pools; {nearest(model, REFERENCE_NAMES)}")
        return REFERENCE_NAMES[name]
    if named is not None and named["model"] in content:
        return named["model"]
    found = [key for key in content if key in REFERENCE_NAMES.values()]
    if len(found) != 1:
        raise UserError(
            f"{path} is no checkpoint of the reference: it holds {_shown(content)}, and no one of "
            f"{', '.join(dict.fromkeys(REFERENCE_NAMES.values()))}; weights of a plain model serve as starting weights: "
            "fd2fast pretrain --weights FILE"
        )
    return found[0]


def _shown(content: dict[str, Any]) -> str:
    more = f" and {len(content) - 5} more" if len(content) > 5 else ""
    return f"{[str(key)[:40] for key in list(content)[:5]]}{more}"


def _without_prefix(state: dict[str, Any], name: str) -> dict[str, Any]:
    """Names without what DataParallel or torch.compile put before them, told by the one that must be there."""
    prefix = next((key.removesuffix(name) for key in state if isinstance(key, str) and key.endswith(name)), "")
    return {key.removeprefix(prefix): value for key, value in state.items()} if prefix else state


def _our_name(key: str, state: dict[str, Any]) -> str:
    """The reference's ShuffleNetV2 is x0.5 where FADRM's is x1.0: the width of the tensors tells."""
    if key == "ShuffleNetV2":
        first = _without_prefix(state, "stage2.0.branch1.2.weight").get("stage2.0.branch1.2.weight")
        return "ShuffleNetV2_x0.5" if isinstance(first, Tensor) and first.shape[0] == 24 else "ShuffleNetV2"
    for ours, theirs in REFERENCE_NAMES.items():
        if theirs == key:
            return ours
    raise UserError(f"model {key!r} is not known; {nearest(key, REFERENCE_NAMES.values())}")
