"""Models looked at before work begins: what one image of a size takes, what cannot be built or seen, which weights fit."""

import pytest
import torch
from model_tools import TINY

from fd2fast.errors import UserError
from fd2fast.models.backbone import build_backbone
from fd2fast.models.probe import check_weights, probe


def test_a_probe_counts_what_an_image_meets():
    seen = probe(TINY, 5, 32)
    net = build_backbone(TINY, 5)
    assert seen.size == sum(t.numel() * t.element_size() for t in net.state_dict().values())
    assert (seen.positions, seen.map_positions) == (4, 4)
    assert (probe(TINY, 5, 16).positions, probe(TINY, 5, 16).map_positions) == (1, 1)
    # maps of all layers are four times as large at twice the side
    assert probe(TINY, 5, 64).kept == 4 * seen.kept


def test_nothing_is_drawn():
    torch.manual_seed(3)
    wanted = torch.rand(4)
    torch.manual_seed(3)
    probe(TINY, 6, 32)
    assert torch.equal(torch.rand(4), wanted)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ResNet81", "did you mean 'ResNet18'"),
        ("timm:resnet10", "unknown timm model"),
        ("timm:resnet10t,layers=many", "cannot build|cannot see"),
    ],
)
def test_what_cannot_be_built_is_refused(name, told):
    with pytest.raises(UserError, match=told):
        probe(name, 5, 32)


def test_weights_are_tried_and_say_nothing(tmp_path, caplog):
    other = build_backbone(TINY, 9)
    torch.save(other.net.state_dict(), tmp_path / "w.pth")
    check_weights(TINY, 5, str(tmp_path / "w.pth"))
    assert not caplog.records
    (tmp_path / "bad.pth").write_text("<html>not found</html>")
    for source, told in (("bad.pth", "bad.pth"), ("none.pth", "no such file"), (".", "there is no|is a folder")):
        with pytest.raises(UserError, match=told):
            check_weights(TINY, 5, str(tmp_path / source))
    torch.save({"a.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(UserError):  # the file is another one now
        check_weights(TINY, 5, str(tmp_path / "w.pth"))
