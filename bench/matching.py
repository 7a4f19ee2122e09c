"""Time and memory of one iteration of DM, DSA and DATM: the rows of the paper's table that are not decoupled methods.

fd2fast bench matching             # the paper's work on a GPU (200 classes, IPC 1, 224 x 224), a reduced one on a CPU
fd2fast bench matching --methods dm

What an iteration is (an update of every synthetic image, network and real images drawn anew):
dm     for each class the squared distance between the mean embeddings of its real and its synthetic images in a random network
dsa    for each class the distance between the loss gradients of both, layer by layer: 1 - cosine of each output's row
datm   `steps` SGD steps of a student on batches of synthetic images, unrolled; |end - target|^2 / |start - target|^2
DM and DSA augment real and synthetic images of a class alike (differentiable siamese augmentation: one of colour, crop, cutout,
flip, scale, rotation). The network is those papers' ConvNet: blocks of a 3 x 3 convolution of width 128, instance norm, ReLU and
2 x 2 average pooling; five of them at 224, which leave 7 x 7.

Settings that the FD2 paper does not give are chosen, and named in the result: real images a class min(256, 30), 30 being CUB's
training images of a class; DATM's steps and batch. Weights and images are random: time does not depend on them, and DATM's
target is a few real steps away. Before anything is timed each method's loss and synthetic gradient are compared in fp64 with
loops and finite differences.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.func import functional_call

from bench import results, timing
from bench.gate import DisagreementError
from fd2fast.distillation.memory import is_out_of_memory
from fd2fast.errors import UserError
from fd2fast.system.device import pick_device

PAPER = {"dsa": (3900.0, 68.4), "dm": (1400.0, 28.9), "datm": (2700.0, 50.0)}
COLUMNS = (
    "method",
    "images",
    "size",
    "paper ms",
    "first 5 ms",
    "ms",
    "ms 10%",
    "ms 90%",
    "images/s",
    "paper GB",
    "peak MB",
)
COLUMNS += ("reserved MB", "note")
EPS = 1e-6  # in the denominator of DSA's cosine
Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Options:
    """What to measure; 0: the paper's work on a GPU, a reduced one on a CPU."""

    # Methods: dsa, dm, datm.
    methods: tuple[str, ...] = ("dsa", "dm", "datm")
    # Classes.
    classes: int = 0
    # Synthetic images of a class.
    ipc: int = 1
    # Side of the images, pixels.
    size: int = 0
    # Real images of a class in an iteration.
    real: int = 0
    # Blocks of the ConvNet.
    depth: int = 0
    # Width of the ConvNet.
    width: int = 128
    # DATM: unrolled student steps.
    steps: int = 10
    # DATM: synthetic images in one of them.
    batch: int = 0
    # Iterations timed; 0: 20 on a GPU, 5 on a CPU.
    rounds: int = 0
    # Folder for the JSON, Markdown and PNG files.
    out: Path = results.ROOT / "bench" / "results"
    # Threads on a CPU; 0: torch's own choice.
    threads: int = 0
    # Device.
    device: str = "auto"
    # Tiny sizes, to try the bench itself.
    quick: bool = False

    def settled(self, device: torch.device) -> Options:
        """Without open fields. Raises UserError for values out of range."""
        default = {"classes": 200, "size": 224, "real": 30, "depth": 5, "batch": 20, "rounds": 20}
        if device.type != "cuda":
            default = {"classes": 10, "size": 64, "real": 10, "depth": 4, "batch": 5, "rounds": 5}
        if self.quick:
            default = {"classes": 3, "size": 16, "real": 2, "depth": 2, "batch": 2, "rounds": 2}
        found = dataclasses.replace(self, **{k: v for k, v in default.items() if not getattr(self, k)})
        for name in ("classes", "ipc", "size", "real", "depth", "width", "steps", "batch", "rounds"):
            if getattr(found, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(found, name)}")
        if found.size >> found.depth < 1:
            raise UserError(f"{found.depth} blocks halve {found.size} pixels to nothing: lower depth")
        if found.batch > found.classes * found.ipc:
            raise UserError(
                f"batch must be at most the {found.classes * found.ipc} synthetic images, got {found.batch}"
            )
        for method in found.methods:
            if method not in PAPER:
                raise UserError(f"unknown method {method!r}; wanted some of {', '.join(PAPER)}")
        return found


