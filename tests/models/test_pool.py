"""The reference's checkpoint format: names, round trip, refusals."""

import pytest
import torch

from fd2fast.errors import UserError
from fd2fast.models.backbone import build_backbone, load_weights
from fd2fast.models.released_checkpoints import alpha_text, export_teacher, import_checkpoint, pool_name
from fd2fast.models.teacher import Teacher


def make(name="ShuffleNetV2_x0.5", classes=3, maps=2, alpha=0.5):
    teacher = Teacher(build_backbone(name, classes), maps, alpha=alpha, size=64)
    teacher.prototypes_last.uniform_()
    return teacher.eval()


@pytest.mark.parametrize(
    ("alpha", "text"), [(0.5, "5e-1"), (1.0, "1e-0"), (0.25, "2e-1"), (0.3, "3e-1"), (0.05, "5e-2")]
)
def test_alpha_is_written_as_the_reference_does(alpha, text):
    assert alpha_text(alpha) == text


@pytest.mark.parametrize("name", ["ResNet18", "DenseNet121", "ShuffleNetV2", "ShuffleNetV2_x0.5"])
def test_a_teacher_survives_the_round_trip(tmp_path, name):
    teacher = make(name, alpha=0.3)
    path = export_teacher(teacher.to(memory_format=torch.channels_last), tmp_path)
    reference_name = {"DenseNet121": "Densenet121"}.get(name, name.removesuffix("_x0.5"))
    assert path.name == f"{reference_name}_M2_3e-1cal.pth"
    content = torch.load(path, weights_only=True)
    assert set(content) == {reference_name, "cal", "feature_center"}
    assert all(t.is_contiguous() for t in content[reference_name].values())
    assert "attentions.conv.weight" in content["cal"]
    again, notices = import_checkpoint(path, size=64)
    assert "EMA" in notices[0]
    assert (again.name, again.alpha, again.attention_maps, again.classes) == (name, 0.3, 2, 3)
    x = torch.randn(2, 3, 64, 64)
    for a, b in zip(again.eval()(x), teacher(x), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.equal(again.prototypes_last, teacher.prototypes_last)
    assert again.prototypes_ema.norm(dim=1).tolist() == pytest.approx([1.0] * 3)


def test_a_pool_file_serves_as_weights_too(tmp_path):
    teacher = make()
    backbone = build_backbone("ShuffleNetV2_x0.5", 3)
    load_weights(backbone, export_teacher(teacher, tmp_path))
    assert torch.equal(backbone.net.fc.weight, teacher.backbone.net.fc.weight)


def test_what_does_not_fit_is_refused(tmp_path):
    path = export_teacher(make(), tmp_path)
    with pytest.raises(UserError, match="'ResNet18' is missing"):
        import_checkpoint(path, size=64, model="ResNet18")
    with pytest.raises(UserError, match="not in the reference's pools"):
        import_checkpoint(path, size=64, model="timm:resnet10t")
    with pytest.raises(UserError, match="has no place in a reference model pool"):
        pool_name(make("timm:resnet10t"))
    good = torch.load(path, weights_only=True)
    for change, told in (
        ({"feature_center": torch.zeros(3, 5)}, r"feature_center' must be \[K, M\*C\] = \[3, 2048\], got \[3, 5\]"),
        ({"cal": {}}, "'cal' holds no CAL head"),
        ({"cal": {**good["cal"], "fc.weight": torch.zeros(3, 7)}}, "'cal' does not fit"),
        ({"cal": {**good["cal"], "fc.weight": torch.zeros(4, 2048)}}, r"fc.weight \(3, 1024\) for \(4, 1024\)"),
        ({"ShuffleNetV2": {}}, "holds no tensors"),
        ({"feature_center": good["feature_center"] * float("nan")}, r"feature_center \(\d+ of \d+\)"),
        ({"cal": {k: v * float("inf") for k, v in good["cal"].items()}}, "NaN or infinite: cal."),
    ):
        torch.save({**good, **change}, path)
        with pytest.raises(UserError, match=told):
            import_checkpoint(path, size=64)
    torch.save(good["ShuffleNetV2"], path)
    with pytest.raises(UserError, match="is no checkpoint of the reference"):
        import_checkpoint(path, size=64)
    torch.save(good, tmp_path / "teacher.pth")
    with pytest.raises(UserError, match="does not tell alpha"):
        import_checkpoint(tmp_path / "teacher.pth", size=64)
    assert import_checkpoint(tmp_path / "teacher.pth", size=64, alpha=0.2)[0].alpha == 0.2
    torch.save(good, tmp_path / "ShuffleNetV2_M4_5e-1cal.pth")
    assert "says M = 4, its tensors 2" in import_checkpoint(tmp_path / "ShuffleNetV2_M4_5e-1cal.pth", size=64)[1][1]


def test_a_checkpoint_of_wrapped_models_is_read(tmp_path):
    teacher = make()
    content = torch.load(export_teacher(teacher, tmp_path), weights_only=True)
    for key in ("ShuffleNetV2", "cal"):
        content[key] = {f"module.{name}": value for name, value in content[key].items()}
    torch.save(content, tmp_path / "ShuffleNetV2_M2_5e-1cal.pth")
    again, _ = import_checkpoint(tmp_path / "ShuffleNetV2_M2_5e-1cal.pth", size=64)
    assert again.name == "ShuffleNetV2_x0.5"
    assert torch.equal(again.backbone.net.fc.weight, teacher.backbone.net.fc.weight)


def test_another_teachers_file_is_not_written_over(tmp_path):
    first = make()
    path = export_teacher(first, tmp_path)
    before = path.read_bytes()
    assert export_teacher(first, tmp_path) == path
    second = make()
    with pytest.raises(UserError, match="holds another teacher"):
        export_teacher(second, tmp_path)
    path.write_bytes(b"<html>")
    with pytest.raises(UserError, match="is not a file of tensors"):
        export_teacher(second, tmp_path)
    path.unlink()
    assert export_teacher(first, tmp_path).read_bytes() == before


class Malicious:
    """A pickle that would write a file when it is executed."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def test_a_malicious_checkpoint_is_not_executed(tmp_path):
    path = tmp_path / "ResNet18_M2_5e-1cal.pth"
    torch.save({"ResNet18": Malicious(tmp_path / "executed"), "cal": {}, "feature_center": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="cannot be read as tensors only"):
        import_checkpoint(path, size=64)
    assert not (tmp_path / "executed").exists()
