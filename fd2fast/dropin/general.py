"""The recover scripts of CV-DD and FADRM: what their flags mean, what they print, and how they make their networks."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fd2fast.dropin.draws import Block, Drawn, Voting
from fd2fast.dropin.fine_grained import common_of, scores_of
from fd2fast.dropin.flags import folder
from fd2fast.dropin.lines import Lines
from fd2fast.dropin.networks import SMALL, STOCKED
from fd2fast.dropin.pool import Loaded, Member, consume_initial_weights, load_online, load_pooled
from fd2fast.dropin.recovery import Recovery, run
from fd2fast.dropin.targets import GENERAL, Known, target_of
from fd2fast.errors import UserError
from fd2fast.system.device import pick_device
from fd2fast.system.streams import say

_R18, _R50, _SNV2, _MBV2, _DN121 = "ResNet18", "ResNet50", "ShuffleNetV2", "MobileNetV2", "Densenet121"
# CV-DD's --model-setting: the committees that are drawn from, or (lists of lists) the one of each image id.
_DRAWN_FROM = {
    1: (_R18, _R50, _SNV2, _DN121),
    2: (_R18, _R50, _SNV2, _MBV2),
    3: (_R18, _R50, _SNV2, _MBV2, _DN121),
    7: (_R18, _R50, _SNV2),
}
_BEST_PAIRS = {"imagenet-nette": (_MBV2, _DN121), "cifar10": (_MBV2, _DN121), "cifar100": (_SNV2, _MBV2)}
_IN_TURN = {
    5: (
        (_R18, _R50),
        (_R18, _SNV2),
        (_R18, _MBV2),
        (_R18, _DN121),
        (_R50, _SNV2),
        (_R50, _MBV2),
        (_R50, _DN121),
        (_SNV2, _MBV2),
        (_SNV2, _DN121),
        (_MBV2, _DN121),
    ),
    6: (
        (_R18, _R50, _SNV2),
        (_R18, _SNV2, _MBV2),
        (_R18, _MBV2, _DN121),
        (_R18, _DN121, _R50),
        (_R50, _SNV2, _MBV2),
        (_R50, _MBV2, _DN121),
        (_R50, _DN121, _R18),
        (_SNV2, _MBV2, _R50),
        (_SNV2, _DN121, _R18),
        (_MBV2, _DN121, _R50),
    ),
}
# Data sets whose pools hold torchvision's networks.
_STOCKED_SETS = ("imagenet-nette", "imagewoof", "imagenet1k")


def cvdd_recovery(script: str, options: argparse.Namespace) -> Recovery:
    """What the flags of CV-DD's recover mean."""
    known = target_of(
        options.dataset_name, {k: v for k, v in GENERAL.items() if k != "imagewoof"}, options.fd2fast_dataset
    )
    setting, size = options.model_setting, options.selected_size
    sequence: tuple[tuple[int, ...], ...] | None = None
    if setting == 0:
        if size != 1 or options.voter_type != "equal":
            raise UserError(
                "--model-setting 0 has one teacher: wanted --selected-size 1 and --voter-type equal, got "
                f"{size} and {options.voter_type}"
            )
        names: tuple[str, ...] = (options.sre2l_model,)
    elif setting == 4:
        best = sorted(known.accuracies, key=lambda name: known.accuracies[name], reverse=True)[:2]
        names = _BEST_PAIRS.get(options.dataset_name, tuple(best))
    elif setting in _IN_TURN:
        names = tuple(dict.fromkeys(name for team in _IN_TURN[setting] for name in team))
        sequence = tuple(tuple(names.index(name) for name in team) for team in _IN_TURN[setting])
        if options.ipc_end > len(sequence):
            raise UserError(f"--model-setting {setting} has {len(sequence)} committees: --ipc-end must be at most that")
    elif setting in _DRAWN_FROM:
        names = _DRAWN_FROM[setting]
    else:
        raise UserError(f"model setting not supported: {setting}; wanted 0 to 7")
    if sequence is None and not 1 <= size <= len(names):
        raise UserError(f"--selected-size must be 1 to {len(names)}, the models of this setting, got {size}")
    members = tuple(Member(name) for name in names)
    voting = Voting(
        len(members),
        each=None if sequence is not None else size,
        sequence=sequence,
        rule=options.voter_type,
        scores=scores_of(members, known, options.voter_type, needed=sequence is not None or size > 1),
        temperature=options.weight_temperature,
    )
    side = known.target.size
    return _recovery(
        script,
        options,
        known,
        members,
        voting,
        schedule="all",
        iterations=(options.iteration,),
        sizes=(side,),
        residual=1.0,
        noise_sides=(side,),
        extension="jpg",
        weights_by_task=False,
    )


