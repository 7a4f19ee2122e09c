"""The paper's table at tiny sizes: its rows and files, rows that disagree or run out of memory, bad arguments."""

import json

import pytest
import torch

from bench import cases, gate, results, table2, timing

TINY = ["--quick", "--device", "cpu", "--precision", "bf16", "--rounds", "2"]


def rows_of(folder) -> list[dict]:
    (path,) = folder.glob("table2-*.json")
    return results.read(path)["rows"]


def test_rows_and_files(tmp_path, capsys):
    ways = ["plain", "vectorised", "bf16", "graph", "engine", "engine, all"]
    arguments = [*TINY, "--methods", "sre2l++_fd2", "fadrm+", "--priors", "1", "--ways", *ways, "--out", str(tmp_path)]
    assert table2.main(arguments) == 0
    rows = rows_of(tmp_path)
    assert [(r["method"], r["way"]) for r in rows] == [(m, w) for m in ("sre2l++_fd2", "fadrm+") for w in ways]
    for row in rows:
        if row["way"] == "graph":
            assert row["note"] == "needs a GPU"
            assert "ms" not in row
            continue
        assert row["ms 10%"] <= row["ms"] <= row["ms 90%"]
        assert {"first 5 ms", "images/s", "x plain", "x rival", "of limit", "peak MB", "strongest rival"} <= row.keys()
        # any share: emulated types are slower, Winograd's algorithm is faster than the direct one
        assert row["of limit"] == pytest.approx(row["limit ms"] / row["ms"], abs=2e-3, rel=1e-2)
        assert row["limit ms"] > 0
        assert row["way"] == "plain" or row[f"{row['way']} gradient error"] < 0.6
    assert rows[0]["paper ms"] == 96.8
    assert rows[5]["images"] == 2 * rows[4]["images"]
    place = json.loads(next(tmp_path.glob("*.json")).read_text())["about"]
    assert {"device", "versions", "commit", "command", "date", "load before"} <= place.keys()
    assert "instruction set: " in place["instruction set"]
    assert "random weights; random images" in place["work"]
    assert next(tmp_path.glob("*.png")).stat().st_size > 5000
    assert "| sre2l++_fd2 | engine, all |" in capsys.readouterr().out


def test_a_row_that_disagrees_gets_no_time(tmp_path, monkeypatch):
    right = table2.Rival._update

    def wrong(self):
        self.images.grad.neg_()
        right(self)

    monkeypatch.setattr(table2.Rival, "_update", wrong)
    ways = ["plain", "vectorised", "engine"]
    arguments = [*TINY, "--methods", "sre2l++", "--ways", *ways, "--out", str(tmp_path)]
    assert table2.main(arguments) == 1
    rows = {row["way"]: row for row in rows_of(tmp_path)}
    assert rows["vectorised"]["note"].startswith("no time: vectorised in fp32: images off by 2")
    assert "ms" not in rows["vectorised"]
    assert rows["engine"]["ms"] > 0


def test_every_segment_of_a_row_is_compared(tmp_path, monkeypatch):
    right = table2.FusedStep.__call__

    def wrong(self, t, *, read=False):
        right(self, t, read=read)
        self.step.images[self.rows :] = 0.0

    monkeypatch.setattr(table2.FusedStep, "__call__", wrong)
    arguments = [*TINY, "--methods", "sre2l++", "--ways", "plain", "engine", "engine, all", "--out", str(tmp_path)]
    assert table2.main(arguments) == 1
    rows = {row["way"]: row for row in rows_of(tmp_path)}
    assert rows["engine"]["ms"] > 0
    assert rows["engine, all"]["note"].startswith("no time: engine, all in bf16: images off by")


def test_four_teachers_compiled_for_several_methods(tmp_path, monkeypatch):
    """torch.compile takes a limited number of versions of one code."""
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: real(f, backend="eager", **kwargs))
    pool = [f"timm:test_resnet,channels={width}x32x48x96" for width in (16, 24, 32, 40)]
    arguments = [*TINY, "--methods", "sre2l++", "fadrm+", "fadrm+_fd2", "--pool", *pool, "--ways", "plain", "compiled"]
    assert table2.main([*arguments, "--precision", "fp32", "--rounds", "1", "--out", str(tmp_path)]) == 0
    compiled = [row for row in rows_of(tmp_path) if row["way"] == "compiled"]
    assert len(compiled) == 3
    assert all(row["ms"] > 0 for row in compiled)


def test_without_a_reference_nothing_is_timed(tmp_path, monkeypatch):
    def full(self, t, *, read=False):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(table2.Plain, "__call__", full)
    arguments = [*TINY, "--methods", "sre2l++", "--ways", "plain", "engine", "--out", str(tmp_path)]
    assert table2.main(arguments) == 1
    notes = {row["way"]: row["note"] for row in rows_of(tmp_path)}
    assert notes == {"plain": "out of memory", "engine": "no time: not checked, the plain loop runs out of memory"}


