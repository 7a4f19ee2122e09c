"""Sources: stamps and hashes of files, places however they are written, results compared with what they were made from."""

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from fd2fast import artifacts
from fd2fast.errors import UserError
from fd2fast.system import lock, sources
from fd2fast.system.sources import Seen, Source, few, file_digest, known_digest, look, of_file, same_place, stamp


@dataclass(frozen=True)
class Config:
    a: int = 1
    film: str | None = dataclasses.field(default=None, metadata={"place": True})


def make(out: Path, source: Source | None = None, *, a: int = 1, overwrite: bool = False, unfinished: bool = False):
    config = Config(a, None if source is None else source.place)
    given = {} if source is None else {"film": source}
    stage = artifacts.open_stage(out, "thing", config, {}, sources=given, overwrite=overwrite)
    if stage.finished or unfinished:
        return stage.finished
    artifacts.write_bytes(out / "file.npy", b"x")
    return stage.finish(classes=["crow"], size=8, mean=(0.5,) * 3, std=(0.2,) * 3)


def test_the_place_is_recorded_and_the_content_decides(tmp_path):
    made = make(tmp_path / "1", Source(str(tmp_path / "film"), "d1"))
    assert made.manifest["places"] == {"film": str(tmp_path / "film")}
    assert made.manifest["inputs"] == {"film": "d1"}
    assert "film" not in made.config
    assert make(tmp_path / "2", Source("hub", "d1")).id == made.id
    assert make(tmp_path / "3", Source(str(tmp_path / "film"), "d2")).id != made.id
    for place in ("film", "/nowhere/else", "hub", ""):
        assert make(tmp_path / "1", Source(place, "d1")).id == made.id


def test_no_source_leaves_the_manifest_as_it_was(tmp_path):
    made = make(tmp_path / "1")
    assert not {"inputs", "places"} & set(made.manifest)
    assert made.config == {"a": 1, "film": None}


@pytest.mark.parametrize("unfinished", [False, True])
def test_other_content_is_refused_and_overwrite_makes_anew(tmp_path, unfinished):
    film = str(tmp_path / "film")
    make(tmp_path / "1", Source(film, "d1"), unfinished=unfinished)
    for other, told in (
        (Source(film, "d2"), f"film {film}: its content is not what it was; put that back, choose"),
        (Source(film, "d2", changes="2 removed (a, b)"), f"film {film}: 2 removed"),
        (Source("/b", "d2"), f"film /b: its content is not what it was in {film}"),
        (None, f"film was {film}, now none"),
    ):
        with pytest.raises(UserError, match="that was made from something else") as caught:
            make(tmp_path / "1", other)
        assert told in str(caught.value)
    with pytest.raises(UserError, match=r"config\.a was 1, now 2"):
        make(tmp_path / "1", Source(film, "d2"), a=2)
    assert make(tmp_path / "1", Source(film, "d2"), overwrite=True).manifest["inputs"] == {"film": "d2"}
    made = make(tmp_path / "2")
    with pytest.raises(UserError, match="film was none, now /b"):
        make(tmp_path / "2", Source("/b", "d1"))
    assert make(tmp_path / "2").id == made.id


def test_what_is_gone_costs_no_finished_result(tmp_path, caplog):
    film = str(tmp_path / "film")
    gone = Source(film, None, gone="film is not there")
    made = make(tmp_path / "1", Source(film, "d1"))
    assert make(tmp_path / "1", gone).id == made.id
    assert "film is not there" in caplog.text
    with pytest.raises(UserError, match="film is not there"):
        make(tmp_path / "1", dataclasses.replace(gone, place="/other"))
    with pytest.raises(UserError, match="film is not there"):
        make(tmp_path / "1", gone, overwrite=True)
    assert artifacts.load(tmp_path / "1").id == made.id
    make(tmp_path / "2", Source(film, "d1"), unfinished=True)
    for out in ("2", "3"):
        with pytest.raises(UserError, match="film is not there"):
            make(tmp_path / out, gone)
    assert not (tmp_path / "3").exists()


def test_unfinished_work_goes_on_with_changed_content_where_it_may(tmp_path, caplog):
    make(tmp_path / "1", Source("/film", "d1"), unfinished=True)
    made = make(tmp_path / "1", Source("/film", "d2", changes="1 added (x)", resumes=True))
    assert made.manifest["inputs"] == {"film": "d2"}
    assert "film /film has changed: 1 added (x)" in caplog.text
    assert made.id == make(tmp_path / "2", Source("/film", "d2")).id
    with pytest.raises(UserError, match="its content"):
        make(tmp_path / "1", Source("/film", "d3", resumes=True))
    caplog.clear()
    assert make(tmp_path / "1", Source("/film", "d3", survives=True)).id == made.id
    assert "stays as it is" in caplog.text


