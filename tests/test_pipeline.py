"""A whole tiny run: every stage, several methods, resumed without work, its report readable."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fd2fast import artifacts, cli, stages
from fd2fast.artifacts import Dataset, Images, Labels, Metrics, TeacherArtifact
from fd2fast.data.pixels import read_image
from fd2fast.errors import UserError
from fd2fast.graph import plan_jobs
from fd2fast.pipeline import parse_entry
from fd2fast.settings.config import PretrainConfig, RunConfig
from fd2fast.stages import pretrain, register
from fd2fast.system import lock

TINY = """
methods = ["random", "random:soft", "herding", "kcenter", "rded", "sre2l++", "sre2l++_fd2", "fadrm+_fd2"]
teachers = ["timm:test_resnet", "timm:test_byobnet"]
students = ["timm:test_resnet"]
ipc = [1, 2]
[data]
classes = 4
size = 32
train_per_class = 8
test_per_class = 4
[pretrain]
epochs = 1
batch_size = 16
attention_maps = 2
[patches]
per_class = 2
crops = 2
pool = 8
[distill]
iterations = [4]
[relabel]
epochs = 2
[evaluate]
seeds = [0, 1]
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "tiny.toml").write_text(TINY)
    arguments = ["run", "--config", str(folder / "tiny.toml"), "--out", str(folder / "out")]
    assert cli.main(arguments) == 0
    return folder / "out", arguments


def test_every_artifact_is_there_and_verifies(finished):
    out, _ = finished
    kinds = [artifacts.load(p.parent).kind for p in out.rglob("manifest.json")]
    counts = {kind: kinds.count(kind) for kind in set(kinds)}
    # labels: 5 methods with soft labels x 2 sizes; metrics: 8 rows x 2 sizes
    assert counts == {"dataset": 1, "teacher": 2, "patches": 2, "images": 7, "labels": 10, "metrics": 16}
    for path in out.rglob("manifest.json"):
        artifacts.load(path.parent).verify()
    assert not list(out.rglob("state"))


def test_the_same_command_again_does_no_work(finished, capsys):
    out, arguments = finished
    before = {p: p.stat().st_mtime_ns for p in out.rglob("manifest.json")}
    assert cli.main(arguments) == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("manifest.json")} == before


def test_other_settings_are_refused_before_work_is_lost(finished, capsys):
    _, arguments = finished
    assert cli.main([*arguments, "--patches.crops", "3"]) == 2
    assert "config.crops was 2, now 3" in capsys.readouterr().err


