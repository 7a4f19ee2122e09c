"""The two recover scripts of the FD2 code: what their flags mean, what they print, and how they make their networks."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fd2fast.dropin.draws import Block, Drawn, Voting
from fd2fast.dropin.flags import folder
from fd2fast.dropin.lines import Lines
from fd2fast.dropin.pool import Loaded, Member, check_names, consume_initial_weights, is_rounded, load_pooled
from fd2fast.dropin.recovery import Recovery, run
from fd2fast.dropin.targets import FINE_GRAINED, Known, target_of
from fd2fast.errors import UserError
from fd2fast.system.device import pick_device
from fd2fast.system.streams import say


def sre2l_recovery(script: str, options: argparse.Namespace) -> Recovery:
    """What recover_FD2's flags mean."""
    known = target_of(options.dataset_name, FINE_GRAINED, options.fd2fast_dataset)
    members = _members(options)
    size = options.selected_size
    if not 1 <= size <= len(members):
        raise UserError(f"--selected_size must be 1 to {len(members)}, the models of --model_choice, got {size}")
    voting = Voting(
        len(members),
        each=size,
        rule=options.voter_type,
        scores=scores_of(members, known, options.voter_type, needed=size > 1),
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
    )


def fadrm_recovery(script: str, options: argparse.Namespace) -> Recovery:
    """What recover_FD2_FADRM's flags mean."""
    known = target_of(options.dataset_name, FINE_GRAINED, options.fd2fast_dataset)
    members = _members(options)
    if options.optimization_budgets is None:
        raise UserError(
            "--optimization_budgets is missing: wanted the iterations of each phase, such as 1500 1500 1500 2000"
        )
    count = len(options.optimization_budgets)
    if len(options.input_size_lis) < count:
        raise UserError(f"--input_size_lis must name {count} sizes, one for each phase, got {options.input_size_lis}")
    sizes = tuple(options.input_size_lis[:count])
    return _recovery(
        script,
        options,
        known,
        members,
        Voting(len(members)),
        schedule="round_robin",
        iterations=tuple(options.optimization_budgets),
        sizes=sizes,
        residual=options.alpha,
        noise_sides=(sizes[0], known.target.size),
    )


def _members(options: argparse.Namespace) -> tuple[Member, ...]:
    names, maps, ratios = options.model_choice or [], options.M or [], options.cal_ratio or []
    if not names or not len(names) == len(maps) == len(ratios):
        raise UserError(
            "--model_choice, --M and --cal_ratio must name the same number of teachers, got "
            f"{len(names)}, {len(maps)} and {len(ratios)}"
        )
    members = tuple(Member(*one) for one in zip(names, maps, ratios, strict=True))
    for member in members:
        if not 0 <= member.alpha <= 1 or (member.maps or 0) < 1:
            raise UserError(f"{member.model}: --M must be 1 or more and --cal_ratio within [0, 1], got {member}")
    check_names(members)
    for member in members:
        if is_rounded(member):
            say(
                f"{member.file} is read for --cal_ratio {member.alpha}: its name keeps one digit, so it may be a teacher of "
                "another ratio",
                error=True,
            )
    return members


def scores_of(members: Sequence[Member], known: Known, rule: str, *, needed: bool) -> tuple[float | None, ...]:
    """The accuracies that vote; UserError where one that is needed is not known."""
    missing = [member.model for member in members if member.model not in known.accuracies]
    if rule == "prior" and needed and missing:
        raise UserError(
            f"voter type prior needs the accuracy of {', '.join(missing)} on {known.target.name}, which the published code "
            "does not have either: use voter type equal, or --fd2fast_dataset with accuracies"
        )
    return tuple(known.accuracies.get(member.model) for member in members)


def _recovery(
    script: str,
    options: argparse.Namespace,
    known: Known,
    members: tuple[Member, ...],
    voting: Voting,
    **phases: Any,
) -> Recovery:
    if options.pretrained_model_type == "online":
        raise UserError(
            "--pretrained_model_type online: torchvision's networks have no CAL head and prototypes, which FD2 needs; "
            "use offline and --model_pool_dir"
        )
    patches = None
    if options.initialisation_method == "Patches":
        if options.patch_diff == "medium":
            raise UserError("--patch_diff must be 1 or 2 with --initialisation_method Patches")
        root = folder(options.patch_dir, "--patch_dir", "the folder of initial images")
        patches = folder(
            str(root / options.patch_diff), "--patch_dir with --patch_diff", "the folder of initial images"
        )
    return Recovery(
        script=script,
        target=known.target,
        block=options.class_num,
        members=members,
        voting=voting,
        cal=True,
        characteristic=options.FC_ratio if options.FC else None,
        beta=options.IntraFC_ratio,
        similarity=options.SC_ratio if options.SC else None,
        threshold=options.SC_loss_threshold,
        initial="noise" if patches is None else "patch by chance",
        pool=folder(options.model_pool_dir, "--model_pool_dir", "the folder of teachers"),
        patches=patches,
        extension="jpg",
        **common_of(options),
        **phases,
    )


def common_of(options: argparse.Namespace) -> dict[str, Any]:
    """What the flags mean that every recover script has, and fd2fast's own."""
    return {
        "folder": Path(options.syn_data_path).expanduser() / options.exp_name,
        "first_id": options.ipc_start,
        "end_id": options.ipc_end,
        "first_class": options.start_index,
        "lr": options.lr,
        "r_bn": options.r_bn,
        "first_bn_multiplier": options.first_bn_multiplier,
        "augment": options.apply_data_augmentation,
        "keep": options.store_best_images,
        "precision": options.fd2fast_precision,
        "device": options.fd2fast_device,
        "seed": options.fd2fast_seed,
        "reference_rng": options.reference_rng,
        "draws": None if options.draws is None else Path(options.draws).expanduser(),
        "dump_draws": None if options.dump_draws is None else Path(options.dump_draws).expanduser(),
    }