class ConvNet(nn.Module):
    """[N, 3, S, S] -> logits [N, K]; `embed` gives what the classifier sees."""

    def __init__(self, classes: int, size: int, depth: int, width: int):
        super().__init__()
        blocks: list[nn.Module] = []
        for index in range(depth):
            blocks += [nn.Conv2d(width if index else 3, width, 3, padding=1), nn.GroupNorm(width, width)]
            blocks += [nn.ReLU(), nn.AvgPool2d(2)]
        self.features = nn.Sequential(*blocks)
        self.classifier = nn.Linear(width * (size >> depth) ** 2, classes)

    def embed(self, images: Tensor) -> Tensor:
        """[N, D]."""
        return self.features(images).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.embed(images))


def augment(images: Tensor, kind: int, amount: Sequence[float]) -> Tensor:
    """One differentiable change of all images alike. kind in [0, 6); amount: four numbers in [0, 1)."""
    size, (a, b, c, d) = images.shape[-1], amount
    if kind == 0:  # brightness, saturation, contrast
        images = images + (a - 0.5)
        grey = images.mean(dim=1, keepdim=True)
        images = grey + 2 * b * (images - grey)
        mean = images.mean(dim=(1, 2, 3), keepdim=True)
        return mean + (0.5 + c) * (images - mean)
    if kind == 1:  # crop of a padded image
        pad = max(1, size // 8)
        padded = F.pad(images, (pad,) * 4)
        top, left = int(a * (2 * pad + 1)), int(b * (2 * pad + 1))
        return padded[..., top : top + size, left : left + size]
    if kind == 2:  # cutout
        side, mask = size // 2, torch.ones_like(images[:1, :1])
        top, left = int(a * size) - side // 2, int(b * size) - side // 2
        mask[..., max(0, top) : top + side, max(0, left) : left + side] = 0
        return images * mask
    if kind == 3:
        return images.flip(3) if a < 0.5 else images
    turn = (2 * c - 1) * 0.26 if kind == 5 else 0.0  # 15 degrees
    wide, high = (1.0, 1.0) if kind == 5 else (1 / 1.2 + a * (1.2 - 1 / 1.2), 1 / 1.2 + d * (1.2 - 1 / 1.2))
    cos, sin = torch.cos(torch.tensor(turn)).item(), torch.sin(torch.tensor(turn)).item()
    matrix = [[wide * cos, -high * sin, 0.0], [wide * sin, high * cos, 0.0]]
    theta = torch.tensor(matrix, dtype=images.dtype).to(images.device).expand(len(images), 2, 3)
    return F.grid_sample(images, F.affine_grid(theta, list(images.shape), align_corners=True), align_corners=True)


def distribution_loss(embed: Callable[[Tensor], Tensor], real: Tensor, synthetic: Tensor) -> Tensor:
    """DM, one class: |mean f(real) - mean f(synthetic)|^2."""
    with torch.no_grad():
        wanted = embed(real).mean(dim=0)
    return (wanted - embed(synthetic).mean(dim=0)).square().sum()


def gradient_loss(net: nn.Module, real: Tensor, synthetic: Tensor, label: int) -> Tensor:
    """DSA, one class: the sum over weights and their output rows of 1 - cos between the loss gradients.

    Biases and the scales of norms are left out, as in the published code: an instance norm makes a bias's gradient 0.
    """
    weights = [w for w in net.parameters() if w.dim() > 1]

    def gradients(images: Tensor, graph: bool) -> Sequence[Tensor]:
        labels = torch.full((len(images),), label, dtype=torch.long, device=images.device)
        return torch.autograd.grad(F.cross_entropy(net(images), labels), weights, create_graph=graph)

    wanted = [g.detach().flatten(1) for g in gradients(real, False)]
    total = synthetic.new_zeros(())
    for mine, theirs in zip(gradients(synthetic, True), wanted, strict=True):
        product = (mine.flatten(1) * theirs).sum(dim=1)
        total = total + (1 - product / (mine.flatten(1).norm(dim=1) * theirs.norm(dim=1) + EPS)).sum()
    return total


def trajectory_loss(
    net: nn.Module,
    start: Weights,
    target: Weights,
    images: Tensor,
    labels: Tensor,
    rate: Tensor,
    batches: Sequence[Tensor],
) -> Tensor:
    """DATM: |theta_n - theta*|^2 / |theta_0 - theta*|^2 after one SGD step for each batch of indices, unrolled.

    images: [N, 3, S, S]; labels: soft, logits [N, K]; rate: the student's learning rate, 0-d; all three are learnt.
    """
    now = start
    for batch in batches:
        scores = functional_call(net, now, (images[batch],))
        loss = F.cross_entropy(scores, labels[batch].softmax(dim=1))
        steps = torch.autograd.grad(loss, list(now.values()), create_graph=True)
        now = {name: w - rate * g for (name, w), g in zip(now.items(), steps, strict=True)}
    apart = sum((now[n] - target[n]).square().sum() for n in now)
    return apart / sum((start[n] - target[n]).square().sum() for n in now)


class Matching:
    """The synthetic set of one method; a call is one iteration."""

    def __init__(self, method: str, options: Options, device: torch.device):
        torch.manual_seed(0)
        self.method, self.options, self.device = method, options, device
        count, size = options.classes * options.ipc, options.size
        self.images = torch.randn(count, 3, size, size, device=device).requires_grad_()
        self.labels = torch.arange(options.classes, device=device).repeat_interleave(options.ipc)
        self.real = torch.randn(options.classes, options.real, 3, size, size, device="cpu")
        if device.type == "cuda":  # 200 x 30 x 224 x 224 fits; the published code keeps them on the device, too
            self.real = self.real.to(device)
        learnt = [self.images]
        if method == "datm":
            self.soft = (5.0 * F.one_hot(self.labels, options.classes)).to(self.images).requires_grad_()
            self.rate = torch.tensor(0.01, device=device, requires_grad=True)
            learnt += [self.soft, self.rate]
            self.net = self._net()
            self.start = {n: w.detach().clone().requires_grad_() for n, w in self.net.named_parameters()}
            self.target = self._target()
        self.optimizer = torch.optim.SGD(learnt, lr=0.1, momentum=0.5)

    def _net(self) -> ConvNet:
        options = self.options
        return ConvNet(options.classes, options.size, options.depth, options.width).to(self.device)

    def _target(self) -> Weights:
        """The weights a few steps on real images later."""
        net = self._net()
        net.load_state_dict(self.start)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.5)
        for label in range(min(3, self.options.classes)):
            real = self.real[label]
            optimizer.zero_grad()
            F.cross_entropy(net(real), torch.full((len(real),), label, device=self.device)).backward()
            optimizer.step()
        return {name: w.detach() for name, w in net.named_parameters()}

    def loss(self) -> Tensor:
        """Of one iteration, with its graph."""
        options = self.options
        if self.method == "datm":
            count = len(self.images)
            picked = [torch.randperm(count, device=self.device)[: options.batch] for _ in range(options.steps)]
            return trajectory_loss(self.net, self.start, self.target, self.images, self.soft, self.rate, picked)
        net = self._net()
        total = self.images.new_zeros(())
        for label in range(options.classes):
            kind, amount = int(torch.randint(6, ())), torch.rand(4).tolist()
            mine = self.images[label * options.ipc : (label + 1) * options.ipc]
            real, synthetic = (augment(x, kind, amount) for x in (self.real[label], mine))
            if self.method == "dm":
                total = total + distribution_loss(net.embed, real, synthetic)
            else:
                total = total + gradient_loss(net, real, synthetic, label)
        return total

    def __call__(self, _: int) -> None:
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()