def older(out: Path, place: str | None, facts: dict | None = None) -> None:
    """The manifest or the beginning as earlier versions wrote it."""
    for path in (out / artifacts.MANIFEST, out / "state" / "begun.json"):
        if path.is_file():
            found = json.loads(path.read_text())
            found.pop("inputs", None)
            found.pop("places", None)
            found["config"]["film"] = place
            found |= {"facts": facts} if facts else {}
            if "id" in found:
                found["id"] = artifacts.identity_digest(found)
            path.write_text(json.dumps(found))


@pytest.mark.parametrize("unfinished", [False, True])
def test_results_of_earlier_versions_are_taken_from_the_same_place(tmp_path, caplog, monkeypatch, unfinished):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "1", Source("film", "d1"), unfinished=unfinished)
    older(tmp_path / "1", "film")
    make(tmp_path / "1", Source(str(tmp_path / "film"), "d2"), unfinished=True)
    assert "did not record its content" in caplog.text
    older(tmp_path / "1", "film")
    with pytest.raises(UserError, match="film was film, now /other"):
        make(tmp_path / "1", Source("/other", "d1"))
    with pytest.raises(UserError, match="film was film, now none"):
        make(tmp_path / "1")
    older(tmp_path / "1", None)
    assert (make(tmp_path / "1", unfinished=True) is None) == unfinished


def test_a_hash_among_the_facts_of_earlier_versions_counts(tmp_path, caplog):
    make(tmp_path / "1", Source("/film", "d1"))
    older(tmp_path / "1", "/film", {"film_sha256": "d1"})
    before = artifacts.load(tmp_path / "1").manifest
    assert make(tmp_path / "1", Source("/moved", "d1")).manifest == before
    assert caplog.text == ""
    with pytest.raises(UserError, match="its content is not what it was"):
        make(tmp_path / "1", Source("/film", "d2"))


@pytest.mark.parametrize(
    "content", ["[]", '{"kind": "thing"}', '{"kind": "thing", "config": 3, "parents": {}}', "{", '"x"', "null"]
)
def test_a_damaged_manifest_is_named(tmp_path, content):
    make(tmp_path / "1")
    (tmp_path / "1" / artifacts.MANIFEST).write_text(content)
    with pytest.raises(UserError, match=r"manifest\.json"):
        make(tmp_path / "1", Source("/film", "d1"))


def test_places_are_one_however_they_are_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for one in ("real", "./real/", "link", "~/real", "real/../real", str(tmp_path / "link" / ".")):
        assert same_place(one, str(tmp_path / "real")), one
    assert not same_place("real", "link2")
    assert not same_place("hub", str(tmp_path / "hub"))
    assert same_place("hub", "hub")


def test_every_way_to_change_a_file_moves_its_stamp(tmp_path):
    path = tmp_path / "f"

    def replaced() -> None:
        (tmp_path / "g").write_bytes(b"three")
        os.utime(tmp_path / "g", ns=(before[1], before[1]))
        os.replace(tmp_path / "g", path)

    def copied_with_its_time() -> None:
        path.write_bytes(b"other")
        os.utime(path, ns=(before[1], before[1]))

    for change in (
        lambda: path.write_bytes(b"three"),
        lambda: path.write_bytes(b"longer"),
        lambda: os.utime(path, (1, 1)),
        replaced,
        copied_with_its_time,
    ):
        path.write_bytes(b"12345")
        os.utime(path, (1_000_000, 1_000_000))
        before = stamp(path)
        assert before == stamp(path)
        deadline = 100_000
        while True:  # the clock of the file system has ticks of some milliseconds
            (tmp_path / "clock").write_bytes(b"")
            if os.stat(tmp_path / "clock").st_ctime_ns != before[2] or not (deadline := deadline - 1):
                break
        change()
        assert stamp(path) != before
    assert stamp(tmp_path) is None
    assert stamp(tmp_path / "none") is None
    assert stamp(Path("a\0b")) is None


def test_look_takes_known_hashes_and_reads_the_rest(tmp_path, monkeypatch):
    for n in range(5):
        (tmp_path / f"{n}").write_bytes(bytes([n]))
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    files = [tmp_path / name for name in ("0", "1", "2", "pipe", "loop", "none", "3", "4")]
    monkeypatch.setattr(sources, "_CHUNK", 3)
    counts: list[int] = []
    seen = look(files, [None] * 8, counts.append)
    assert [one.sha256 for one in seen[:3]] == [file_digest(path) for path in files[:3]]
    assert seen[3:6] == [Seen("", None, False)] * 3
    assert counts == [3, 3, 2]
    assert not any(one.settled for one in seen)
    monkeypatch.setattr(sources, "SETTLED", -(10**15))
    moved = (seen[1].stamp[0] + 1, *seen[1].stamp[1:])
    again = look(files[:2], [(seen[0].stamp, "known"), (moved, "known")])
    assert [one.sha256 for one in again] == ["known", seen[1].sha256]
    assert all(one.settled for one in again)


