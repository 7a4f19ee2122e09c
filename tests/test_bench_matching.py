"""DM, DSA and DATM at tiny sizes: rows, losses that are not their formula, augmentations, bad arguments."""

import pytest
import torch

from bench import matching, results

TINY = ["--quick", "--device", "cpu"]


def test_rows_and_files(tmp_path, capsys):
    assert matching.main([*TINY, "--steps", "2", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("matching-*.json")
    rows = results.read(path)["rows"]
    assert [row["method"] for row in rows] == ["dsa", "dm", "datm"]
    for row in rows:
        assert row["ms 10%"] <= row["ms"] <= row["ms 90%"]
        assert row["peak MB"] > 0.05
    assert [row["paper ms"] for row in rows] == [3900, 1400, 2700]
    assert path.with_suffix(".png").stat().st_size > 3000
    assert "| datm | 3 |" in capsys.readouterr().out


@pytest.mark.parametrize("method", ["dsa", "dm", "datm"])
def test_an_iteration_moves_every_image(method):
    device = torch.device("cpu")
    options = matching.Options(quick=True, steps=4).settled(device)
    run = matching.Matching(method, options, device)
    before = run.images.detach().clone()
    run(0)
    assert (run.images.detach() - before).flatten(1).abs().amax(dim=1).min() > 0


@pytest.mark.parametrize(
    ("method", "name"), [("dm", "distribution_loss"), ("dsa", "gradient_loss"), ("datm", "trajectory_loss")]
)
def test_no_time_for_another_loss(method, name, tmp_path, monkeypatch):
    right = getattr(matching, name)
    monkeypatch.setattr(matching, name, lambda *given: 1.001 * right(*given))
    assert matching.main([*TINY, "--methods", method, "--out", str(tmp_path)]) == 1
    (row,) = results.read(next(tmp_path.glob("*.json")))["rows"]
    assert row["note"].startswith(f"no time: {method}: the loss is")
    assert "ms" not in row


def test_a_wrong_gradient_is_noticed(monkeypatch):
    right = matching.distribution_loss
    monkeypatch.setattr(matching, "distribution_loss", lambda f, r, s: right(f, r, s.detach() + 0.5 * (s - s.detach())))
    with pytest.raises(matching.DisagreementError, match="by finite differences"):
        matching.check("dm")


def test_out_of_memory_is_a_note(tmp_path, monkeypatch):
    def full(self, _):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(matching.Matching, "__call__", full)
    assert matching.main([*TINY, "--methods", "dm", "--out", str(tmp_path)]) == 0
    (row,) = results.read(next(tmp_path.glob("*.json")))["rows"]
    assert row["note"] == "out of memory"


@pytest.mark.parametrize("kind", range(6))
def test_augmentations_keep_the_shape_and_reach_the_pixels(kind):
    images = torch.rand(2, 3, 12, 12, requires_grad=True)
    view = matching.augment(images, kind, (0.2, 0.7, 0.9, 0.4))
    assert view.shape == images.shape
    (gradient,) = torch.autograd.grad(view.square().sum(), images)
    assert gradient.abs().sum() > 0
    again = matching.augment(images[:1], kind, (0.2, 0.7, 0.9, 0.4))
    torch.testing.assert_close(again, view[:1])  # alike for every image


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "dmm"], "unknown method 'dmm'"),
        (["--depth", "9"], "9 blocks halve 16 pixels to nothing"),
        (["--batch", "4"], "batch must be at most the 3 synthetic images"),
        (["--steps", "0"], "steps must be at least 1"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, capsys):
    assert matching.main([*TINY, "--out", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