def fadrm_recovery(script: str, options: argparse.Namespace) -> Recovery:
    """What the flags of FADRM's recover mean."""
    known = target_of(
        options.dataset_name, {k: v for k, v in GENERAL.items() if k != "cifar10"}, options.fd2fast_dataset
    )
    sizes, budgets = tuple(options.input_size_lis or ()), tuple(options.optimization_budgets or ())
    if not sizes or len(sizes) != len(budgets):
        raise UserError(
            "optimization budgets incorrect: --input-size-lis and --optimization-budgets must name the same number of "
            f"phases, got {len(sizes)} and {len(budgets)}"
        )
    if len(sizes) > 1 and options.alpha is None:
        raise UserError("--alpha is missing: wanted the share of the image that a later phase keeps, such as 0.5")
    if len(sizes) > 1 and options.initialisation_method != "Patches":
        raise UserError("later phases mix the initial patch in: wanted --initialisation-method Patches")
    members = tuple(Member(name) for name in options.teacher_model_list)
    return _recovery(
        script,
        options,
        known,
        members,
        Voting(len(members)),
        schedule="round_robin",
        iterations=budgets,
        sizes=sizes,
        residual=1.0 if options.alpha is None else options.alpha,
        noise_sides=(sizes[0],),
        extension="png",
    )


def _recovery(
    script: str, options: argparse.Namespace, known: Known, members: tuple[Member, ...], voting: Voting, **rest: Any
) -> Recovery:
    online = options.pretrained_model_type == "online"
    if online and known.target.name != "imagenet1k":
        raise UserError(
            f"online teachers are those of imagenet1k; {known.target.name} needs --pretrained-model-type offline"
        )
    patches = None
    if options.initialisation_method == "Patches":
        root = folder(options.patch_dir, "--patch-dir", "the folder of initial images")
        patches = folder(
            str(root / options.patch_diff), "--patch-dir with --patch-diff", "the folder of initial images"
        )
    return Recovery(
        script=script,
        target=known.target,
        block=options.batch_size,
        members=members,
        voting=voting,
        cal=False,
        characteristic=None,
        beta=0.5,
        similarity=None,
        threshold=0.0,
        initial="noise" if patches is None else "patch of id",
        pool=None if online else folder(options.model_pool_dir, "--model-pool-dir", "the folder of teachers"),
        patches=patches,
        **common_of(options),
        **rest,
    )


def _architectures(recovery: Recovery, described: bool) -> tuple[str, ...]:
    """In the order in which they are tried."""
    if described:
        return (SMALL, STOCKED)
    return (STOCKED,) if recovery.target.name in _STOCKED_SETS else (SMALL,)


