"""The way in from Python: light import, the README's examples, stages by name, a user's own network fused."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn

import fd2fast
from fd2fast import api
from fd2fast.errors import UserError

README = Path(__file__).parents[1] / "README.md"


def examples() -> list[str]:
    section = README.read_text().split("## From Python\n")[1].split("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


def test_import_is_light():
    code = "import sys, fd2fast; print(dir(fd2fast)); sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "fuse" in ended.stdout


def test_names():
    assert set(api.__all__) - {"FusedNetwork"} == set(fd2fast.__all__) - {"__version__"}
    assert fd2fast.fuse is api.fuse
    with pytest.raises(AttributeError, match="no attribute 'fuze'"):
        _ = fd2fast.fuze


@pytest.mark.parametrize("number", range(len(examples())))
def test_examples_of_the_readme(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(examples()[number], names)
    if "metrics" in names:
        assert (tmp_path / "tiny/images/images").is_dir()
        assert "tiny/images" in capsys.readouterr().out
        again = fd2fast.datasets(
            "tiny/dataset", dataset="typefaces", classes=4, train_per_class=12, test_per_class=6, size=32
        )
        assert again.id == names["data"].id
        with pytest.raises(UserError, match="IPC|ipc"):
            fd2fast.distill("tiny/more", "tiny/dataset", ["tiny/teacher"], "tiny/patches", ipc=-1)
    elif "pixels" in names:
        assert (names["pixels"].shape, names["pixels"].dtype) == ((6, 3, 32, 32), torch.uint8)
        assert names["targets"].tolist() == [0, 0, 1, 1, 2, 2]
    else:
        assert names["images"].grad.norm() > 0


def test_there_are_examples():
    assert len(examples()) == 3


def test_unknown_settings(tmp_path):
    with pytest.raises(TypeError, match=r"DataConfig has no setting 'clases': did you mean 'classes'\?"):
        fd2fast.datasets(tmp_path / "d", clases=3)


def settled(model: nn.Module, size: int) -> nn.Module:
    with torch.no_grad():
        model.train()(torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(1)))
    return model.eval()


def small() -> nn.Module:
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU6()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def plain_losses(model: nn.Module, images: torch.Tensor, segments: tuple[int, ...], first: float) -> torch.Tensor:
    inputs: list[torch.Tensor] = []
    layers: list[nn.BatchNorm2d] = []

    def note(layer: nn.BatchNorm2d, given: tuple[torch.Tensor, ...]) -> None:
        layers.append(layer)
        inputs.append(given[0].clone())

    handles = [m.register_forward_pre_hook(note) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    model(images)
    for handle in handles:
        handle.remove()
    losses = []
    for begin, end in zip(segments, segments[1:], strict=False):
        total = 0.0
        for layer, x in zip(layers, inputs, strict=True):
            var, mean = torch.var_mean(x[begin:end], dim=(0, 2, 3), correction=0)
            loss = (var - layer.running_var).norm() + (mean - layer.running_mean).norm()
            total = total + (first if layer is layers[0] else 1) * loss
        losses.append(total)
    return torch.stack(losses)


class Functional(nn.Module):
    """Activations as functions, a sum of maps, convolutions with bias; `shared`: one BN that is called twice."""

    def __init__(self, inplace: bool = False, shared: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.other, self.inplace = self.bn if shared else nn.BatchNorm2d(8), inplace
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.relu(self.bn(self.first(x)), inplace=self.inplace)
        return self.head(torch.relu(self.other(self.second(x)) + x).mean((2, 3)))


class Branching(nn.Module):
    """A forward that looks at values, which cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) if bool(x.abs().sum() >= 0) else self.net(-x)


