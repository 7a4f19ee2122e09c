"""The fused teacher against the plain one: outputs, BN losses, gradients, saved bytes, fallbacks, refusals."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fd2fast import ops
from fd2fast.errors import UserError
from fd2fast.models import frozen_layers as frozen
from fd2fast.models.backbone import Backbone, build_backbone
from fd2fast.models.fused import FusedTeacher, fuse
from fd2fast.models.rewrite import by_modules
from fd2fast.models.teacher import Teacher
from fd2fast.ops import _dispatch

TEACHERS = {
    "ResNet18": 64,
    "ResNet50": 64,
    "DenseNet121": 64,
    "MobileNetV2": 64,
    "ShuffleNetV2": 64,
    "timm:tf_efficientnet_lite0": 64,
    "timm:resnet10t": 64,
    "timm:test_resnet": 48,
    "timm:densenet121": 32,
    "timm:repvgg_a0": 32,
    "timm:test_efficientnet": 48,
}
SEGMENTS = (0, 1, 3)


def settle(teacher: Teacher, dtype: torch.dtype, size: int) -> Teacher:
    """BN statistics from noise, every BN weight and bias away from 0 and 1, frozen, in eval mode."""
    teacher = teacher.to(dtype)
    for _, layer in teacher.bn_layers():
        nn.init.uniform_(layer.weight, 0.5, 1.5)
        nn.init.normal_(layer.bias, std=0.3)
    teacher.train()
    with torch.no_grad():
        teacher(torch.randn(4, 3, size, size, dtype=dtype) * 1.5)
    return teacher.eval().requires_grad_(False)


def make_teacher(name: str, *, dtype=torch.float64, size: int = 64, maps: int = 3, classes: int = 5) -> Teacher:
    return settle(Teacher(build_backbone(name, classes), maps, alpha=0.4, size=size), dtype, size)


def plain(teacher: Teacher, x, segments, first_bn_multiplier=10.0, cal_bn=True):
    """The teacher's own forward with a hook at each BN layer."""
    losses = []

    def measure(layer, inputs, factor):
        losses.append(factor * ops.bn_matching(inputs[0], layer.running_mean, layer.running_var, segments))

    layers = teacher.bn_layers()
    handles = [
        layer.register_forward_pre_hook(
            lambda layer, inputs, f=first_bn_multiplier if i == 0 else 1.0: measure(layer, inputs, f)
        )
        for i, (_, layer) in enumerate(layers if cal_bn else layers[:-1])
    ]
    out = teacher(x)
    for handle in handles:
        handle.remove()
    return out, sum(losses)


def gradient(out, bn, x):
    """Of a random combination of everything."""
    generator = torch.Generator().manual_seed(1)
    total = sum(
        (t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)).sum().double() for t in (*out, bn)
    )
    return torch.autograd.grad(total, x)[0]


def relative(actual, expected) -> float:
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def assert_equal(teacher: Teacher, fused: FusedTeacher, size: int, tolerance: float = 1e-10) -> None:
    x = torch.randn(SEGMENTS[-1], 3, size, size, dtype=torch.float64, requires_grad=True)
    wanted, wanted_bn = plain(teacher, x, SEGMENTS)
    out, bn = fused(x, SEGMENTS)
    assert bn.shape == (2,)
    with torch.no_grad():
        for name, actual, expected in zip(out._fields, out, wanted, strict=True):
            assert relative(actual, expected) < tolerance, name
        assert relative(bn, wanted_bn) < tolerance
    assert relative(gradient(out, bn, x), gradient(wanted, wanted_bn, x)) < tolerance


@pytest.mark.parametrize("name", TEACHERS)
def test_equals_the_plain_teacher(name):
    size = TEACHERS[name]
    teacher = make_teacher(name, size=size)
    fused = fuse(teacher)
    assert fused.body.traced
    assert (fused.fallbacks == []) == (name != "timm:test_efficientnet")
    assert_equal(teacher, fused, size)


@pytest.mark.parametrize("name", ["timm:test_resnet", "ShuffleNetV2_x0.5", "timm:test_efficientnet"])
def test_module_by_module_equals_the_plain_teacher(name, monkeypatch):
    monkeypatch.setattr("fd2fast.models.rewrite.by_graph", lambda *args: (_ for _ in ()).throw(TypeError("no trace")))
    teacher = make_teacher(name, size=48)
    fused = fuse(teacher)
    assert not fused.body.traced
    assert "no trace" in fused.fallbacks[0]
    assert_equal(teacher, fused, 48)


