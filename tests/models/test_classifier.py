"""Students' networks: classifiers of every kind at the data's size, refusals that say which size would do."""

import pytest
import timm
import torch
from torch import nn

from fd2fast.errors import UserError
from fd2fast.models import classifier, sight
from fd2fast.models.backbone import build_backbone, timm_sizes
from fd2fast.models.classifier import Classifier, build_classifier, check_classifier
from fd2fast.system.device import channels_last


class Small(nn.Module):
    """A network of BatchNorm, dropout and a stride of 8, with a rule on its sizes and a choice of outputs."""

    def __init__(self, rule=lambda side: True, shape=lambda logits: logits):
        super().__init__()
        self.rule, self.shape = rule, shape
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 9, 8, 4), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        if not self.rule(x.shape[-1]):
            raise RuntimeError(f"no {x.shape[-1]}\nand more")
        return self.shape(self.fc(self.stem(x).mean((2, 3))))


@pytest.mark.parametrize(
    "name",
    [
        "timm:test_vit",
        "timm:test_vit,patch_size=8",
        "timm:test_convnext",
        "timm:test_nfnet",
        "timm:test_mambaout",
        "timm:test_efficientnet",
        "torchvision:squeezenet1_1",
        "torchvision:mobilenet_v3_small",
    ],
)
def test_classifiers_of_every_kind_train_at_the_datas_size(name):
    check_classifier(name, 5, 48, 2)
    net = build_classifier(name, 5, 48)
    x = torch.randn(2, 3, 48, 48)
    for training in (True, False):
        scores = net.train(training)(x)
        assert scores.shape == (2, 5)
    scores.square().sum().backward()
    assert all(key.startswith("net.") for key in net.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision:inception_v3", "torchvision:googlenet", "timm:inception_v3"])
def test_auxiliary_heads_are_left_out(name):
    net = build_classifier(name, 4, 96).train()
    assert net(torch.randn(2, 3, 96, 96)).shape == (2, 4)


@pytest.mark.parametrize("name", ["ResNet18", "timm:resnet10t,output_stride=16", "timm:test_efficientnet"])
def test_what_can_be_a_teacher_is_the_same_network_as_a_student(name):
    """Weights from the same draws, under the same names, the same answers: earlier students stay what they are."""
    torch.manual_seed(3)
    teacher = build_backbone(name, 4)
    torch.manual_seed(3)
    student = build_classifier(name, 4, 32)
    after = torch.rand(1)
    assert list(student.state_dict()) == list(teacher.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(student.state_dict().values(), teacher.state_dict().values(), strict=True)
    )
    x = torch.randn(2, 3, 32, 32)
    for training in (False, True):
        torch.manual_seed(1)
        answer = teacher.train(training)(x)
        torch.manual_seed(1)
        assert torch.equal(student.train(training)(x), answer)
    torch.manual_seed(3)
    build_backbone(name, 4)
    assert torch.equal(torch.rand(1), after)


@pytest.mark.parametrize(
    ("shape", "fits"),
    [
        (lambda s: (s, s[:, :1]), True),
        (lambda s: [s], True),
        (lambda s: {"aux": s * 0, "logits": s}, True),
        (lambda s: {"out": s, "aux": 3}, True),
        (lambda s: (None, (s,)), True),
        (lambda s: s[:, :2], False),
        (lambda s: s[:, :, None, None], False),
        (lambda s: None, False),
    ],
)
def test_of_several_outputs_the_logits_are_taken(shape, fits):
    net = Classifier("small", Small(shape=shape), 3).eval()
    x = torch.randn(2, 3, 16, 16)
    if fits:
        assert torch.equal(net(x), net.net.fc(net.net.stem(x).mean((2, 3))))
    else:
        with pytest.raises(ValueError, match=r"wanted logits \[2, 3\]"):
            net(x)
        with pytest.raises(UserError, match="wanted logits"):
            sight.must_see("small", net, 16)


@pytest.mark.parametrize(
    ("rule", "size", "told"),
    [
        (lambda side: side >= 75, 64, r"needs images of at least 75 px, the data set has 64 \(no 64\)"),
        (lambda side: side >= 29, 16, "needs images of at least 29 px"),
        (lambda side: side == 224, 64, "takes images of 224 px, the data set has 64"),
        (lambda side: side == 224, 300, "takes images of 224 px, the data set has 300"),
        (lambda side: side % 32 == 0, 100, "takes images of 128 px, the data set has 100"),
        (lambda side: side % 32 == 0, 250, "takes images of 256 px, the data set has 250"),
        (lambda side: side % 128 > 112 or side % 128 == 0, 64, "takes images of 128 px, the data set has 64"),
        (lambda side: 193 <= side <= 224, 64, "takes images of 224 px, the data set has 64"),
        (lambda side: False, 64, "does not take such images"),
    ],
)
def test_a_refusal_says_which_size_would_do(rule, size, told):
    with pytest.raises(UserError, match=f"small {told}") as error:
        sight.must_see("small", Small(rule), size)
    assert len(str(error.value).splitlines()) == 1


def test_a_single_image_that_leaves_one_value_to_batchnorm_is_refused():
    sight.must_see("small", Small(), 16, training=1)
    sight.must_see("small", Small(), 8, training=2)
    with pytest.raises(UserError, match="one value per channel left for its BatchNorm from a batch of 1 image at 8 px"):
        sight.must_see("small", Small(), 8, training=1)


def test_looking_changes_nothing():
    net = Small().train()
    net.stem[1].eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    torch.manual_seed(5)
    drawn = torch.rand(3)
    torch.manual_seed(5)
    sight.must_see("small", net, 32, training=2)
    assert torch.equal(torch.rand(3), drawn)
    assert (net.training, net.stem[1].training, net.stem[2].training) == (True, False, True)
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())


