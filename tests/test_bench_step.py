"""The step bench runs at tiny sizes without a GPU, and reports no time for a step that computes something else."""

import json

import pytest
import torch
from bench_tools import load_bench

bench = load_bench("step")
cases, ways = load_bench("cases"), load_bench("ways")

TINY = ["--quick", "--no-compile", "--device", "cpu", "--precision", "bf16", "--repetitions", "1"]


def test_rows_and_table(tmp_path, capsys):
    file = tmp_path / "step.jsonl"
    assert bench.main([*TINY, "--methods", "sre2l++", "fadrm+_fd2", "--sweep", "--json", str(file)]) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    compared = [r for r in rows if "x plain" in r]
    assert [(r["method"], r["way"]) for r in compared] == [
        (method, way) for method in ("sre2l++", "fadrm+_fd2") for way in ("plain", "rival", "engine")
    ]
    assert [r["segments"] for r in rows if "x plain" not in r] == [1, 2, 1, 2]
    for row in rows:
        assert row["ms"] > 0
        assert {"commit", "device", "versions", "command", "limit ms", "images/s"} <= row.keys()
    printed = capsys.readouterr().out
    assert printed.count("| engine |") == 6


def test_no_time_where_the_results_disagree(monkeypatch, capsys):
    right = ways.GroupedStep._teacher_losses

    def wrong(self, *args):
        return right(self, *args) * 1.1

    monkeypatch.setattr(ways.GroupedStep, "_teacher_losses", wrong)
    assert bench.main([*TINY, "--methods", "sre2l++_fd2"]) == 1
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
    options = bench.Options(quick=True).settled()
    device = torch.device("cpu")
    make = cases.make_teacher
    teachers = {name: make(name, classes=8, size=32, device=device) for name in options.pool}
    case = bench.case_of(method, options, teachers, device, 4)
    assert len(case.teachers) == (1 if method == "sre2l++" else 2)
    assert bool(case.priors) == method.endswith("_fd2")