def check(method: str) -> None:
    """DisagreementError unless the loss is its formula in loops and the gradient its finite difference, in fp64."""
    torch.manual_seed(0)
    net = ConvNet(3, 8, 2, 4).double()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    real, found = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.tensor(0.0)
    if method == "dm":
        call = functools.partial(distribution_loss, net.embed, real)
        vectors = [[net.embed(x[None])[0] for x in group] for group in (real, images)]
        middles = [sum(v) / len(v) for v in vectors]
        found = sum((a - b) ** 2 for a, b in zip(*middles, strict=True))
    elif method == "dsa":
        call = lambda x: gradient_loss(net, real, x, 1)  # noqa: E731
        grads = []
        for group in (real, images):
            loss = sum(-net(x[None])[0].log_softmax(0)[1] for x in group) / len(group)
            grads.append(torch.autograd.grad(loss, [w for w in net.parameters() if w.dim() > 1]))
        found = torch.zeros((), dtype=torch.float64)
        for a, b in zip(*grads, strict=True):
            for u, v in zip(a, b, strict=True):
                found = found + 1 - (u * v).sum() / (u.norm() * v.norm() + EPS)
    else:
        start = {n: w.detach().clone().requires_grad_() for n, w in net.named_parameters()}
        target = {n: w + 0.1 * torch.randn_like(w) for n, w in start.items()}
        soft, rate = torch.randn(2, 3, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
        batches = [torch.tensor([0, 1]), torch.tensor([1]), torch.tensor([0])]
        call = lambda x: trajectory_loss(net, start, target, x, soft, rate, batches)  # noqa: E731
        optimizer = torch.optim.SGD(net.parameters(), lr=0.3)
        for batch in batches:
            optimizer.zero_grad()
            logs = net(images.detach()[batch]).log_softmax(dim=1)
            (-(soft[batch].softmax(dim=1) * logs).sum(dim=1).mean()).backward()
            optimizer.step()
        ends = dict(net.named_parameters())
        above, below = (sum(((w[n] - target[n]) ** 2).sum() for n in target) for w in (ends, start))
        found = above / below
    loss = call(images)
    mine, theirs = loss.item(), float(found.detach())
    if not abs(mine - theirs) <= 1e-9 * abs(theirs):
        raise DisagreementError(f"{method}: the loss is {mine:.9g}, by its formula {theirs:.9g}")
    (gradient,) = torch.autograd.grad(loss, images)
    direction, width = torch.randn_like(images), 1e-5
    with torch.enable_grad():
        ends = [call((images + sign * width * direction).detach().requires_grad_()).item() for sign in (1, -1)]
    slope, wanted = (ends[0] - ends[1]) / (2 * width), float((gradient * direction).sum())
    if not abs(slope - wanted) <= 1e-4 * abs(wanted) + 1e-9:
        raise DisagreementError(f"{method}: slope {wanted:.6g}, by finite differences {slope:.6g}")


def measure(method: str, options: Options, device: torch.device) -> dict[str, Any]:
    """One method's row: checked, timed, its memory; or a note that says why not."""
    row: dict[str, Any] = {"method": method, "images": options.classes * options.ipc, "size": options.size}
    row |= {"classes": options.classes, "ipc": options.ipc, "paper ms": PAPER[method][0], "paper GB": PAPER[method][1]}
    try:
        check(method)
        run = Matching(method, options, device)
        row["first 5 ms"] = round(timing.first_five(run), 3)
        times = timing.interleaved({method: run}, options.rounds, 1, device)[method]
        if not times:
            return {**row, "note": "out of memory"}
        low, middle, high = timing.quantiles(times)
        row |= {"ms": round(middle, 3), "ms 10%": round(low, 3), "ms 90%": round(high, 3)}
        row["images/s"] = round(1e3 * row["images"] / middle, 1)
        del run
        peak, reserved = timing.peak_memory(functools.partial(Matching, method, options, device), 1, device)
        row |= {"peak MB": peak and round(peak, 1), "reserved MB": reserved and round(reserved, 1)}
    except DisagreementError as error:
        row["note"] = f"no time: {error}"
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        row["note"] = "out of memory"
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return row


def picture(rows: Sequence[dict[str, Any]], title: str) -> Any:
    """Bars of the times."""
    shown = [row for row in rows if "ms" in row]
    figure = results.figure_of(6, 2.2)
    axes = figure.add_subplot()
    axes.barh([row["method"] for row in shown], [row["ms"] for row in shown])
    for place, row in enumerate(shown):
        axes.text(row["ms"], place, f" {row['ms']:.4g}", va="center", fontsize=8)
    axes.set_xlabel("ms per iteration of all images")
    axes.set_title(title, fontsize=8)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the files, print the table; 1 where a method fails its check, 2 for bad arguments."""
    try:
        given = tyro.cli(Options, args=arguments, description=__doc__, prog="fd2fast bench matching")
        device = pick_device(given.device)
        options = given.settled(device)
        timing.use_threads(options.threads)
        results.prepare(options.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    place = results.about(device, "matching", arguments)
    place["work"] = (
        f"{options.classes} classes, IPC {options.ipc}, {options.size}², ConvNet of {options.depth} blocks and width "
        f"{options.width}, {options.real} real images a class, DATM {options.steps} steps of {options.batch}; random images"
    )
    rows = [measure(method, options, device) for method in options.methods]
    results.publish(options.out, place, rows, COLUMNS, picture)
    return int(any(str(row.get("note", "")).startswith("no time") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