def _recover(options: argparse.Namespace, recovery: Recovery, kind: type[_Told]) -> None:
    say(f"args\n {options}")
    say(f"---The recover process will be performed on device: {pick_device(recovery.device).type}")
    tasks = len(range(0, recovery.target.classes, recovery.block))
    say(f"get_images_parallel call\nrecover_base start: 1 processes, {tasks} tasks")
    assert recovery.pool is not None
    pool, target = recovery.pool, recovery.target

    def load(member: Member) -> Loaded:
        found = load_pooled(member, pool, classes=target.classes, size=target.size)
        say(f"{found.source}'s {member.model} can match ckpt")
        return found

    def prepare(models: tuple[int, ...], new: bool, sources: Sequence[str]) -> None:
        for index in models:
            consume_initial_weights(recovery.members[index], sources[index], classes=target.classes)

    initial = None
    if options.store_initialised_images:
        if options.initialisation_dir is None:
            raise UserError("--store_initialised_images needs --initialisation_dir")
        initial = Path(options.initialisation_dir).expanduser() / options.exp_name

    def curves(block: Block) -> Path:
        name = f"cal_{options.exp_name}_{options.dataset_name}_ipcID{block.image_id}"
        return Path("result") / name / f"cls{block.first}_{block.end - 1}" / "recover_base_loss.png"

    recovery.folder.mkdir(parents=True, exist_ok=True)
    run(
        recovery, load, prepare, kind(recovery, options, initial=initial, curves=curves if options.matplotlib else None)
    )


class _Told(Lines):
    def __init__(self, recovery: Recovery, options: argparse.Namespace, **places: Any):
        super().__init__(recovery, **places)
        self.options = options

    def compares(self, block: Block) -> bool:
        return self.options.SC and bool(block.previous)

    def ended(self, block: Block, seconds: float) -> None:
        recovery = self.recovery
        say(
            f"Average time for distill {recovery.block} images ({recovery.target.size}) of ipcID({block.image_id}) = "
            f"{seconds} s"
        )
        super().ended(block, seconds)


class _ToldSre2l(_Told):
    def begun(self, block: Block, drawn: Drawn) -> None:
        super().begun(block, drawn)
        say(f"---The recover models are changed to {self.names(drawn)}")
        self.told_initial("--", self.options.patch_diff)

    def report(self, block: Block, drawn: Drawn, iteration: int, losses: Mapping[str, float]) -> None:
        say(f"-------ipcID:{block.image_id},class:{block.first}_{block.end - 1},iteration:{iteration}-------")
        say(f"total loss: {losses['total']}")
        for index, weight in zip(drawn.models, drawn.weights, strict=True):
            name = self.recovery.members[index].model
            own = f":{index}" if len(self.recovery.members) > 1 else ""
            say(
                f"Model:{name}_cal,weight:{weight}\n"
                f"CE loss:{name}:{losses[f'ce_backbone{own}']},{name}_cal:{losses[f'ce_cal{own}']}\n"
                f"BN loss:{losses[f'bn{own}']}"
            )
            if self.options.FC:
                say(f"FC_loss: {losses[f'l_f{own}']}\n")
            if self.compares(block):
                say(f"SC_loss: {losses[f'l_s{own}']}\n")


class _ToldFadrm(_Told):
    ends = False

    def begun(self, block: Block, drawn: Drawn) -> None:
        super().begun(block, drawn)
        say(f"---The recover models are {self.names(drawn)}")
        if self.recovery.patches is not None and self.recovery.sizes[0] != self.recovery.target.size:
            say("Downsampled the data")
        self.told_initial("--", self.options.patch_diff)
        say(f"---The start input size is {self.recovery.sizes[0]}")

    def report(self, block: Block, drawn: Drawn, iteration: int, losses: Mapping[str, float]) -> None:
        ends = [sum(self.recovery.iterations[: p + 1]) for p in range(len(self.recovery.iterations))]
        phase = next(p for p, end in enumerate(ends) if iteration < end)
        name = self.recovery.members[drawn.models[iteration % len(drawn.models)]].model
        say(
            f"-------ipcID:{block.image_id},phase:{phase},class:{block.first}_{block.end - 1},iteration:{iteration}-------"
        )
        say(
            f"Model:{name},total loss:{losses['total']:.4f},ce loss:backbone={losses['ce_backbone']:.4f},"
            f"cal={losses['ce_cal']:.4f},bn loss:{losses['bn']:.4f}"
        )
        if self.options.FC:
            say(f"FC_loss: {losses['l_f']:.4f}")
        if self.compares(block):
            say(f"SC_loss: {losses['l_s']:.4f}")

    def phase(self, number: int, size: int, block: Block) -> None:
        if size != self.recovery.sizes[number - 1]:
            say("I changed")
        if size != self.recovery.target.size:
            say("I changed")
        say("Residual added")


def recover_sre2l(script: str, options: argparse.Namespace) -> None:
    """recover_FD2 with these flags."""
    _recover(options, sre2l_recovery(script, options), _ToldSre2l)


def recover_fadrm(script: str, options: argparse.Namespace) -> None:
    """recover_FD2_FADRM with these flags."""
    _recover(options, fadrm_recovery(script, options), _ToldFadrm)
