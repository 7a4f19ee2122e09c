"""The plain distillation loop of one segment, written straight from the formulas: the specification of the step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from fd2fast.schedules import half_cosine
from fd2fast.settings.recipe import Recipe


class _BatchNormLosses:
    """||var - running_var|| + ||mean - running_mean|| of every hooked layer's input (SRe2L's BN hook)."""

    def __init__(self, layers: Sequence[tuple[str, nn.BatchNorm2d]]):
        self.losses: list[Tensor] = [torch.zeros(()) for _ in layers]
        self._handles = [
            layer.register_forward_pre_hook(lambda module, inputs, i=i: self._measure(i, module, inputs[0]))
            for i, (_, layer) in enumerate(layers)
        ]

    def _measure(self, index: int, layer: Any, x: Tensor) -> None:
        mean = x.mean(dim=(0, 2, 3))
        var = x.permute(1, 0, 2, 3).contiguous().view(x.shape[1], -1).var(dim=1, unbiased=False)
        distance = torch.norm(layer.running_var - var, 2) + torch.norm(layer.running_mean - mean, 2)
        self.losses[index] = distance

    def __enter__(self) -> _BatchNormLosses:
        return self

    def __exit__(self, *exc: Any) -> None:
        for handle in self._handles:
            handle.remove()


def normalized_l2(u: Tensor, v: Tensor, eps: float) -> Tensor:
    """||u - v|| / (||u|| + ||v|| + eps) of two vectors (below Eq. 9)."""
    return torch.norm(u - v) / (torch.norm(u) + torch.norm(v) + eps)


def characteristic_loss(z: Tensor, prototypes: Tensor, labels: Tensor, beta: float, eps: float) -> Tensor:
    """L_F (Eq. 9), mean over the samples. z [n, D], prototypes [K, D], labels [n]."""
    losses = []
    for sample, label in zip(z, labels.tolist(), strict=True):
        own = normalized_l2(sample, prototypes[label], eps)
        others = [normalized_l2(sample, c, eps) for k, c in enumerate(prototypes) if k != label]
        loss = beta * own
        if others:
            loss = loss + (1 - beta) * (1 - torch.stack(others).mean())
        losses.append(loss)
    return torch.stack(losses).mean()


def similarity_loss(attention: Tensor, priors: Sequence[Tensor], eps: float) -> Tensor:
    """L_S (Eq. 10), mean over the samples; a sample without priors counts 0. attention [n, M, h, w], priors[n] [p, M, h', w']."""
    losses = []
    for sample, earlier in zip(attention, priors, strict=True):
        if len(earlier) == 0:
            losses.append(sample.new_zeros(()))
            continue
        if earlier.shape[-2:] != sample.shape[-2:]:
            earlier = F.interpolate(earlier, size=sample.shape[-2:], mode="bilinear", align_corners=False)
        distances = [normalized_l2(sample.flatten(), other.flatten(), eps) for other in earlier]
        losses.append(1 - torch.stack(distances).mean())
    return torch.stack(losses).mean()


def segment_loss(
    teacher: Any, view: Tensor, labels: Tensor, priors: Sequence[Tensor], recipe: Recipe
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of one segment under one teacher (Eq. 12 with the base method's loss), and its terms.

    view: augmented images [n, 3, S, S]; labels: int [n]; priors: per sample the attention [p, M, h, w] of the finished
    images of its class and group (empty: L_S is 0). The base method alone uses the backbone branch only.
    """
    alpha = 0.0
    if recipe.fd2:
        alpha = teacher.alpha if recipe.alpha is None else recipe.alpha
    with _BatchNormLosses(teacher.bn_layers()) as hooks:
        out = teacher(view)
        distances = hooks.losses if alpha > 0 else hooks.losses[:-1]
    bn = distances[0] * recipe.first_bn_multiplier
    for distance in distances[1:]:
        bn = bn + distance
    ce_backbone = F.cross_entropy(out.logits, labels)
    terms = {"ce_backbone": ce_backbone, "bn": bn}
    if not recipe.fd2:
        return ce_backbone + recipe.r_bn * bn, terms

    prototypes = teacher.prototypes_ema if recipe.prototypes == "ema" else teacher.prototypes_last
    ce_cal = F.cross_entropy(out.cal_logits, labels)
    l_f = characteristic_loss(out.z, prototypes, labels, recipe.beta, recipe.eps)
    l_s = similarity_loss(out.attention, priors, recipe.eps)
    terms |= {"ce_cal": ce_cal, "l_f": l_f, "l_s": l_s}
    total = (1 - alpha) * ce_backbone + alpha * ce_cal + recipe.r_bn * bn + recipe.lam * l_f
    if recipe.ls_threshold is None or l_s.item() >= recipe.ls_threshold:
        total = total + (1 - recipe.lam) * l_s
    if recipe.keep_base_ce:
        total = total + ce_backbone
    return total, terms


