"""The tensors that a model wants, found in whatever a checkpoint holds: wrappers, prefixes, EMA copies."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fd2fast.errors import UserError
from fd2fast.models.weights_file import Foreign, how_to_save, whole_models

# parts of names that torch.compile, FSDP and activation checkpointing put before a module, at any depth
_WRAPPED = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_fpw_module)\.")
_EMA = re.compile(r"(?:^|[._/])(?:ema|averaged|swa)(?=$|[._/\d])", re.IGNORECASE)
_MOST_DEPTH, _MOST_GROUPS, _MOST_PREFIXES = 6, 500, 50
_SHOWN = 3


@dataclass
class Candidate:
    """A group of tensors of a checkpoint, read as the weights of the wanted model."""

    entry: str  # keys that lead to the group, joined by "/"; empty for the file's own
    prefix: str  # before every name, with its last dot; may be empty
    tensors: dict[str, Tensor]  # under the wanted model's names
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shapes: list[str] = field(default_factory=list)
    head: int = 0  # 0 fits, 1 has another shape, 2 is not there

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unexpected or self.shapes)

    @property
    def ema(self) -> bool:
        return bool(_EMA.search(f"{self.entry}/{self.prefix}"))

    @property
    def where(self) -> str:
        """How people find it in the file."""
        parts = [repr(self.entry)] if self.entry else []
        parts += [f"prefix {self.prefix!r}"] if self.prefix else []
        return " with ".join(parts) or "the file itself"

    def faults(self) -> str:
        """What does not fit, the first names of each kind."""
        told = []
        for what, keys in (("missing", self.missing), ("unexpected", self.unexpected), ("other shape", self.shapes)):
            if keys:
                more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
                told.append(f"{what}: {', '.join(keys[:_SHOWN])}{more}")
        return "; ".join(told)


def find(
    content: Mapping[Any, Any],
    wanted: Mapping[str, torch.Size],
    head: Sequence[str] = (),
    *,
    new_head: bool = True,
    rename: Callable[[str], str] = str,
) -> list[Candidate]:
    """Every group of tensors that could be the wanted model's, the one that fits best first.

    wanted: shapes by name. head: names in the classifier, which with `new_head` may have another shape or be absent. rename:
    applied to every name. BatchNorm's counters may be absent. Fitting groups come before others, those whose head fits first,
    then EMA copies, which are what timm takes.
    """
    found: list[Candidate] = []
    for entry, group in _groups(content):
        plain = {_WRAPPED.sub("", rename(key)): value for key, value in group.items()}
        for prefix in _prefixes(plain, wanted):
            own = {key[len(prefix) :]: value for key, value in plain.items() if key.startswith(prefix)}
            found.append(_judge(Candidate(entry, prefix, own), wanted, head, new_head))

    def order(one: Candidate) -> tuple[bool, int, bool, int]:
        good = sum(1 for key, value in one.tensors.items() if wanted.get(key) == value.shape)
        return (not one.fits, one.head if one.fits else 0, not one.ema if one.fits else False, -good)

    return sorted(found, key=order)


def choose(candidates: Sequence[Candidate], *, origin: str) -> tuple[Candidate, list[str]]:
    """The group to take of those that fit, and a notice if EMA weights were preferred to others.

    Raises UserError that lists the choices when several of equal right differ.
    """
    best = candidates[0]
    rivals = [one for one in candidates[1:] if one.fits and one.head == best.head and not _equal(one, best)]
    equal = [one for one in rivals if one.ema == best.ema]
    if equal:
        choices = ", ".join(one.where for one in (best, *equal))
        keys = "".join(f"[{key!r}]" for key in best.entry.split("/") if key)
        how = (
            f"only the names that begin with {best.prefix!r}"
            if equal[0].entry == best.entry
            else f"torch.save(torch.load(FILE){keys}, 'weights.pth')"
        )
        raise UserError(
            f"{origin} holds several sets of weights that fit: {choices}; save the one you want in a file of its own, "
            f"e.g. {how}"
        )
    if best.ema and rivals:
        others = " and ".join(one.where for one in rivals)
        return best, [f"the EMA weights ({best.where}) were taken, not {others}"]
    return best, []


def refuse(
    content: Mapping[Any, Any], candidates: Sequence[Candidate], *, origin: str, model: str, hint: str
) -> UserError:
    """The error for a file without a group that fits: what is nearest and what of it does not fit."""
    if not candidates:
        for key, pickled in whole_models(dict(content)):
            return UserError(f"{origin}: {key!r} holds {how_to_save(pickled.name, key)}")
        if not content:
            return UserError(f"{origin} holds no tensors; wanted the state dict of a model")
        key, value = next(iter(content.items()))
        kind = value.name if isinstance(value, Foreign) else type(value).__name__
        return UserError(f"{origin} is not a state dict: {key!r} is a {kind}, wanted a tensor")
    best = candidates[0]
    place = f" (nearest: {best.where})" if best.entry or best.prefix else ""
    quantised = any(_is_quantised(value) for value in best.tensors.values())
    more = "; its weights are quantised: give those of the float model" if quantised else hint and f"; {hint}"
    return UserError(f"{origin} does not hold weights of {model}{place}: {best.faults()}{more}")


def check_values(tensors: Mapping[str, Tensor], *, origin: str) -> None:
    """UserError that names the first tensor that cannot be a weight: quantised, without values, NaN or infinite."""
    bad: list[str] = []
    for key, value in tensors.items():
        if key.endswith("num_batches_tracked"):
            continue
        if _is_quantised(value):
            raise UserError(
                f"{origin}: {key} is {str(value.dtype).removeprefix('torch.')}, wanted floats: the weights are quantised or "
                "no weights; give those of the float model"
            )
        if value.is_meta or value.layout != torch.strided or value.is_complex():
            raise UserError(f"{origin}: {key} has no plain values ({value.layout}, {value.dtype}, {value.device})")
        wrong = int((~torch.isfinite(value.float())).sum())
        if wrong:
            bad.append(f"{key} ({wrong} of {value.numel()})")
    if bad:
        more = f" and {len(bad) - _SHOWN} more tensors" if len(bad) > _SHOWN else ""
        raise UserError(
            f"{origin} holds values that are NaN or infinite: {', '.join(bad[:_SHOWN])}{more}; the training that wrote it "
            "diverged, or the file is damaged: take an earlier or another checkpoint"
        )


def _groups(content: Mapping[Any, Any]) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Every dict in the content that holds tensors under names, with the keys that lead to it."""
    waiting: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), content)]
    seen: set[int] = set()
    count = 0
    while waiting and count < _MOST_GROUPS:
        path, entries = waiting.pop(0)
        if id(entries) in seen:
            continue
        seen.add(id(entries))
        tensors = {key: value for key, value in entries.items() if isinstance(key, str) and isinstance(value, Tensor)}
        if tensors:
            count += 1
            yield "/".join(path), tensors
        if len(path) < _MOST_DEPTH:
            waiting += [((*path, str(key)), value) for key, value in entries.items() if isinstance(value, dict)]


