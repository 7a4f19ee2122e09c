"""The kernel bench runs at tiny sizes without a GPU, and reports nothing for a kernel that is wrong."""

import csv

import pytest

from bench import kernels as bench
from bench import registry, shapes

TINY = ["--device", "cpu", "--tiny", "--calls", "2", "--no-compile"]


def test_every_operation_has_sizes():
    assert set(registry.REGISTRY) == set(shapes.PAPER) == set(shapes.TINY)
    assert all(shapes.PAPER.values())


def test_rows_of_every_operation(tmp_path, capsys):
    file = tmp_path / "rows.csv"
    bench.main([*TINY, "--csv", str(file)])
    bench.main([*TINY, "--op", "prototype_loss", "--csv", str(file)])
    rows = list(csv.DictReader(file.read_text().splitlines()))
    names = [row["operation"] for row in rows]
    assert set(names) == set(registry.REGISTRY)
    assert names.count("prototype_loss") == 2
    assert {row["implementation"] for row in rows} == {"reference"}
    assert all(float(row["forward ms"]) > 0 for row in rows)
    assert "prototype_loss n=3" in capsys.readouterr().out


def test_a_wrong_kernel_is_not_reported(monkeypatch, capsys, tmp_path):
    right = registry.ops.prototype_loss

    def wrong(*inputs, backend):
        return right(*inputs, backend=backend) * (1.01 if backend == "triton" else 1)

    monkeypatch.setattr(registry.ops, "prototype_loss", wrong)
    with pytest.raises(SystemExit, match="the kernel is wrong, nothing is reported"):
        bench.main([*TINY, "--op", "prototype_loss", "adam_clamp_", "--csv", str(tmp_path / "rows.csv")])
    assert "prototype_loss" not in capsys.readouterr().out
    rows = list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
    assert {row["operation"] for row in rows} == {"adam_clamp_"}  # what comes after is measured


def test_unknown_operation():
    with pytest.raises(SystemExit, match="bilinear_attention_pool.*got pool"):
        bench.main([*TINY, "--op", "pool"])