def test_a_row_without_memory_says_so(tmp_path, monkeypatch):
    right = table2.Rival.__call__

    def full(self, t, *, read=False):
        if not read and t >= 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        right(self, t, read=read)

    monkeypatch.setattr(table2.Rival, "__call__", full)
    ways = ["plain", "vectorised", "engine"]
    assert table2.main([*TINY, "--methods", "sre2l++", "--ways", *ways, "--out", str(tmp_path)]) == 0
    rows = {row["way"]: row for row in rows_of(tmp_path)}
    assert rows["vectorised"]["note"] == "out of memory"
    assert rows["engine"]["strongest rival"] == "plain"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "sre2l+"], "unknown method 'sre2l+'"),
        (["--methods", "rded"], "rded picks real images"),
        (["--ways", "fastest"], "unknown way 'fastest'"),
        (["--classes", "9"], "classes must be a multiple of the 4 rows"),
        (["--rows", "-1"], "rows must be at least 1"),
        (["--rounds", "-1"], "rounds must be 0 or more, got -1"),
        (["--precision", "fp64"], "precision must be auto, fp32"),
        (["--methods", "cvdd"], "cvdd weighs several teachers"),
        (["--out", "/proc/nope"], "results cannot be written to /proc/nope"),
        (["--device", "cuda"], "finds no GPU here"),
        (["--dataset", "nowhere"], "nowhere does not exist"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path, capsys):
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert table2.main([*TINY, "--out", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_errors_are_held_to_the_precision_and_to_a_peer():
    good = gate.Errors(gradient=0.2, images=0.4, terms={"bn": 1e-3})
    gate.check("row", good, "bf16", peer=good)
    with pytest.raises(gate.DisagreementError, match=r"row in fp32: gradient off by 0.2 .* allowed 0.005"):
        gate.check("row", good, "fp32")
    with pytest.raises(gate.DisagreementError, match="images off by 0.4 .* allowed 0.17"):
        gate.check("row", good, "bf16", peer=gate.Errors(gradient=0.2, images=0.1, terms={"bn": 1e-3}))
    with pytest.raises(gate.DisagreementError, match="gradient off by nan"):
        gate.check("row", gate.Errors(gradient=float("nan"), terms={"bn": 0.0}), "bf16")


def test_limits_in_fp32_follow_the_rounding_of_the_plain_loop():
    bad = gate.Errors(gradient=0.006, images=0.01, terms={"bn": 1e-6})
    gate.check("row", bad, "fp32", rounding=lambda: gate.Errors(gradient=0.003, terms={"bn": 0.0}))
    with pytest.raises(gate.DisagreementError, match=r"gradient off by 0.006 .* allowed 0.005"):
        gate.check("row", bad, "fp32", rounding=lambda: gate.Errors(gradient=0.001, terms={"bn": 0.0}))
    worse = gate.Errors(gradient=0.2, terms={"bn": 0.0})
    with pytest.raises(gate.DisagreementError, match=r"gradient off by 0.2 .* allowed 0.05"):
        gate.check("row", worse, "fp32", rounding=lambda: worse)


def test_rounding_of_the_plain_loop_is_small_and_not_nothing():
    teacher = cases.make_teacher("ResNet18", classes=4, size=32, device=torch.device("cpu"))
    case = cases.make_case("sre2l++_fd2", [teacher], rows=3, priors=1, precision="fp32", device=torch.device("cpu"))
    errors = gate.Reference(case).rounding()
    assert 1e-8 < errors.gradient < 0.05
    assert 1e-8 < errors.images < 0.1
    assert 0 < errors.worst_term < 1e-3


def test_turns_and_quantiles():
    order: list[str] = []
    runs = {name: lambda t, n=name: order.append(f"{n}{t}") for name in "ab"}
    found = timing.interleaved(runs, 4, 2, torch.device("cpu"), warm_up=1)
    turns = [[f"{name}{8 * turn + t}" for t in range(8)] for turn in range(3) for name in "ab"]
    assert order == [step for turn in turns for step in turn]
    assert [len(v) for v in found.values()] == [6, 6]
    assert timing.quantiles([3.0, 1.0, 2.0])[1] == 2.0
    assert timing.quantiles([5.0]) == (5.0, 5.0, 5.0)
    assert timing.ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0]) == 2.0


def test_result_files_are_checked(tmp_path):
    for text, message in (
        ("{", "not a result file"),
        ("[]", "not a result file"),
        ('{"about": {"schema": 9}, "rows": []}', "version 9"),
    ):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(table2.UserError, match=message):
            results.read(tmp_path / "x.json")
    with pytest.raises(table2.UserError, match="missing"):
        results.read(tmp_path / "y.json")
