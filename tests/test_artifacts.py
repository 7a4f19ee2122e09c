"""Artifacts: atomic writes, identity, resume, refusals."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from fd2fast import artifacts
from fd2fast.errors import UserError


@dataclass(frozen=True)
class Config:
    a: int = 1
    b: tuple[int, ...] = (1, 2)
    device: str = dataclasses.field(default="cpu", metadata={"result": False})


CLASSES = ["crow", "wren"]


def make(path, config=None, parents=None, *, overwrite=False, text="x", classes=CLASSES):
    stage = artifacts.open_stage(path, "thing", config or Config(), parents or {}, overwrite=overwrite)
    if stage.finished:
        return stage.finished
    artifacts.write_bytes(path / "file.txt", text.encode())
    return stage.finish(classes=classes, size=8, mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), facts={"n": np.int64(3)})


def test_finish_and_load_agree_and_verify(tmp_path):
    made = make(tmp_path / "a")
    read = artifacts.load(tmp_path / "a", "thing")
    assert read.manifest == made.manifest
    assert read.facts == {"n": 3}
    assert not (tmp_path / "a" / "state").exists()
    read.verify()
    (tmp_path / "a" / "file.txt").write_text("changed")
    with pytest.raises(UserError, match=r"file\.txt was changed"):
        read.verify()


def test_identity_depends_on_config_parents_and_bytes_not_on_runtime_fields(tmp_path):
    first = make(tmp_path / "1")
    assert make(tmp_path / "2", Config(device="cuda")).id == first.id
    assert make(tmp_path / "3", Config(a=2)).id != first.id
    assert make(tmp_path / "4", text="y").id != first.id
    assert make(tmp_path / "5", parents={"p": first}).id != first.id


def test_equal_command_finds_the_finished_result(tmp_path):
    first = make(tmp_path / "a")
    assert make(tmp_path / "a", text="never written").id == first.id
    assert (tmp_path / "a" / "file.txt").read_text() == "x"


def test_other_settings_are_refused_with_the_difference_and_overwrite_makes_anew(tmp_path):
    make(tmp_path / "a")
    with pytest.raises(UserError, match=r"config\.a was 1, now 2"):
        make(tmp_path / "a", Config(a=2))
    assert make(tmp_path / "a", Config(a=2), overwrite=True).config["a"] == 2


def test_other_parent_is_refused(tmp_path):
    one, two = make(tmp_path / "1"), make(tmp_path / "2", text="y")
    make(tmp_path / "a", parents={"dataset": one})
    with pytest.raises(UserError, match=r"parents\.dataset\.id"):
        make(tmp_path / "a", parents={"dataset": two})


def test_foreign_folder_is_refused_and_never_removed(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "mine.jpg").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="holds other files"):
            make(tmp_path / "photos", overwrite=overwrite)
    assert (tmp_path / "photos" / "mine.jpg").read_text() == "precious"
    with pytest.raises(UserError, match="is a file"):
        make(tmp_path / "photos" / "mine.jpg")


def test_unfinished_missing_foreign_and_wrong_kind_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        artifacts.load(tmp_path / "nothing", "thing")
    artifacts.open_stage(tmp_path / "half", "thing", Config(), {})
    with pytest.raises(UserError, match="unfinished"):
        artifacts.load(tmp_path / "half", "thing")
    make(tmp_path / "a")
    with pytest.raises(UserError, match="holds a thing artifact; wanted a teacher"):
        artifacts.load(tmp_path / "a", "teacher")
    (tmp_path / "a" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="is not a manifest"):
        artifacts.load(tmp_path / "a")
    (tmp_path / "a" / "manifest.json").write_text(json.dumps({"schema": 99, "kind": "thing"}))
    with pytest.raises(UserError, match="version 99"):
        artifacts.load(tmp_path / "a")


def test_checkpoint_restores_tensors_and_refuses_pickles(tmp_path):
    import pickle

    import torch

    stage = artifacts.open_stage(tmp_path / "a", "thing", Config(), {})
    assert stage.restore("epoch.pt") is None
    stage.checkpoint("epoch.pt", {"x": torch.arange(3), "epoch": 2})
    again = artifacts.open_stage(tmp_path / "a", "thing", Config(), {})
    assert again.restore("epoch.pt")["epoch"] == 2

    class Evil:
        def __reduce__(self):
            return (os.system, ("touch owned",))

    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(UserError, match=r"evil\.pt is not a file of tensors"):
        artifacts.read_torch(tmp_path / "evil.pt")
    assert not os.path.exists("owned")


def test_must_fit_names_the_first_difference(tmp_path):
    a = make(tmp_path / "a")
    b = make(tmp_path / "b", classes=["crow", "robin"])
    with pytest.raises(UserError, match=r"classes differ at index 1: 'wren' against 'robin'"):
        a.must_fit(b)
    c = make(tmp_path / "c", classes=["crow"])
    with pytest.raises(UserError, match="2 against 1 entries"):
        a.must_fit(c)
    a.must_fit(make(tmp_path / "d", text="other file"))


def fail_in_the_middle(path, error):
    with artifacts.atomic_path(path) as temporary:
        temporary.write_bytes(b"half")
        raise error


def test_atomic_path_keeps_the_old_file_when_the_write_fails(tmp_path):
    target = tmp_path / "f"
    artifacts.write_bytes(target, b"old")
    with pytest.raises(RuntimeError):
        fail_in_the_middle(target, RuntimeError())
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_full_disk_is_named_with_the_space_left(tmp_path):
    with pytest.raises(UserError, match=r"no space left while writing .*f \(.* MB free there\)"):
        fail_in_the_middle(tmp_path / "f", OSError(errno.ENOSPC, "No space left on device"))
    assert list(tmp_path.iterdir()) == []


def test_a_write_the_system_really_refuses_leaves_nothing(tmp_path):
    code = (
        "import resource, signal, pathlib, numpy as np\n"
        "from fd2fast import artifacts\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        f"artifacts.write_npy(pathlib.Path({str(tmp_path / 'big.npy')!r}), np.zeros(100_000))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "the file is too large for a limit" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_folder_below_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        artifacts.write_bytes(tmp_path / "file" / "x", b"data")


def test_kill_in_the_middle_of_a_write_leaves_the_old_file_and_is_cleaned(tmp_path):
    make(tmp_path / "a", text="old")
    (tmp_path / "a" / "manifest.json").unlink()
    artifacts.write_json(
        tmp_path / "a" / "state" / "begun.json",
        {"kind": "thing", "config": artifacts.config_dict(Config()), "parents": {}},
    )
    code = (
        "import os, signal, pathlib\n"
        "from fd2fast import artifacts\n"
        f"with artifacts.atomic_path(pathlib.Path({str(tmp_path / 'a' / 'file.txt')!r})) as t:\n"
        "    t.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert (tmp_path / "a" / "file.txt").read_text() == "old"
    assert len(list((tmp_path / "a").glob(".fd2fast-tmp-*"))) == 1
    made = make(tmp_path / "a", text="new")
    assert sorted(made.manifest["files"]) == ["file.txt"]
    assert not list((tmp_path / "a").glob(".fd2fast-tmp-*"))


@pytest.mark.parametrize(
    "array", [np.arange(6).reshape(2, 3).T, np.zeros((0, 3), np.float16), np.array(3.0), np.array([True, False])]
)
def test_arrays_come_back_as_they_were(tmp_path, array):
    artifacts.write_npy(tmp_path / "a.npy", array)
    read = np.load(tmp_path / "a.npy", allow_pickle=False)
    assert read.dtype == array.dtype
    assert read.shape == array.shape
    np.testing.assert_array_equal(read, array)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"classes": None}, "classes must be a list, each a text, got None"),
        ({"classes": [1, 2]}, r"classes must be a list, each a text, got \[1, 2\]"),
        ({"size": "8"}, "size must be a whole number, got '8'"),
        ({"mean": [0.5, "x", 1]}, "mean must be a list, each a finite number, got"),
        ({"std": [float("nan")]}, r"std must be a list, each a finite number, got \[nan\]"),
        ({"files": {"../../etc/passwd": "x"}}, "leads out of the folder"),
        ({"files": {"/etc/passwd": "x"}}, "leads out of the folder"),
        ({"files": ["a"]}, "files must be a table, each value a text, got"),
        ({"parents": {"dataset": "x"}}, "parents must be a table, each value a table"),
        ({"parents": {"dataset": {"kind": "dataset"}}}, "parents have no ids"),
        ({"id": 3}, "id must be a text, got 3"),
        ({"measured": {"seconds": "long"}}, "measured.seconds must be a finite number, got 'long'"),
        ({"id": "0" * 64}, "its id is not that of what it says"),
        ({"facts": {"train": 10**9}}, "its id is not that of what it says"),
        ({"size": 65}, "its id is not that of what it says"),
        ({"classes": ["b", "a"]}, "its id is not that of what it says"),
        ({"mean": [0.5, 0.5, 0.25]}, "its id is not that of what it says"),
        ({"parents": {"dataset": {"kind": "dataset", "id": "another"}}}, "its id is not that of what it says"),
    ],
)
def test_a_manifest_that_was_changed_by_hand_is_refused(tmp_path, change, told):
    manifest = make(tmp_path / "a").manifest
    (tmp_path / "a" / "manifest.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(UserError, match=told):
        artifacts.load(tmp_path / "a", "thing")
    gone = {key: value for key, value in manifest.items() if key != next(iter(change))}
    (tmp_path / "a" / "manifest.json").write_text(json.dumps(gone))
    with pytest.raises(UserError, match="is missing"):
        artifacts.load(tmp_path / "a", "thing")


KINDS = [
    artifacts.Dataset,
    artifacts.TeacherArtifact,
    artifacts.Patches,
    artifacts.Images,
    artifacts.Labels,
    artifacts.Metrics,
]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.KIND)
def test_a_result_is_read_as_one_of_its_kind(tmp_path, kind):
    stage = artifacts.open_stage(tmp_path / "a", kind, Config(), {})
    made = stage.finish(
        classes=["x"], size=8, mean=(0, 0, 0), std=(1, 1, 1), facts={"train": 3, "ipc": 2, "model": "m"}
    )
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["kind"] == kind.KIND
    for read in (made, artifacts.load(tmp_path / "a"), kind.load(tmp_path / "a"), artifacts.load(tmp_path / "a", kind)):
        assert type(read) is kind
        assert read.facts == {"train": 3, "ipc": 2, "model": "m"}
    other = next(one for one in KINDS if one is not kind)
    with pytest.raises(UserError, match=f"holds a {kind.KIND} artifact; wanted a {other.KIND}"):
        other.load(tmp_path / "a")
    with pytest.raises(UserError, match=f"holds a {kind.KIND} artifact; wanted {other.NOUN}"):
        other.of(made)
    plain = artifacts.Artifact(made.path, made.manifest)
    assert type(kind.of(plain)) is kind


def test_facts_are_recorded_as_they_were_by_earlier_versions():
    facts = {"name": "n", "train": 3, "test": 2, "per_class": {}, "skipped": [], "converted": {}, "statistics": {}}
    assert artifacts.DatasetFacts(**facts) == facts  # no fonts
    assert dict(artifacts.DatasetFacts(**facts, fonts={"a": "b"})) == facts | {"fonts": {"a": "b"}}
    given = {"model": "m", "attention_maps": 2, "alpha": 0.5, "channels": 8, "notices": []}
    imported = artifacts.TeacherFacts(**given, backbone_accuracy=1.5)
    assert imported == given | {"backbone_accuracy": 1.5, "cal_accuracy": None}
    trained = {"epoch": 1, "head_trained": True, "weights": None, "weights_sha256": None}
    assert artifacts.TrainedTeacherFacts(**given, **trained) == given | trained | {
        "backbone_accuracy": None,
        "cal_accuracy": None,
    }


def test_a_fact_that_a_manifest_lacks_is_named(tmp_path):
    stage = artifacts.open_stage(tmp_path / "a", artifacts.Images, Config(), {})
    made = stage.finish(classes=["x"], size=8, mean=(0, 0, 0), std=(1, 1, 1), facts={"ipc": 2})
    assert (made.facts.ipc, made.facts.semantics) == (2, "paper")
    with pytest.raises(UserError, match=r"the manifest of images .*/a does not say its method: make it again"):
        made.facts.method  # noqa: B018
    with pytest.raises(AttributeError):
        made.facts.methods  # noqa: B018


def test_a_result_made_from_another_data_set_is_refused(tmp_path):
    look = {"classes": ["x"], "size": 8, "mean": (0, 0, 0), "std": (1, 1, 1)}
    one = artifacts.open_stage(tmp_path / "1", artifacts.Dataset, Config(), {}).finish(**look)
    other = artifacts.open_stage(tmp_path / "2", artifacts.Dataset, Config("y"), {}).finish(**look)
    made = artifacts.open_stage(tmp_path / "t", artifacts.TeacherArtifact, Config(), {"dataset": one}).finish_like(one)
    made.must_be_of(one)
    with pytest.raises(
        UserError, match=f"made from another data set \\({one.id[:12]}\\) than .*2 \\({other.id[:12]}\\)"
    ):
        made.must_be_of(other)
    free = artifacts.open_stage(tmp_path / "f", artifacts.TeacherArtifact, Config(), {}).finish_like(one)
    free.must_be_of(other)  # it does not say what it was made from