def test_settings_of_the_bn_loss():
    teacher = make_teacher("timm:test_resnet", size=48)
    fused = fuse(teacher)
    x = torch.randn(3, 3, 48, 48, dtype=torch.float64)
    for multiplier, cal_bn in ((1.0, True), (10.0, False), (0.0, True)):
        _, wanted = plain(teacher, x, SEGMENTS, multiplier, cal_bn)
        _, bn = fused(x, SEGMENTS, first_bn_multiplier=multiplier, cal_bn=cal_bn)
        torch.testing.assert_close(bn, wanted, rtol=1e-10, atol=0)
    logits, bn = fused.backbone_logits(x, SEGMENTS)
    torch.testing.assert_close(logits, teacher.backbone(x), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(bn, plain(teacher, x, SEGMENTS, 10.0, False)[1], rtol=1e-10, atol=0)


def test_carries_what_the_step_reads():
    teacher = make_teacher("timm:test_resnet", size=48)
    fused = fuse(teacher)
    for name in ("name", "classes", "attention_maps", "alpha", "accuracy", "size", "prototypes_ema", "prototypes_last"):
        assert getattr(fused, name) is getattr(teacher, name), name
    assert fused.bn_layers() == teacher.bn_layers()
    assert not list(fused.parameters())
    assert not fused.training


def test_grouped_segments_equal_single_ones():
    fused = fuse(make_teacher("DenseNet121", size=32))
    x = torch.randn(5, 3, 32, 32, dtype=torch.float64)
    out, bn = fused(x, (0, 2, 5))
    for s, (a, b) in enumerate(((0, 2), (2, 5))):
        alone, alone_bn = fused(x[a:b], (0, b - a))
        torch.testing.assert_close(bn[s : s + 1], alone_bn, rtol=1e-11, atol=0)
        torch.testing.assert_close(out.z[a:b], alone.z, rtol=1e-11, atol=1e-14)


def saved_bytes(function, constants) -> int:
    """Bytes of the distinct storages that a forward pass keeps, without `constants`."""
    known = {t.untyped_storage().data_ptr() for t in constants}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), t)  # t keeps the address from being used again
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize(
    ("name", "maps", "megabytes"),
    [("ResNet18", 8, 5.5), ("ResNet50", 8, 24.0), ("MobileNetV2", 16, 15.0), ("DenseNet121", 16, 18.0)],
)
def test_saved_bytes_per_image(name, maps, megabytes):
    """At 224 x 224 in bf16; the plain teacher in fp32 keeps 31 MB for ResNet-18."""
    fused = fuse(make_teacher(name, dtype=torch.float32, maps=maps, classes=200), torch.bfloat16)
    x = torch.randn(1, 3, 224, 224, requires_grad=True)
    found = saved_bytes(lambda: fused(x, (0, 1)), [*fused.buffers(), x])
    assert found <= megabytes * 1e6
    assert found > 0.5 * megabytes * 1e6  # the count sees something


@pytest.mark.parametrize("name", ["timm:test_resnet", "MobileNetV2", "DenseNet121"])
def test_lower_precision_is_as_good_as_the_plain_teacher_in_it(name):
    teacher = make_teacher(name, dtype=torch.float32, size=64)
    exact = make_teacher(name, size=64)
    exact.load_state_dict(teacher.state_dict())
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)

    def run(function, dtype):
        one = x.to(dtype).requires_grad_()
        out, bn = function(one)
        return [*(t.detach() for t in out), bn.detach(), gradient(out, bn, one)]

    def autocast(one):
        with torch.autocast("cpu", torch.bfloat16):
            return plain(teacher, one, SEGMENTS)

    wanted = run(lambda one: plain(exact, one, SEGMENTS), torch.float64)
    for dtype, other in ((torch.float32, lambda one: plain(teacher, one, SEGMENTS)), (torch.bfloat16, autocast)):
        fused = fuse(teacher, dtype)
        own, near = run(lambda one, f=fused: f(one, SEGMENTS), torch.float32), run(other, torch.float32)
        for i, (a, b, w) in enumerate(zip(own, near, wanted, strict=True)):
            # a ReLU that flips in one of the two and not in the other costs more than rounding
            assert relative(a.double(), w) <= 4 * relative(b.double(), w) + 1e-3, (i, dtype)
        assert fused(x.float(), SEGMENTS)[0].z.dtype == torch.float32


@pytest.mark.parametrize("name", ["timm:test_resnet", "timm:densenet121,growth_rate=8,block_config=2x1"])
def test_equals_the_plain_teacher_by_the_kernels(name, monkeypatch):
    """As on a GPU: the operations run their Triton kernels (here interpreted)."""
    if _dispatch.unavailable("bn_act_matching", "triton"):
        pytest.skip(str(_dispatch.unavailable("bn_act_matching", "triton")))
    teacher = make_teacher(name, size=32)
    chosen = []

    def choose(op_name, arguments, backend, **settings):
        if "triton" not in _dispatch._operations[op_name] or op_name == "bn_matching":
            return "reference"
        chosen.append(op_name)
        return "triton"

    with monkeypatch.context() as patch:
        patch.setattr(_dispatch, "choose", choose)
        fused = fuse(teacher)
        assert fused.body.traced
        assert_equal(teacher, fused, 32)
    wanted = {"bn_act_matching", "bilinear_attention_pool", "max_pool"}
    assert set(chosen) == wanted | ({"joined_bn_act_matching", "segment_statistics"} if "densenet" in name else set())