def silu() -> nn.Module:
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(inplace=True), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)
    return nn.Sequential(*layers, nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


NETWORKS = {
    "a Sequential": (small, 32),
    "SiLU and GELU": (silu, 32),
    "functions": (Functional, 16),
    "functions in place": (lambda: Functional(inplace=True), 16),
    "a shared BN": (lambda: Functional(shared=True), 16),
    "a branch on values": (Branching, 16),
    "resnet18": (lambda: torchvision.models.resnet18(num_classes=4), 32),
    "densenet": (lambda: torchvision.models.DenseNet(8, (2, 2), 16, num_classes=4), 32),
    "mobilenet_v2": (lambda: torchvision.models.mobilenet_v2(num_classes=4, width_mult=0.25), 32),
    "mobilenet_v3": (lambda: torchvision.models.mobilenet_v3_small(num_classes=4, width_mult=0.5), 32),
    "vgg with BN": (
        lambda: nn.Sequential(torchvision.models.vgg11_bn().features[:8], nn.Flatten(), nn.Linear(128 * 16, 4)),
        16,
    ),
    "efficientnet": (lambda: torchvision.models.efficientnet_b0(num_classes=4), 32),
    "regnet": (lambda: torchvision.models.regnet_y_400mf(num_classes=4), 32),
    "shufflenet": (lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=4), 32),
    "timm mobilenetv2": (lambda: timm.create_model("mobilenetv2_050", num_classes=4), 32),
    "timm efficientnet": (lambda: timm.create_model("test_efficientnet", num_classes=4), 32),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_fused_networks_in_float64(name):
    torch.manual_seed(0)
    make, size = NETWORKS[name]
    model = settled(make(), size).double()
    fused = fd2fast.fuse(model, size=size)
    results = []
    for run in (
        lambda x: fused(x, (0, 1, 4), first_bn_multiplier=3.0),
        lambda x: (model(x), plain_losses(model, x, (0, 1, 4), 3.0)),
    ):
        images = torch.randn(4, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        images.requires_grad_()
        logits, losses = run(images)
        (logits.square().sum() + losses @ torch.tensor([1.0, 2.0], dtype=torch.float64)).backward()
        results.append((logits.detach(), losses.detach(), images.grad))
    for own, plain in zip(*results, strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-8, atol=1e-9)


def test_fused_in_bf16_are_near():
    model = settled(small(), 16)
    images = torch.randn(6, 3, 16, 16)
    logits, loss = fd2fast.fuse(model, size=16, dtype=torch.bfloat16)(images)
    assert logits.dtype == loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain_losses(model, images, (0, 6), 1.0).detach(), rtol=0.05, atol=0.05)
    torch.testing.assert_close(logits, model(images), rtol=0.05, atol=0.05)


class Changing(nn.Module):
    """A network whose calls differ: no twin can agree with it."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.calls = small(), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.net(x) * self.calls


@pytest.mark.parametrize(
    ("model", "error", "message"),
    [
        ("resnet18", TypeError, "must be an nn.Module, got a str"),
        (nn.Flatten().eval(), ValueError, "must have weights, Flatten has none"),
        (
            nn.Sequential(nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4)).eval(),
            ValueError,
            r"not take images \[2, 3, 8, 8\]: .*channel",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 8), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten()).eval(),
            UserError,
            "keeps no statistics",
        ),
        (small().train(), ValueError, "eval mode, but Sequential is in train mode"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten()).eval(), UserError, "no BatchNorm2d"),
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval(), ValueError, r"must give logits \[N, classes\]"),
        (Changing().eval(), ValueError, "cannot be fused: its twin is off by"),
    ],
)
def test_networks_that_cannot_be_fused(model, error, message):
    with pytest.raises(error, match=message):
        fd2fast.fuse(model, size=8)


def test_segments_are_checked():
    fused = fd2fast.fuse(settled(small(), 16), size=16)
    for segments in ((0, 3), (1, 4), (0, 3, 2, 4)):
        with pytest.raises(ValueError, match="segments must rise from 0 to the 4 images"):
            fused(torch.randn(4, 3, 16, 16), segments)