def _recover(options: argparse.Namespace, recovery: Recovery, *, own_head: bool) -> None:
    """own_head: the published code gives 1000-class networks a head of their own, too."""
    target, pool = recovery.target, recovery.pool
    sources = _architectures(recovery, options.fd2fast_dataset is not None)
    say(options)
    device = pick_device(recovery.device)
    say(f"---The recover process will be performed on device: {device.type}")
    replaced = pool is not None and (own_head or target.name != "imagenet1k")

    def load(member: Member, tried: Sequence[str] = sources) -> Loaded:
        if pool is None:
            return load_online(member.model, size=target.size, half_shuffle=False)
        return load_pooled(member, pool, classes=target.classes, size=target.size, sources=tried, half_shuffle=False)

    verifier, verified_by = None, Member(options.verifier_arch)
    if options.verifier:
        if pool is not None and options.verifier_weight_path is None:
            raise UserError("Verifier weight path is required: --verifier needs --verifier-weight-path")
        found = load(verified_by, (SMALL, STOCKED))
        verifier = found.teacher.backbone.to(device)

    def prepare(models: tuple[int, ...], new: bool, found: Sequence[str]) -> None:
        if not new:  # networks are made once for each image id
            return
        if options.verifier:
            first = SMALL if pool is not None else STOCKED
            consume_initial_weights(
                verified_by, first, classes=target.classes, sources=(first,), half_shuffle=False, new_head=False
            )
        for index in models:
            consume_initial_weights(
                recovery.members[index],
                found[index],
                classes=target.classes,
                sources=sources,
                half_shuffle=False,
                new_head=replaced,
            )

    initial = None
    if options.store_initialised_images:
        if options.initialisation_dir is None:
            raise UserError("--store-initialised-images needs --initialisation-dir")
        initial = Path(options.initialisation_dir).expanduser() / options.exp_name
    kind = _ToldCvdd if recovery.schedule == "all" else _ToldFadrm
    recovery.folder.mkdir(parents=True, exist_ok=True)
    run(recovery, load, prepare, kind(recovery, options, verifier, initial=initial))


class _Told(Lines):
    every, ends = 100, False

    def __init__(self, recovery: Recovery, options: argparse.Namespace, verifier: nn.Module | None, **places: Any):
        super().__init__(recovery, **places)
        self.options, self.verifier = options, verifier

    def last(self, block: Block) -> int:
        return block.end

    def images(self, block: Block, images: Tensor) -> None:
        if self.verifier is None:
            return
        with torch.no_grad():
            said = self.verifier(images.to(next(self.verifier.parameters()).dtype)).argmax(dim=1).cpu()
        right = (said == torch.arange(block.first, block.end)).float().mean().item()
        say(f"Verifier accuracy:  {100 * right}")


class _ToldCvdd(_Told):
    def begun(self, block: Block, drawn: Drawn) -> None:
        say(f"ipc =  {block.image_id}\nget_images call\n---The recover models are changed to {self.names(drawn)}")
        super().begun(block, drawn)
        self.told_initial(": ", self.options.patch_diff)

    def report(self, block: Block, drawn: Drawn, iteration: int, losses: Mapping[str, float]) -> None:
        say(f"------------iteration {iteration}----------")
        say(f"total loss {losses['total']}")
        for index, weight in zip(drawn.models, drawn.weights, strict=True):
            own = f":{index}" if len(self.recovery.members) > 1 else ""
            say(
                f"Model: {self.recovery.members[index].model}, CE loss: {losses[f'ce_backbone{own}']}, "
                f"BN loss: {losses[f'bn{own}']}, weight: {weight}"
            )


class _ToldFadrm(_Told):
    def begun(self, block: Block, drawn: Drawn) -> None:
        say(f"ipc =  {block.image_id}\nget_images call")
        super().begun(block, drawn)
        if self.recovery.patches is not None and self.recovery.sizes[0] != self.recovery.target.size:
            say("Downsampled the data")
        self.told_initial(": ", self.options.patch_diff)
        say(f"---The start input size is {self.recovery.sizes[0]}")
        self._sizes(self.recovery.sizes[0])

    def _sizes(self, size: int) -> None:
        say(f"---Now input size is {size}\n---Now synthetic data size is {size}")

    def report(self, block: Block, drawn: Drawn, iteration: int, losses: Mapping[str, float]) -> None:
        say(f"------------iteration {iteration}----------")
        say(f"total loss {losses['total']}")
        name = self.recovery.members[drawn.models[iteration % len(drawn.models)]].model
        say(f"Model: {name}, CE loss: {losses['ce_backbone']}, BN loss: {losses['bn']}")

    def phase(self, number: int, size: int, block: Block) -> None:
        if size != self.recovery.sizes[number - 1]:
            say("I changed")
        if size != self.recovery.target.size:
            say("I changed")
        say("Residual added")
        self._sizes(size)


def recover_cvdd(script: str, options: argparse.Namespace) -> None:
    """CV-DD's recover with these flags."""
    _recover(options, cvdd_recovery(script, options), own_head=True)


def recover_fadrm(script: str, options: argparse.Namespace) -> None:
    """FADRM's recover with these flags."""
    _recover(options, fadrm_recovery(script, options), own_head=False)