class Odd(nn.BatchNorm2d):
    """A BN with a forward of its own."""

    def forward(self, x):
        return super().forward(x) * 1.5


class Branching(nn.Module):
    """A module that looks at its input: torch.fx cannot trace it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        y = self.bn(self.conv(x)) * self.scale
        return torch.relu(y) if bool(x.mean() > -1e9) else y


class Strange(nn.Module):
    """Patterns beside the usual ones."""

    def __init__(self, classes: int, branch: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect")
        self.odd = Odd(6)
        self.relu = nn.ReLU(inplace=True)
        self.branch = Branching() if branch else nn.Sequential(nn.BatchNorm2d(6), nn.Hardswish(inplace=True))
        self.bn2, self.bn3, self.bn4 = nn.BatchNorm2d(6), nn.BatchNorm2d(6), nn.BatchNorm2d(6)
        self.gate = nn.Parameter(torch.rand(6, 1, 1))
        self.pool = nn.AvgPool2d(2)
        self.fc = nn.Linear(6, classes)

    def features(self, x):
        x = self.relu(self.odd(self.conv1(x)))
        x = self.branch(x)
        y = self.bn2(x)
        self.relu(y)  # in place: the sum below reads the result
        x = y + self.gate * self.bn3(x)  # an addition of maps that are no BN result alone
        x = x + self.bn4(x).mean((2, 3), keepdim=True)  # an addition of other shapes
        return self.pool(torch.nn.functional.relu6(x))


def strange(branch: bool) -> Teacher:
    backbone = Backbone(
        "strange",
        Strange(4, branch),
        channels=6,
        classes=4,
        head="fc",
        features=lambda net, x: net.features(x),
        logits=lambda net, f: net.fc(f.mean((2, 3))),
    )
    return settle(Teacher(backbone, 2, alpha=0.5, size=16), torch.float64, 16)


@pytest.mark.parametrize("branch", [False, True])
def test_unknown_patterns_run_as_they_were_and_are_named(branch):
    teacher = strange(branch)
    fused = fuse(teacher)
    assert fused.body.traced
    told = "; ".join(fused.fallbacks)
    for name in ("conv1 (Conv2d)", "odd (Odd)", "mul (mul)"):
        assert name in told
    assert ("branch (Branching): torch.fx cannot trace it" in told) == branch
    assert ("Hardswish" in told) != branch
    assert_equal(teacher, fused, 16)
    half = fuse(teacher, torch.bfloat16)
    out, bn = half(torch.randn(3, 3, 16, 16, requires_grad=True), SEGMENTS)
    (out.logits.sum() + bn.sum()).backward()
    assert out.features.dtype == torch.bfloat16


def test_a_wrong_rewriting_is_noticed(monkeypatch, caplog):
    """As if the graph pass had lost an activation."""
    emit = frozen.FrozenBatchNorm.forward

    def lossy(self, x, segments, residual=None):
        if residual is None:
            return emit(self, x, segments)
        activation, self.activation = self.activation, "identity"
        try:
            return emit(self, x, segments, residual)
        finally:
            self.activation = activation

    monkeypatch.setattr(frozen.FrozenBatchNorm, "forward", lossy)
    teacher = make_teacher("timm:test_resnet", size=48)
    fused = fuse(teacher)
    assert not fused.body.traced
    assert "disagrees" in fused.fallbacks[0]
    assert "module by module" in caplog.text
    assert_equal(teacher, fused, 48)


def test_refusals():
    teacher = make_teacher("timm:test_resnet", size=48)
    teacher.backbone.bn_layers()[3][1].train()
    with pytest.raises(ValueError, match=r"eval mode.*layer"):
        fuse(teacher)
    teacher.eval()
    layer = teacher.backbone.bn_layers()[3][1]
    layer.running_mean = layer.running_var = None
    with pytest.raises(UserError, match="keeps no statistics"):
        by_modules(teacher.backbone, torch.float64, "")


def test_never_reads_a_value_back():
    """A GPU would wait for it."""

    class NoReading(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    fused = fuse(make_teacher("DenseNet121", dtype=torch.float32, size=32))
    x = torch.randn(3, 3, 32, 32, requires_grad=True)
    fused(x, SEGMENTS)
    with NoReading():
        out, bn = fused(x, SEGMENTS)
        (out.logits.sum() + out.z.sum() + bn.sum()).backward()
    assert x.grad is not None


def test_compiles_without_a_graph_break():
    fused = fuse(make_teacher("timm:test_resnet", dtype=torch.float32, size=32))
    x = torch.randn(3, 3, 32, 32)

    def loss(one):
        out, bn = fused(one, SEGMENTS)
        return out.logits.square().sum() + out.z.sum() + bn.sum()

    grads = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        one = x.clone().requires_grad_()
        grads.append(torch.autograd.grad(function(one), one)[0])
    assert relative(grads[1], grads[0]) < 1e-3