def _prefixes(names: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Beginnings after which names of the wanted model follow, the most frequent first; the empty one always."""
    votes: dict[str, int] = {"": 0}
    for name in names:
        at = 0
        while True:
            if name[at:] in wanted:
                votes[name[:at]] = votes.get(name[:at], 0) + 1
            dot = name.find(".", at)
            if dot < 0:
                break
            at = dot + 1
    return sorted(votes, key=lambda prefix: -votes[prefix])[:_MOST_PREFIXES]


def _judge(one: Candidate, wanted: Mapping[str, torch.Size], head: Sequence[str], new_head: bool) -> Candidate:
    """Write into a candidate what of it does not fit, and take a head out that does not."""
    own = one.tensors
    known = [key for key in head if key in wanted]
    if known and new_head:
        if not any(key in own for key in known):
            one.head = 2
        elif any(key in own and own[key].shape != wanted[key] for key in known):
            one.head = 1
    replaced = set(known) if one.head else set()
    for key in wanted:
        if key in own and own[key].shape != wanted[key] and key not in replaced:
            if key.endswith("num_batches_tracked") and own[key].numel() == 1:
                own[key] = own[key].reshape(wanted[key])
            else:
                one.shapes.append(f"{key} {tuple(own[key].shape)} for {tuple(wanted[key])}")
        elif key not in own and key not in replaced and not key.endswith("num_batches_tracked"):
            one.missing.append(key)
    one.unexpected = [key for key in own if key not in wanted]
    return one


def _equal(one: Candidate, other: Candidate) -> bool:
    """Whether two candidates hold the same weights."""
    return one.tensors.keys() == other.tensors.keys() and all(
        value.dtype == other.tensors[key].dtype and torch.equal(value, other.tensors[key])
        for key, value in one.tensors.items()
    )


def _is_quantised(value: Tensor) -> bool:
    return not (value.is_floating_point() or value.is_complex() or value.numel() == 1)
