"""Benches of scale, stages and comparison: what is computed follows from the plan, noise is not a change, files are written."""

import json
from dataclasses import dataclass

import pytest

from bench import compare, pipeline, results, scale
from fd2fast.artifacts import open_stage
from fd2fast.distillation.planner import make_plan

TINY = ["--quick", "--device", "cpu", "--precision", "fp32", "--rounds", "2"]


@dataclass(frozen=True)
class Settings:
    """Of an artifact that has none."""


def test_scale_writes_every_part(tmp_path, capsys):
    assert scale.main([*TINY, "--most-classes", "10", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("scale-*.json")
    rows = results.read(path)["rows"]
    assert {row["case"] for row in rows} == {"step", "group", "group, mean of slots", "classes", "plan", "processes"}
    assert all(("ms" in row) or row["computed"] == "yes" for row in rows)
    largest = [row for row in rows if row["case"] == "plan"][-1]
    assert (largest["classes"], largest["ipc"]) == (21841, 50)
    assert largest["planner ms"] < 1000
    assert 1 < largest["host MB"] < 500
    alone, *_, most = (
        row for row in rows if row["case"] == "processes" and row["classes"] == 21841 and row["ipc"] == 50
    )
    assert alone["x 1 process"] == 1.0
    assert 60 < most["x 1 process"] <= 64
    assert path.with_suffix(".png").stat().st_size > 5000
    assert "| processes | 200 | 5 |" in capsys.readouterr().out


def test_seconds_follow_the_plan():
    """Two waves of 3 and 3 segments, one in a step, the last block half as large."""
    plan = make_plan(10, 2, group_size=2, segment_size=4, segments_per_step=1)
    cost = scale.Cost(fixed=1.0, segment=9.0, slot=2.0, base=5, per_class=0.2)
    first, second = 2 * 11 + (1 + 5), 2 * 13 + (1 + 6)
    assert scale.seconds_of(plan, cost, 100) == pytest.approx((first + second) / 10)
    # two processes: (11, 11) then 6 on top of one; (13, 13) then 7
    assert scale.seconds_of(plan, cost, 100, processes=2) == pytest.approx((17 + 20) / 10)
    assert scale.seconds_of(plan, cost, 100, processes=9) == pytest.approx((11 + 13) / 10)


def test_the_line_through_the_steps():
    cost = scale.cost_of({1: 3.0, 2: 5.0, 4: 9.0}, {0: 3.0, 1: 3.5, 2: 4.0})
    assert cost.ms(8, 0) == pytest.approx(17.0)
    assert cost.ms(2, 3) == pytest.approx(5.0 + 2 * 3 * 0.5)
    many = scale.cost_of({1: 3.0, 2: 5.0}, {0: 3.0}, {10: 3.0, 110: 4.0}, base=10)
    assert many.ms(2, 0, classes=210) == pytest.approx(5.0 + 2 * 2.0)
    assert many.ms(2, 0) == pytest.approx(5.0)
    assert scale.step_sizes(6) == [1, 2, 4, 6]


@pytest.mark.parametrize(
    ("bench", "arguments", "message"),
    [
        (scale, [*TINY, "--parts", "stepp"], "unknown part 'stepp'"),
        (scale, [*TINY, "--method", "sre2l++"], "part group needs a method with FD2"),
        (scale, [*TINY, "--iterations", "0"], "iterations must be at least 1"),
        (scale, [*TINY, "--method", "foo"], "unknown method 'foo'"),
        (scale, [*TINY, "--method", "random"], "random picks real images"),
        (scale, [*TINY, "--method", "fadrm+_fd2"], "fadrm+_fd2 takes several teachers"),
        (scale, [*TINY, "--threads", "-1"], "threads must be 0 or more"),
        (pipeline, ["--parts", "all"], "unknown part 'all'"),
        (pipeline, ["--run", "nowhere", "--parts", "stages"], "nowhere holds no finished run"),
        (pipeline, ["--preset", "birds"], "unknown preset 'birds'"),
    ],
)
def test_bad_arguments(bench, arguments, message, tmp_path, capsys):
    assert bench.main([*arguments, "--out", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_cub_from_a_measured_step(tmp_path):
    arguments = ["--parts", "cub", "--rows", "2", "--size", "32", "--teacher", "timm:test_resnet", "--rounds", "2"]
    assert pipeline.main([*arguments, "--device", "cpu", "--out", str(tmp_path)]) == 0
    rows = results.read(next(tmp_path.glob("pipeline-*.json")))["rows"]
    assert [row["priors"] for row in rows[:4]] == [0, 1, 2, 3]
    steps = [row["ms"] for row in rows[:4]]
    wanted = (sum(steps) + steps[0]) / 5 * 50 * 2 * 10_000 / 1e3
    assert rows[4]["s an id"] == pytest.approx(wanted, abs=0.06 * 50)
    assert "2 images" in rows[4]["computed"]


def test_stages_are_read_from_manifests(tmp_path):
    run = tmp_path / "run"
    for name, seconds, finished in (("teachers/a", 5.0, "2"), ("dataset", 1.5, "1")):
        stage = open_stage(run / name, name.split("/")[0], Settings(), {})
        made = stage.finish(classes=["a"], size=8, mean=[0.5] * 3, std=[0.5] * 3)
        measured = {"seconds": seconds, "peak_memory_bytes": 7_000_000, "finished": finished}
        manifest = {**made.manifest, "measured": measured}
        (run / name / "manifest.json").write_text(json.dumps(manifest))
    (run / "run.json").write_text("{}")
    assert pipeline.main(["--parts", "stages", "--run", str(run), "--out", str(tmp_path)]) == 0
    rows = results.read(next(tmp_path.glob("pipeline-*.json")))["rows"]
    assert [(r["stage"], r["seconds"], r["peak MB"]) for r in rows] == [("dataset", 1.5, 7.0), ("teachers/a", 5.0, 7.0)]


def write(path, bench="table2", **row):
    about = {"schema": 1, "bench": bench, "commit": "c" * 40, "date": "today"}
    path.write_text(json.dumps({"about": about, "rows": [{"method": "m", "way": "engine", **row}]}))
    return str(path)


@pytest.mark.parametrize(
    ("old", "new", "change", "code"),
    [
        ((10, 9, 11), (10.8, 10, 12), "within noise", 0),
        ((10, 9, 11), (20, 18, 21), "2.00 x slower", 1),
        ((10, 9, 11), (5, 4, 6), "2.00 x faster", 0),
    ],
)
def test_only_changes_beyond_noise_are_called_so(old, new, change, code, tmp_path, capsys):
    a, b = (
        write(tmp_path / f"{n}.json", **dict(zip(("ms", "ms 10%", "ms 90%"), values, strict=True)))
        for n, values in (("a", old), ("b", new))
    )
    assert compare.main([a, b, "--fail-if-slower"]) == code
    assert f"| {change} |" in capsys.readouterr().out


def test_a_slower_machine_is_no_change_of_a_row():
    def rows(*times):
        return [{"way": str(n), "ms": t, "ms 10%": 0.99 * t, "ms 90%": 1.01 * t} for n, t in enumerate(times)]

    old, new = rows(10, 20, 30, 40, 50), rows(12, 24, 36, 48, 30)
    assert compare.drift(old, new) == {None: pytest.approx(1.2)}
    assert [line["change"] for line in compare.compare(old, new)] == ["within noise"] * 4 + ["2.00 x faster"]
    assert compare.drift(old[:3], new[:3]) == {}  # too few to tell
    other = [{**row, "method": "m"} for row in rows(10, 10, 10, 10)]
    assert compare.drift([*old, *other], [*new, *other])["m"] == 1.0  # measured at another time
    assert compare.compare(old[:1], new[:1])[0]["change"] == "1.20 x slower"


def test_other_changes_are_named(tmp_path, capsys):
    a = write(tmp_path / "a.json", **{"ms": 5.0, "peak MB": 100.0})
    assert compare.main([a, write(tmp_path / "b.json", **{"ms": 5.0, "peak MB": 101.0})]) == 0
    assert "| peak MB | 100 | 101 | same |" in capsys.readouterr().out
    assert compare.main([a, write(tmp_path / "c.json", **{"ms": 5.0, "peak MB": 150.0})]) == 0
    assert "| +50% |" in capsys.readouterr().out
    assert compare.main([a, write(tmp_path / "d.json", note="out of memory")]) == 0
    assert "note was None, now 'out of memory'" in capsys.readouterr().out
    assert compare.main([a, write(tmp_path / "e.json", size=9)]) == 0
    assert capsys.readouterr().out.count("only in the") == 2
    assert compare.main([a, write(tmp_path / "f.json", bench="scale")]) == 2
    assert "not to be compared" in capsys.readouterr().err