def crop_flip_roll(images: Tensor, draw: Sequence[int], size: int) -> Tensor:
    """One crop, resize, flip and roll for all images. draw: (top, left, height, width, flip, roll_down, roll_right)."""
    top, left, height, width, flip, down, right = (int(v) for v in draw)
    view = TF.resized_crop(
        images, top, left, height, width, [size, size], interpolation=InterpolationMode.BILINEAR, antialias=True
    )
    if flip:
        view = TF.hflip(view)
    return torch.roll(view, shifts=(down, right), dims=(2, 3))


def committee_weights(teachers: Sequence[Any], recipe: Recipe) -> list[float]:
    """Equal, or softmax(accuracy in percent / 5) over the teachers (CV-DD's prior)."""
    if recipe.teacher_weights == "equal":
        return [1 / len(teachers)] * len(teachers)
    accuracies = torch.tensor([teacher.accuracy for teacher in teachers], dtype=torch.float64)
    return torch.softmax(accuracies / 5, dim=0).tolist()


def prior_attention(teacher: Any, images: Tensor) -> Tensor:
    """Attention [p, M, h, w] of finished, normalised images [p, 3, S, S] (Alg. 1, line 8)."""
    with torch.no_grad():
        return teacher(images).attention


def _resized(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)


def optimise_segment(
    initial: Tensor,
    labels: Tensor,
    teachers: Sequence[Any],
    draws: Sequence[Sequence[int]],
    recipe: Recipe,
    *,
    low: Sequence[float],
    high: Sequence[float],
    priors: Sequence[Sequence[Tensor]] | None = None,
    iterations: int | None = None,
    watch: Callable[[int, Tensor, Tensor, dict[str, Tensor]], None] | None = None,
) -> Tensor:
    """All iterations of one segment; the images [n, 3, S, S] at the end, in the type of `initial`.

    initial: normalised images at full size; labels: int [n]; teachers: eval mode, in their order, the image's committee
    only; draws: int [T, 7], one line per iteration over all phases; low, high: [3] bounds of the
    normalised pixels; priors[teacher][sample]: [p, M, h, w]; iterations: stop after so many; watch(t, images, grad,
    terms): called before each update, terms of the last teacher of the iteration.
    """
    total = sum(recipe.iterations)
    if priors is None:
        priors = [[initial.new_zeros(0, 1, 1, 1)] * len(labels)] * len(teachers)
    weights = committee_weights(teachers, recipe)
    images = _resized(initial, recipe.sizes[0]).clone()
    t = 0
    for phase, (budget, size) in enumerate(zip(recipe.iterations, recipe.sizes, strict=True)):
        if phase > 0:
            images = _resized(images, size)
            images = recipe.residual * images + (1 - recipe.residual) * _resized(initial, size)
        images = images.detach().clone().requires_grad_(True)
        optimizer = torch.optim.Adam([images], lr=recipe.lr, betas=recipe.betas, eps=recipe.adam_eps)
        for _ in range(budget):
            if t == iterations:
                return images.detach()
            for group in optimizer.param_groups:
                group["lr"] = half_cosine(t, total) * recipe.lr
            view = crop_flip_roll(images, draws[t], size)
            optimizer.zero_grad()
            if recipe.teacher_schedule == "round_robin":
                turn = t % len(teachers)
                loss, terms = segment_loss(teachers[turn], view, labels, priors[turn], recipe)
            else:
                loss = images.new_zeros(())
                for weight, teacher, prior in zip(weights, teachers, priors, strict=True):
                    part, terms = segment_loss(teacher, view, labels, prior, recipe)
                    loss = loss + weight * part
            loss.backward()
            if watch is not None and images.grad is not None:
                watch(t, images.detach(), images.grad.clone(), {k: v.detach() for k, v in terms.items()})
            optimizer.step()
            with torch.no_grad():
                for channel in range(3):
                    images[:, channel].clamp_(low[channel], high[channel])
            t += 1
    return images.detach()
