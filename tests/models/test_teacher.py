"""The teacher: its parts, its file, its refusals."""

import json

import pytest
import torch

from fd2fast.artifacts import Artifact, open_stage
from fd2fast.errors import UserError
from fd2fast.models.backbone import build_backbone
from fd2fast.models.teacher import Teacher, load_teacher
from fd2fast.settings.config import PretrainConfig


def make(name="timm:resnet10t,output_stride=16", classes=3, maps=2):
    teacher = Teacher(build_backbone(name, classes), maps, alpha=0.3, size=32, accuracy=81.25)
    teacher.prototypes_ema.uniform_()
    teacher.prototypes_last.uniform_()
    return teacher


def artifact_of(teacher, path, classes, kind="teacher"):
    stage = open_stage(path, kind, PretrainConfig(), {})
    teacher.save(path / "teacher.safetensors")
    return stage.finish(classes=classes, size=32, mean=[0.5] * 3, std=[0.2] * 3)


def test_forward_is_backbone_and_head_on_one_feature_map():
    teacher = make().eval()
    x = torch.randn(2, 3, 32, 32)
    out = teacher(x)
    assert torch.equal(out.logits, teacher.backbone.net(x))
    assert torch.equal(out.features, teacher.backbone.features(x))
    head = teacher.head(out.features)
    assert torch.equal(out.attention, head.attention)
    assert torch.equal(out.z, head.z)
    assert torch.equal(out.cal_logits, head.logits)
    assert out.features.shape == (2, 512, 2, 2)


def test_the_heads_bn_is_the_last_layer():
    teacher = make("ResNet18")
    layers = teacher.bn_layers()
    assert [n for n, _ in layers[:-1]] == [n for n, _ in teacher.backbone.bn_layers()]
    assert layers[-1] == ("cal", teacher.head.attentions.bn)
    assert layers[-1][1].eps == 1e-3


def test_a_saved_teacher_comes_back_whole(tmp_path):
    teacher = make()
    artifact = artifact_of(teacher, tmp_path / "t", ["a", "b", "c"])
    loaded = load_teacher(artifact, "cpu", torch.float64)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    for a, b in zip(loaded(x), teacher.double().eval()(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert (loaded.name, loaded.classes, loaded.attention_maps) == ("timm:resnet10t,output_stride=16", 3, 2)
    assert (loaded.alpha, loaded.accuracy, loaded.size) == (0.3, 81.25, 32)
    assert torch.equal(loaded.prototypes_ema.float(), teacher.prototypes_ema.float())
    assert torch.equal(loaded.prototypes_last.float(), teacher.prototypes_last.float())
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_equal_teachers_have_equal_bytes(tmp_path):
    teacher = make()
    teacher.save(tmp_path / "a.safetensors")
    teacher.to(memory_format=torch.channels_last).save(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_what_is_no_teacher_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="x.safetensors is not a teacher"):
        Teacher.load(path)
    with pytest.raises(UserError, match="is not a teacher"):
        Teacher.load(tmp_path / "none.safetensors")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, path, metadata={"fd2fast": json.dumps({"name": "ResNet18"})})
    with pytest.raises(UserError, match="is not a teacher"):
        Teacher.load(path)
    artifact = artifact_of(make(), tmp_path / "k", ["a", "b", "c"], kind="patches")
    with pytest.raises(UserError, match="holds a patches artifact; wanted a teacher"):
        load_teacher(artifact)
    artifact = artifact_of(make(), tmp_path / "c", ["a", "b", "c", "d"])
    assert isinstance(artifact, Artifact)
    with pytest.raises(UserError, match="3 outputs, its manifest 4 classes"):
        load_teacher(artifact)