def test_a_model_of_fixed_size_is_made_for_the_datas_from_the_same_draws():
    def build(side=224):
        return Small(lambda given: given == side)

    torch.manual_seed(7)
    plain = build()
    torch.manual_seed(7)
    fitted = sight.fitted(build, 40, ("no_such_option", "side"))
    assert sight.refusal(fitted, 40) is None
    assert torch.equal(fitted.fc.weight, plain.fc.weight)
    assert sight.refusal(sight.fitted(build, 40, ("no_such_option",)), 40) == "no 40"
    assert timm_sizes("timm:test_vit") == ("img_size",)
    assert timm_sizes("timm:test_vit,img_size=160") == ()  # the size that the name gives stays


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("timm:test_vitt", "unknown timm model"),
        ("timm:test_vit,img_size", "wanted key=value"),
        ("timm:test_vit,patch_size=0", "cannot build"),
        ("torchvision:vit_b16", "did you mean 'vit_b_16'"),
        ("torchvision:fcn_resnet50", "unknown torchvision model"),
        ("torchvision:squeezenet1_1,weights=DEFAULT", "is set by fd2fast"),
        ("torchvision:squeezenet1_1,depth=3", "torchvision cannot build"),
        ("ViT", "unknown model"),
    ],
)
def test_unknown_students_are_one_line(name, told):
    with pytest.raises(UserError, match=told) as error:
        check_classifier(name, 3, 48)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["timm:test_vit", "timm:test_convnext", "timm:test_mambaout"])
def test_teachers_keep_their_rule_and_hear_of_students(name):
    with pytest.raises(UserError, match="has no BatchNorm2d layer.* it works as a student, not as a teacher"):
        build_backbone(name, 3, 48)
    with pytest.raises(UserError, match="works as a student; a teacher is one of ResNet18"):
        build_backbone("torchvision:vit_b_16", 3, 48)


def test_teachers_are_looked_at_with_the_datas_size(monkeypatch):
    """A model that cannot see the size of an older, fixed probe is no matter where the data have another."""
    net = timm.create_model("test_resnet", num_classes=3)
    features, least = net.forward_features, 100

    def picky(x):
        if x.shape[-1] < least:
            raise RuntimeError("Calculated output size is too small")
        return features(x)

    monkeypatch.setattr(net, "forward_features", picky)
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: net)
    assert build_backbone("timm:test_resnet", 3, 128).channels == net.num_features
    assert build_backbone("timm:test_resnet", 3).channels == net.num_features
    with pytest.raises(UserError, match="needs images of at least 100 px, the data set has 64"):
        build_backbone("timm:test_resnet", 3, 64)


@pytest.mark.slow
def test_densenet_says_what_it_needs():
    with pytest.raises(UserError, match="DenseNet121 needs images of at least 29 px, the data set has 16"):
        check_classifier("DenseNet121", 3, 16)


def test_filters_of_five_dimensions_stay_as_they_are():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv3d(2, 2, 3), nn.Linear(3, 2))
    before = [p.detach().clone() for p in net.parameters()]
    channels_last(net)
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_names_are_checked_once(monkeypatch):
    calls = []
    monkeypatch.setattr(classifier, "must_see", lambda *a, **k: calls.append(a))
    check_classifier.cache_clear()
    for _ in range(3):
        check_classifier("timm:test_convnext", 3, 40, 2)
    assert len(calls) == 1
    check_classifier.cache_clear()
