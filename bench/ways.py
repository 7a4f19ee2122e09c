"""The implementations that are compared: the plain loop, the same vectorised and compiled step by step, and the engine."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.cases import Case
from fd2fast.models.fused import FusedTeacher, fuse
from fd2fast.models.teacher import Teacher
from fd2fast.models.tune import tune
from fd2fast.reference.loop import crop_flip_roll, segment_loss
from fd2fast.step import TERMS, GroupedStep, Priors, map_dtype
from fd2fast.system.device import repeatable

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Plain:
    """The plain loop, one iteration at a time, as fd2fast.reference.loop.optimise_segment runs it."""

    def __init__(self, case: Case):
        self.case = case
        self.images = case.initial.clone().requires_grad_()
        self.optimizer = torch.optim.Adam([self.images], case.config.lr, case.config.betas, case.config.adam_eps)
        none = case.initial.new_zeros(0, 1, 1, 1)
        self.priors = [list(p) for p in case.priors] or [[none] * case.rows] * len(case.teachers)
        self.terms: dict[str, float] = {}

    def __call__(self, t: int, *, read: bool = False) -> None:
        case, turn = self.case, t % len(self.case.teachers)
        view = crop_flip_roll(self.images, case.draws[t % len(case.draws), 0].tolist(), self.images.shape[-1])
        self.optimizer.zero_grad()
        loss, terms = segment_loss(case.teachers[turn], view, case.labels, self.priors[turn], case.config)
        loss.backward()
        if read:
            self.terms = {name: value.item() for name, value in terms.items()}
            return
        self.optimizer.step()
        with torch.no_grad():
            for channel in range(3):
                self.images[:, channel].clamp_(case.low[channel], case.high[channel])

    @property
    def gradient(self) -> Tensor:
        assert self.images.grad is not None
        return self.images.grad


def resize_matrices(draw: Sequence[int], size: int) -> tuple[Tensor, Tensor]:
    """Crop, resize, flip and roll as view = down @ image @ right^T (RandomResizedCrop is separable)."""
    top, left, height, width, flip, shift_down, shift_right = (int(v) for v in draw)
    eye = torch.eye(size)[None, None]
    down = crop_flip_roll(eye, (top, 0, height, size, 0, shift_down, 0), size)[0, 0]
    right = crop_flip_roll(eye, (0, left, size, width, flip, 0, shift_right), size)[0, 0].T
    return down.contiguous(), right.contiguous()


class Losses:
    """The plain loop's formulas on whole tensors, with copies of the teachers; several rivals may share one, compiled once."""

    def __init__(self, case: Case, *, precision: str, channels_last: bool = True, compile: bool = False):
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        teachers = [copy.deepcopy(teacher).to(memory_format=self.layout) for teacher in case.teachers]
        self.case, self.precision, self.measuring = dataclasses.replace(case, teachers=teachers), precision, False
        functions = [self._of(i) for i in range(len(teachers))]
        self.functions = [torch.compile(f, fullgraph=True) for f in functions] if compile else functions

    def __call__(self, turn: int, images: Tensor, down: Tensor, right: Tensor) -> Tensor:
        """total, ce_backbone, bn, ce_cal, l_f, l_s [6] of one teacher."""
        self.measuring = True
        try:
            return self.functions[turn](images, down, right)
        finally:
            self.measuring = False

    def _of(self, index: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        case, config = self.case, self.case.config
        teacher = case.teachers[index]
        alpha = (teacher.alpha if config.alpha is None else config.alpha) if config.fd2 else 0.0
        layers = [layer for _, layer in teacher.bn_layers()]
        layers = layers if alpha > 0 else layers[:-1]
        prototypes = teacher.prototypes_ema if config.prototypes == "ema" else teacher.prototypes_last
        half = AUTOCAST.get(self.precision)
        labels, prior = case.labels, case.priors[index] if case.priors else None
        measured: list[Tensor] = []

        def measure(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            var, mean = torch.var_mean(inputs[0].float(), dim=(0, 2, 3), correction=0)
            measured.append((var - layer.running_var).norm() + (mean - layer.running_mean).norm())

        for layer in layers:
            layer.register_forward_pre_hook(lambda layer, inputs: measure(layer, inputs) if self.measuring else None)

        def losses(images: Tensor, down: Tensor, right: Tensor) -> Tensor:
            view = (down @ images @ right.T).contiguous(memory_format=self.layout)
            measured.clear()
            with torch.autocast(images.device.type, dtype=half or torch.bfloat16, enabled=half is not None):
                if config.fd2:
                    out = teacher(view)
                    logits = out.logits
                else:
                    logits = teacher.backbone(view)
            bn = sum(measured[1:], start=config.first_bn_multiplier * measured[0])
            ce = F.cross_entropy(logits.float(), labels)
            zero = torch.zeros_like(bn)
            total = (1 - alpha) * ce + config.r_bn * bn
            if not config.fd2:
                return torch.stack([total, ce, bn, zero, zero, zero])
            ce_cal = F.cross_entropy(out.cal_logits.float(), labels)
            z, eps = out.z, config.eps
            apart = torch.cdist(z, prototypes, compute_mode="use_mm_for_euclid_dist")
            distances = apart / (z.norm(dim=1, keepdim=True) + prototypes.norm(dim=1) + eps)
            own = distances.gather(1, labels[:, None])[:, 0]
            others = (distances.sum(dim=1) - own) / (len(prototypes) - 1)
            l_f = (config.beta * own + (1 - config.beta) * (1 - others)).mean()
            total = total + alpha * ce_cal + config.lam * l_f
            if prior is None:
                return torch.stack([total, ce, bn, ce_cal, l_f, zero])
            a, b = out.attention.float().flatten(1)[:, None], prior.flatten(2)
            similar = (a - b).norm(dim=2) / (a.norm(dim=2) + b.norm(dim=2) + eps)
            l_s = (1 - similar.mean(dim=1)).mean()
            total = total + (1 - config.lam) * l_s
            return torch.stack([total, ce, bn, ce_cal, l_f, l_s])

        return losses


class Rival:
    """An iteration of `Losses`, Adam and clamp; with `graph`, on a GPU, one CUDA graph per teacher."""

    def __init__(self, case: Case, losses: Losses, *, graph: bool = False):
        config, device = case.config, case.initial.device
        self.case, self.losses = case, losses
        self.images = case.initial.clone().to(memory_format=losses.layout).requires_grad_()
        on_gpu = device.type == "cuda"
        rate = torch.tensor(config.lr, device=device) if on_gpu else config.lr
        self.optimizer = torch.optim.Adam(
            [self.images], rate, config.betas, config.adam_eps, fused=True, capturable=on_gpu
        )
        size = case.initial.shape[-1]
        self.down, self.right = (torch.empty(size, size, device=device) for _ in range(2))
        self.low, self.high = (b.view(3, 1, 1) for b in (case.low, case.high))
        # on the device: a copy from the host's ordinary memory would wait for it
        self.tables = [[m.to(device) for m in resize_matrices(draw[0].tolist(), size)] for draw in case.draws]
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.capture = on_gpu and graph
        self.terms: dict[str, float] = {}

    def _iterate(self, turn: int) -> Tensor:
        losses = self.losses(turn, self.images, self.down, self.right)
        self.optimizer.zero_grad(set_to_none=not self.capture)
        losses[0].backward()
        return losses

    def _update(self) -> None:
        self.optimizer.step()
        with torch.no_grad():
            self.images.clamp_(self.low, self.high)

    def __call__(self, t: int, *, read: bool = False) -> None:
        turn = t % len(self.case.teachers)
        down, right = self.tables[t % len(self.tables)]
        self.down.copy_(down)
        self.right.copy_(right)
        if read:
            names = ("total", "ce_backbone", "bn", "ce_cal", "l_f", "l_s")
            self.terms = dict(zip(names, self._iterate(turn).tolist(), strict=True))
            return
        if not self.capture:
            self._iterate(turn)
            self._update()
            return
        if turn not in self.graphs:
            self._capture(turn)
        self.graphs[turn].replay()

    def _capture(self, turn: int) -> None:
        """Record this teacher's iteration; the warm-up before leaves images and optimiser as they were."""
        image, begun = self.images.detach().clone(), bool(self.optimizer.state)
        state = [v.clone() for s in self.optimizer.state.values() for v in s.values()]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._iterate(turn)
                self._update()
        torch.cuda.current_stream().wait_stream(side)
        with torch.no_grad():
            self.images.copy_(image)
            for index, value in enumerate(v for s in self.optimizer.state.values() for v in s.values()):
                if begun:
                    value.copy_(state[index])
                else:
                    value.zero_()
        self.graphs[turn] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graphs[turn]):
            self._iterate(turn)
            self._update()

    @property
    def gradient(self) -> Tensor:
        assert self.images.grad is not None
        return self.images.grad


def fused_of(teachers: Sequence[Teacher], precision: str, rows: int) -> list[FusedTeacher]:
    """The teachers as the distill stage has them: fused, their convolutions' algorithms measured on this machine."""
    found = [fuse(teacher, map_dtype(precision, torch.float32)) for teacher in teachers]
    tune(found, rows, (teachers[0].size,))
    return found


class FusedStep:
    """GroupedStep over copies of the case's segment."""

    def __init__(self, case: Case, fused: Sequence[FusedTeacher], *, precision: str, segments: int = 1):
        """fused: the case's teachers in the precision's type. segments: copies in one step."""
        config = dataclasses.replace(case.config, precision=precision)  # type: ignore[arg-type]
        offsets = [case.rows * s for s in range(segments + 1)]
        total = case.rows * segments
        priors: list[Priors | None] = [None] * len(case.teachers)
        for index, maps in enumerate(case.priors):
            every = maps.shape[1]
            flat = maps.flatten(0, 1).repeat(segments, 1, 1, 1)
            priors[index] = Priors(flat, tuple(range(0, total * every + 1, every)))
        self.step = GroupedStep(
            config,
            list(fused),
            case.initial.repeat(segments, 1, 1, 1),
            case.labels.repeat(segments),
            offsets,
            low=case.low,
            high=case.high,
            priors=priors,
        )
        self.rows = case.rows
        self.draws = case.draws.expand(-1, segments, -1).contiguous()
        self.terms: dict[str, float] = {}
        self._end = 0

    def __call__(self, t: int, *, read: bool = False) -> None:
        if self.step.iteration >= self._end:  # as the stage does: a table for the next iterations
            first = self.step.iteration
            self._end = first + len(self.draws)
            turn = (torch.arange(len(self.draws)) + t) % len(self.draws)
            self.step.load_table(self.draws[turn], None, first)
        with repeatable(allow_tf32=torch.backends.cudnn.allow_tf32):  # as the distill stage runs it
            losses = self.step.iterate()
        if read:
            self.terms = dict(zip(TERMS, losses.mean(dim=0).tolist(), strict=True))

    @property
    def images(self) -> Tensor:
        """Of all segments."""
        return self.step.images

    @property
    def gradient(self) -> Tensor:
        assert self.step.gradient is not None
        return self.step.gradient
