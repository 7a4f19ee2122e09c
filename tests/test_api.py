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
    else:
        assert names["images"].grad.norm() > 0


def test_there_are_examples():
    assert len(examples()) == 2


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
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    handles = [layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for layer in layers]
    model(images)
    for handle in handles:
        handle.remove()
    losses = []
    for begin, end in zip(segments, segments[1:], strict=False):
        total = 0.0
        for number, (layer, x) in enumerate(zip(layers, inputs, strict=True)):
            var, mean = torch.var_mean(x[begin:end], dim=(0, 2, 3), correction=0)
            loss = (var - layer.running_var).norm() + (mean - layer.running_mean).norm()
            total = total + (first if number == 0 else 1) * loss
        losses.append(total)
    return torch.stack(losses)


@pytest.mark.parametrize(
    "make",
    [
        small,
        lambda: torchvision.models.resnet18(num_classes=4),
        lambda: timm.create_model("mobilenetv2_050", num_classes=4),
    ],
)
def test_fused_networks_in_float64(make):
    torch.manual_seed(0)
    model = settled(make(), 32).double()
    fused = fd2fast.fuse(model, size=32)
    results = []
    for run in (
        lambda x: fused(x, (0, 1, 4), first_bn_multiplier=3.0),
        lambda x: (model(x), plain_losses(model, x, (0, 1, 4), 3.0)),
    ):
        images = torch.randn(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
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