def test_a_settled_file_is_hashed_once_by_a_process(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SETTLED", -(10**15))
    (tmp_path / "f").write_bytes(b"content")
    first = known_digest(tmp_path / "f")
    with monkeypatch.context() as patch:
        patch.setattr(sources, "file_digest", lambda path: "read again")
        assert known_digest(tmp_path / "f") == first
        (tmp_path / "f").write_bytes(b"longer content")
        assert known_digest(tmp_path / "f") == "read again"
    monkeypatch.setattr(sources, "SETTLED", 10**15)
    (tmp_path / "g").write_bytes(b"content")
    assert known_digest(tmp_path / "g") == first
    with monkeypatch.context() as patch:
        patch.setattr(sources, "file_digest", lambda path: "read again")
        assert known_digest(tmp_path / "g") == "read again"
    with pytest.raises(OSError, match="none"):
        known_digest(tmp_path / "none")


def test_of_file(tmp_path):
    (tmp_path / "f").write_bytes(b"content")
    assert of_file(str(tmp_path / "f"), "missing").digest == file_digest(tmp_path / "f")
    for place in (str(tmp_path / "none"), str(tmp_path), "a\0b", ""):
        found = of_file(place, "missing")
        assert found.digest is None
        assert found.gone


def test_few_names_and_the_count():
    assert few([], "removed") == ""
    assert few(["a"], "removed") == "1 removed (a)"
    assert few((n for n in "abcdefg"), "added") == "7 added (a, b, c, ...)"


# parents are read, too


def child(out: Path, parent: artifacts.Artifact):
    stage = artifacts.open_stage(out, "child", Config(), {"film": parent})
    return stage.finished or stage.finish(classes=["crow"], size=8, mean=(0.5,) * 3, std=(0.2,) * 3)


@pytest.fixture
def parent(tmp_path) -> artifacts.Artifact:
    stage = artifacts.open_stage(tmp_path / "parent", "film", Config(), {})
    for name in ("rows.npy", "images/new000/class000_id000.png", "grid.png", "curves.json", "teacher.safetensors"):
        artifacts.write_bytes(stage.path / name, name.encode())
    return stage.finish(classes=["crow"], size=8, mean=(0.5,) * 3, std=(0.2,) * 3)


@pytest.mark.parametrize("name", ["rows.npy", "images/new000/class000_id000.png", "teacher.safetensors"])
@pytest.mark.parametrize("finished", [False, True])
def test_a_file_changed_in_a_parent_is_named_by_its_readers(tmp_path, parent, name, finished):
    if finished:
        child(tmp_path / "child", parent)
    path = parent.path / name
    before = path.read_bytes()
    path.write_bytes(before[::-1])
    with pytest.raises(UserError, match=f"{path.name} was changed after it was made .* or make the film again"):
        child(tmp_path / "child", parent)
    path.write_bytes(before)
    assert child(tmp_path / "child", parent).manifest["parents"]["film"]["id"] == parent.id


def test_pictures_for_people_and_missing_files_stop_no_reader(tmp_path, parent):
    for name in ("grid.png", "curves.json"):
        (parent.path / name).write_bytes(b"drawn over")
    (parent.path / "images/new000/class000_id000.png").unlink()
    made = child(tmp_path / "child", parent)
    parent.path.rename(tmp_path / "moved")
    assert child(tmp_path / "child", artifacts.load(tmp_path / "moved")).id == made.id


def test_a_parent_made_anew_is_told(tmp_path, parent):
    child(tmp_path / "child", parent)
    (parent.path / "rows.npy").write_bytes(b"other rows")
    manifest = json.loads((parent.path / "manifest.json").read_text())
    manifest["files"]["rows.npy"] = file_digest(parent.path / "rows.npy")
    anew = artifacts.Artifact(parent.path, manifest | {"id": "another"})
    with pytest.raises(UserError, match=r"parents\.film\.id was .*, now 'another' .*made anew since"):
        child(tmp_path / "child", anew)


def test_warnings_come_once_for_all_processes_of_a_job(tmp_path, caplog, monkeypatch):
    make(tmp_path / "1", Source("/film", "d1"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, count in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        make(tmp_path / "1", Source("/film", None, gone="not there"))
        assert caplog.text.count("not there") == count
    monkeypatch.setenv("RANK", "1")
    with lock.by_itself():  # nobody else would say it
        make(tmp_path / "1", Source("/film", None, gone="not there"))
    assert caplog.text.count("not there") == 2