def test_a_run_notices_changed_images_before_it_goes_on(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("ant", "bee"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for n in range(2):
                image = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                image.save(tmp_path / "data" / split / name / f"{n}.png")

    def teacher(config: PretrainConfig, out: Path, dataset: Dataset, *, overwrite: bool = False) -> TeacherArtifact:
        raise UserError("the teachers begin")

    monkeypatch.setattr(pretrain, "SPEC", dataclasses.replace(pretrain.SPEC, run=teacher))
    monkeypatch.chdir(tmp_path)

    def run(root, *options):
        code = cli.main(
            ["run", "--data.dataset", "folder", "--data.root", root, "--data.size", "8", "--out", "out"]
            + ["--methods", "random", "--ipc", "1", *options]
        )
        return code, capsys.readouterr()

    assert "error: the teachers begin" in run("data")[1].err
    assert "error: the teachers begin" in run(str(tmp_path / "data"))[1].err
    made = artifacts.load(tmp_path / "out" / "dataset")
    (tmp_path / "data" / "train" / "ant" / "0.png").rename(tmp_path / "data" / "train" / "bee" / "7.png")
    code, told = run("data")
    assert code == 2
    assert "1 added (train/bee/7.png), 1 removed (train/ant/0.png)" in told.err
    assert "training" not in told.out  # no old counts
    assert "the teachers begin" in run("data", "--overwrite")[1].err
    assert artifacts.load(tmp_path / "out" / "dataset").id != made.id


@pytest.mark.parametrize("name", ["manifest.json", "state/begun.json"])
def test_a_run_does_not_begin_in_the_folder_of_a_stage(tmp_path, capsys, name):
    mark = tmp_path / "out" / name
    mark.parent.mkdir(parents=True)
    mark.write_text("{}")
    (tmp_path / "tiny.toml").write_text(TINY)
    assert cli.main(["run", "--config", str(tmp_path / "tiny.toml"), "--out", str(tmp_path / "out")]) == 2
    assert "holds the result of one stage" in capsys.readouterr().err
    assert [path for path in (tmp_path / "out").rglob("*") if path.is_file()] == [mark]


def test_a_quick_run_is_complete_beside_the_full_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = TINY.replace(
        '"random", "random:soft", "herding", "kcenter", "rded", "sre2l++", "sre2l++_fd2", ', '"random", '
    )
    assert text != TINY
    (tmp_path / "tiny.toml").write_text('out = "mine"' + text.replace("ipc = [1, 2]", "ipc = [1]"))
    assert cli.main(["run", "--quick", "--config", "tiny.toml"]) == 0
    assert not (tmp_path / "mine").exists()
    found = [artifacts.load(p.parent) for p in sorted((tmp_path / "mine-quick").rglob("manifest.json"))]
    facts = {artifact.facts["method"]: artifact.facts for artifact in found if artifact.kind == "metrics"}
    assert {method: row["seeds"] for method, row in facts.items()} == {"random": [0], "fadrm+_fd2": [0]}
    assert "fadrm+_fd2" in capsys.readouterr().out
    # what is said on the command line holds
    assert cli.main(["run", "--config", "tiny.toml", "--quick", "--evaluate.seeds", "0", "1"]) == 2
    assert "config.seeds was [0], now [0, 1]" in capsys.readouterr().err


def test_the_table_names_every_row_and_the_pictures_exist(finished, capsys):
    out, _ = finished
    assert cli.main(["report", "--run", str(out)]) == 0
    table = capsys.readouterr().out
    for name in ("random", "herding", "kcenter", "rded", "sre2l++", "sre2l++_fd2", "fadrm+_fd2"):
        assert name in table.lower()
    for name in ("report.md", "table.json", "grid.png", "accuracy.png"):
        assert (out / "report" / name).stat().st_size > 0
    json.loads((out / "report" / "table.json").read_text())


def test_report_of_nothing_is_refused(tmp_path, capsys):
    assert cli.main(["report", "--run", str(tmp_path)]) == 2
    assert "run.json is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "3",
        "{}",
        '{"dataset": 1, "teachers": [], "images": [], "metrics": []}',
        '{"dataset": "d", "teachers": 3}',
        '{"dataset": "d", "teachers": [["t"]], "images": [], "metrics": []}',
    ],
)
def test_a_damaged_index_of_a_run_is_named(tmp_path, content, capsys):
    (tmp_path / "run.json").write_text(content)
    assert cli.main(["report", "--run", str(tmp_path)]) == 2
    assert "run.json is damaged" in capsys.readouterr().err


