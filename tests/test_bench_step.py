"""The step bench runs at tiny sizes without a GPU, and reports no time for a step that computes something else."""

import pytest
import torch

from bench import cases, results, ways
from bench import step as bench
from fd2fast.step import losses

TINY = ["--quick", "--no-compile", "--device", "cpu", "--precision", "bf16", "--repetitions", "1"]


def test_rows_and_table(tmp_path, capsys):
    assert bench.main([*TINY, "--methods", "sre2l++", "fadrm+_fd2", "--sweep", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("step-*.json")
    found = results.read(path)
    rows, about = found["rows"], found["about"]
    compared = [r for r in rows if "x plain" in r]
    assert [(r["method"], r["way"]) for r in compared] == [
        (method, way) for method in ("sre2l++", "fadrm+_fd2") for way in ("plain", "rival", "engine")
    ]
    assert [r["segments"] for r in rows if "x plain" not in r] == [1, 2, 1, 2]
    for row in rows:
        assert row["ms"] > 0
        assert {"limit ms", "images/s", "peak MB"} <= row.keys()
    assert {"commit", "device", "versions", "command", "clocks", "date"} <= about.keys()
    assert path.with_suffix(".png").stat().st_size > 5000
    printed = capsys.readouterr().out
    assert printed.count("| engine |") == 6


def test_no_time_where_the_results_disagree(monkeypatch, capsys, tmp_path):
    right = losses.Losses.of

    def wrong(self, *args):
        return right(self, *args) * 1.1

    monkeypatch.setattr(losses.Losses, "of", wrong)
    assert bench.main([*TINY, "--methods", "sre2l++_fd2", "--out", str(tmp_path)]) == 1
    assert not list(tmp_path.iterdir())
    captured = capsys.readouterr()
    assert "no time, the results disagree: engine in fp32" in captured.err
    assert "| engine |" not in captured.out


def test_the_rival_sees_the_same_view():
    """Crop, flip and roll as two matrices."""
    images = torch.rand(2, 3, 24, 24)
    for draw in ((3, 5, 10, 17, 1, -4, 6), (0, 0, 24, 24, 0, 0, 0), (2, 1, 20, 9, 0, 3, -11)):
        down, right = ways.resize_matrices(draw, 24)
        torch.testing.assert_close(down @ images @ right.T, ways.crop_flip_roll(images, draw, 24), rtol=0, atol=2e-6)


@pytest.mark.parametrize("method", ["sre2l++", "fadrm+_fd2"])
def test_pool_of_a_method(method):
    device = torch.device("cpu")
    options = bench.Options(quick=True).settled(device)
    make = cases.make_teacher
    teachers = {name: make(name, classes=8, size=32, device=device) for name in options.pool}
    case = bench.case_of(method, options, teachers, device, 4)
    assert len(case.teachers) == (1 if method == "sre2l++" else 2)
    assert bool(case.priors) == method.endswith("_fd2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "foo"], "unknown method 'foo'"),
        (["--methods", "cvdd_fd2"], "cvdd_fd2 weighs several teachers in one iteration"),
        (["--ways", "fast"], "unknown way 'fast'"),
        (["--precision", "fp64"], "precision must be auto, fp32"),
        (["--rows", "-2"], "rows must be at least 1"),
        (["--threads", "-1"], "threads must be 0 or more"),
        (["--teacher", "ResNet19"], "ResNet19"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, capsys):
    assert bench.main([*TINY, "--out", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