def test_an_index_with_a_name_no_folder_can_have_is_refused(tmp_path, capsys):
    (tmp_path / "run.json").write_text(json.dumps({"dataset": "x" * 5000, "teachers": [], "images": [], "metrics": []}))
    assert cli.main(["report", "--run", str(tmp_path)]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_entries():
    assert parse_entry("random").labels == "hard"
    assert parse_entry("rded").labels == "soft"
    assert parse_entry("random:soft").name == "random:soft"
    assert parse_entry("random:hard").name == "random"
    with pytest.raises(UserError, match="unknown method"):
        parse_entry("rand")


@pytest.fixture
def mirrored():
    """The stages with one more between distill and relabel."""
    before = dict(stages.STAGES)
    register("mirror", "mirror_stage", "Turn the images left to right.", after="distill")
    yield
    stages.ADDED.remove("mirror")
    stages.STAGES.clear()
    stages.STAGES.update(before)


def test_a_stage_is_added_by_one_line(mirrored, tmp_path, capsys):
    text = TINY.replace("ipc = [1, 2]", "ipc = [1]").replace("seeds = [0, 1]", "seeds = [0]\n[mirror]\nturns = 1")
    first = text.index("methods")
    text = text[:first] + 'methods = ["random:soft"]\n' + text[text.index("teachers") :]
    (tmp_path / "tiny.toml").write_text(text)
    out = tmp_path / "out"
    command = ["run", "--config", str(tmp_path / "tiny.toml"), "--out", str(out)]
    assert cli.main([*command, "--dry-run", "--mirror.turns", "-1"]) == 2
    assert "mirror.turns must be a whole number of at least 0, got -1" in capsys.readouterr().err
    assert cli.main([*command, "--dry-run"]) == 0
    titles = [line.split("  ")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert [title.split()[0] for title in titles] == [
        "data",
        "teacher",
        "teacher",
        "distill",
        "mirror",
        "labels",
        "students",
    ]

    assert cli.main(command) == 0
    plain, turned = Images.load(out / "images" / "random"), Images.load(out / "mirrored" / "random")
    assert turned.config == {"turns": 1}
    for name in plain.image_names().values():
        assert torch.equal(read_image(turned.file(name)), read_image(plain.file(name)).flip(2))
    assert turned.parent_id("images") == plain.id
    (labels,) = (Labels.load(path.parent) for path in (out / "labels").rglob("manifest.json"))
    (metrics,) = (Metrics.load(path.parent) for path in (out / "metrics").rglob("manifest.json"))
    assert labels.parent_id("images") == metrics.parent_id("images") == turned.id
    assert json.loads((out / "report" / "table.json").read_text())["rows"][0]["images"] == turned.id
    assert cli.main([*command, "--mirror.turns", "2"]) == 2
    assert "config.turns was 1, now 2" in capsys.readouterr().err

    alone = ["mirror", "--images", str(plain.path), "--turns", "1", "--out", str(tmp_path / "alone")]
    assert cli.main(alone) == 0
    assert Images.load(tmp_path / "alone").id == turned.id
    assert cli.main([]) == 0
    assert "  mirror    Turn the images left to right." in capsys.readouterr().out


def test_a_stage_that_nobody_makes_the_inputs_of_is_told(mirrored):
    with pytest.raises(ValueError, match="stage 'mirror' after 'distill': the stages are datasets, .*mirror"):
        register("mirror", "mirror_stage", "", after="distill")
    unfed = {"mirror": stages.spec("mirror")}
    with pytest.raises(
        ValueError, match=r"mirror \(mirror random\): no stage before it makes an images artifact of 'random'"
    ):
        plan_jobs(unfed, RunConfig(), [parse_entry("random")])


def test_two_processes_share_the_artifacts_and_make_the_same_as_one(tmp_path):
    first, last = TINY.index("methods"), TINY.index("teachers")
    text = TINY[:first] + 'methods = ["random:soft", "rded"]\n' + TINY[last:].replace("ipc = [1, 2]", "ipc = [1]")
    (tmp_path / "tiny.toml").write_text(text)
    together = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "fd2fast"]

    def run(command, out, *options):
        arguments = [
            sys.executable,
            *command,
            "run",
            "--config",
            str(tmp_path / "tiny.toml"),
            "--out",
            str(tmp_path / out),
        ]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        ended = subprocess.run([*arguments, *options], env=environment, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        return ended.stdout

    def made(out):
        found = {
            p.parent.relative_to(tmp_path / out).as_posix(): p.parent for p in (tmp_path / out).rglob("manifest.json")
        }
        return {name: artifacts.load(folder) for name, folder in found.items()}

    said = run(together, "two", "--relabel.seed", "7")
    assert said.count("(process 1 of the job)") >= 2  # a teacher and a set of labels
    assert said.count("== data set") == said.count("== report") == 1
    before = made("two")
    run(together, "two", "--overwrite")
    run(["-m", "fd2fast"], "one")
    two, one = made("two"), made("one")
    assert {name: artifact.id for name, artifact in two.items()} == {
        name: artifact.id for name, artifact in one.items()
    }
    changed = {name for name, artifact in two.items() if artifact.id != before[name].id}
    assert {name.split("/")[0] for name in changed} == {"labels", "metrics"}
    for artifact in two.values():
        artifact.verify()
    assert not list(tmp_path.rglob(f"{lock.OURS}*"))
