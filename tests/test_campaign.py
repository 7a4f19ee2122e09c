"""The campaign's tools, and a few seconds of each campaign; the long ones are run by hand (tests/campaign/README.md)."""

import errno
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from campaign import faults, material, mutate, power, results, states, sweep, tmpfs

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the campaign's tools know Linux")


SHORT = """
import sys
from tests.campaign import faults, inputs, kills
out = ["--out", sys.argv[1]]
kills.main([*out, "--count", "2", "--only", "patches"])
kills.main([*out, "--count", "3", "--only", "distill", "--torchrun", "0"])
faults.main([*out, "--count", "3", "--only", "patches"])
faults.main([*out, "--count", "2", "--only", "patches/small disk", "--tmpfs"])
faults.main([*out, "--every", "place", "--only", "datasets/EIO/rename"])
for kind in ("image", "TOML", "checkpoint", "arrays", "annotations"):
    inputs.main([*out, "--count", "12", "--only", kind])
"""


def test_a_few_seconds_of_each_campaign(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", SHORT, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("kills", "faults", "inputs")}
    assert [trial for one in found.values() for trial in one["faults"]] == []
    lines = (tmp_path / "faults.jsonl").read_text(encoding="utf-8").splitlines()
    renames = [trial for trial in map(json.loads, lines) if trial["group"] == "datasets, EIO"]
    assert len(renames) > 5
    assert all(trial["counts"].get("fork") and trial["state"] for trial in renames)
    assert {name: one["trials"] for name, one in found.items()} == {
        "kills": 5,
        "faults": len(renames) + (3 if tmpfs.Tmpfs(tmp_path / "disk").refused() else 5),
        "inputs": 60,
    }


def layered(code: str, folder: Path, before: str) -> subprocess.CompletedProcess[str]:
    """Python code above a layer, in an interpreter of its own."""
    script = f"""
import os, sys
from pathlib import Path
from tests.campaign import failing, layer
root = Path({str(folder)!r})
{before}
{code}
"""
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)


WRITES = """
(root / "a").mkdir()
with open(root / "a" / "safe", "wb") as file:
    file.write(b"1" * 5000)
    file.flush()
    os.fsync(file.fileno())
(root / "a" / "lost").write_bytes(b"2" * 5000)
os.replace(root / "a" / "safe", root / "renamed")
"""


def test_the_layer_sees_every_operation(tmp_path: Path) -> None:
    done = layered(WRITES, tmp_path, "layer.counter(root, root.parent / 'counted')()")
    assert done.returncode == 0, done.stderr
    kinds = [line.split()[0] for line in (tmp_path.parent / "counted").read_text().splitlines()]
    (tmp_path.parent / "counted").unlink()
    assert kinds == ["mkdir", "create", "write", "sync", "create", "write", "rename"]


def test_the_layer_fails_where_it_is_told(tmp_path: Path) -> None:
    choose = "lambda place, times, kinds: 'ENOSPC' if place.startswith('create') and times == 1 else None"
    done = layered(WRITES, tmp_path, f"failing.Failing(root, {choose}, disk=True, memory=False).install()")
    assert f"OSError: [Errno {errno.ENOSPC}]" in done.stderr
    assert (tmp_path / "a" / "safe").is_file()
    assert not (tmp_path / "renamed").exists()


def test_a_power_cut_loses_what_was_not_synced_and_no_more(tmp_path: Path) -> None:
    folder, journal = tmp_path / "disk", tmp_path / "journal"
    folder.mkdir()
    old = {str(folder / "old"): b"old"}
    synced = "os.fsync(os.open(root / 'a', os.O_RDONLY)); os.fsync(os.open(root, os.O_RDONLY))"
    (folder / "old").write_bytes(b"old")
    done = layered(WRITES + synced, folder, f"layer.Layer(root, lambda *_: None, Path({str(journal)!r})).install()")
    assert done.returncode == 0, done.stderr
    lost = set()
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for seed in range(30):
        power.cut(folder, old, set(), journal, random.Random(seed))
        assert (folder / "old").read_bytes() == b"old"
        assert (folder / "renamed").read_bytes() == b"1" * 5000
        lost.add((folder / "a" / "lost").read_bytes())
        for path, content in whole.items():
            path.write_bytes(content)
    assert {b"", b"2" * 5000, bytes(5000)} < lost
    # without the folders' syncs, names go too
    log = (journal / "log").read_text().splitlines()
    (journal / "log").write_text("\n".join(log[:-2]) + "\n")
    seen = set()
    for seed in range(60):
        power.cut(folder, old, set(), journal, random.Random(seed))
        seen.add((folder / "renamed").is_file())
        (folder / "a").mkdir(exist_ok=True)
        for path, content in whole.items():
            path.write_bytes(content)
    assert seen == {True, False}


def test_a_power_cut_does_not_undo_a_move_that_a_later_sync_brought(tmp_path: Path) -> None:
    folder, journal = tmp_path / "disk", tmp_path / "journal"
    (folder / "state").mkdir(parents=True)
    (folder / "rows").write_bytes(b"rows")
    old = {str(folder / "rows"): b"rows"}
    moves = """
os.replace(root / "rows", root / "state" / "rows")
os.replace(root / "state" / "rows", root / "rows")
os.fsync(os.open(root, os.O_RDONLY))
"""
    done = layered(moves, folder, f"layer.Layer(root, lambda *_: None, Path({str(journal)!r})).install()")
    assert done.returncode == 0, done.stderr
    for seed in range(30):
        power.cut(folder, old, {str(folder / "state")}, journal, random.Random(seed))
        assert (folder / "rows").read_bytes() == b"rows"
    # moved away and that folder synced, it is there and nowhere else, whatever became of the move back
    log = (journal / "log").read_text().splitlines()
    (journal / "log").write_text("\n".join([*log[:-2], json.dumps(["sync", str(folder / "state")])]) + "\n")
    (folder / "rows").rename(folder / "state" / "rows")
    power.cut(folder, old, {str(folder / "state")}, journal, random.Random(0))
    assert [path.name for path in folder.rglob("rows")] == ["rows"]
    assert (folder / "state" / "rows").is_file()


def test_mutations_are_repeatable_and_differ() -> None:
    made = [mutate.damaged(b"some bytes of a file" * 9, random.Random(seed)) for seed in range(200)]
    assert made == [mutate.damaged(b"some bytes of a file" * 9, random.Random(seed)) for seed in range(200)]
    assert len(set(made)) > 150
    values = [json.dumps(mutate.value({"a": [1, 2], "b": {"c": "d"}}, random.Random(seed))) for seed in range(200)]
    assert len(set(values)) > 100


def test_hostile_pickles_are_hostile(tmp_path: Path) -> None:
    """Or their refusal would prove nothing."""
    import pickle

    for way in range(5):
        canary = tmp_path / f"canary {way}"
        done = pickle.loads(pickle.dumps(mutate.Evil(canary, way)))
        if way == 2:
            done.close()
        assert canary.exists()


def test_results_go_on_where_they_stopped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[str] = []

    def trial(key: str) -> results.Trial:
        asked.append(key)
        return results.Trial(key, "even" if int(key) % 2 == 0 else "odd", {"read": 1}, "bad" if key == "3" else "")

    results.Results(tmp_path, "some").run(["0", "1"], trial)
    again = results.Results(tmp_path, "some")
    again.run([str(number) for number in range(4)], trial)
    assert asked == ["0", "1", "2", "3"]
    assert "| all | 4 | 4 | 1 |" in again.table()
    assert json.loads((tmp_path / "some.json").read_text())["faults"][0]["key"] == "3"
    assert "- `3`: bad" in (tmp_path / "some.md").read_text()


def test_faults_are_spread_over_their_kinds() -> None:
    keys = [f"distill/memory/{n}" for n in range(500)] + [f"distill/EIO/{n}" for n in range(20)] + ["report/EIO/0"]
    sites = {key: key for key in keys}
    chosen = faults.spread(sites, 11, seed=0)
    assert [sum(key.startswith(kind) for key in chosen) for kind in ("distill/memory", "distill/EIO", "report")] == [
        5,
        5,
        1,
    ]
    assert len(set(chosen)) == 11
    assert chosen == faults.spread(sites, 11, seed=0) != faults.spread(sites, 11, seed=1)


def test_each_place_in_the_code_is_met_before_one_comes_again() -> None:
    sites = {f"distill/{fault}/{n}": f"write a.py:{n % 7}" for fault in ("EIO", "ENOSPC") for n in range(500)}
    chosen = faults.spread(sites, 20, seed=0)
    assert {(key.split("/")[1], sites[key]) for key in chosen[:14]} == {
        (fault, f"write a.py:{n}") for fault in ("EIO", "ENOSPC") for n in range(7)
    }


def test_a_place_is_that_of_the_callers_in_fd2fast(tmp_path: Path) -> None:
    write = "from fd2fast.artifacts import write_bytes\nfor name in 'ab':\n    write_bytes(root / name, b'1')\n"
    done = layered(write + "write_bytes(root / 'c', b'1')", tmp_path, "layer.counter(root, root.parent / 'counted')()")
    assert done.returncode == 0, done.stderr
    lines = (tmp_path.parent / "counted").read_text().splitlines()
    (tmp_path.parent / "counted").unlink()
    size = len(lines) // 3
    assert lines[:size] == lines[size : 2 * size] == lines[2 * size :]  # the caller's own lines are not fd2fast's
    assert all(" artifacts/files.py:" in line for line in lines)
    assert len(set(lines)) == size


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[tmpfs.Tmpfs]:
    made = tmpfs.Tmpfs(tmp_path / "disk")
    if reason := made.refused():
        pytest.skip(f"no file system can be mounted here: {reason}")
    made.mount()
    yield made
    made.unmount()


def test_a_small_disk_is_full_and_has_room_again(disk: tmpfs.Tmpfs) -> None:
    (disk.folder / "a").write_bytes(bytes(9000))
    disk.leave(pages=1)
    with pytest.raises(OSError, match="No space left"):
        (disk.folder / "b").write_bytes(bytes(9000))
    disk.leave(files=0)
    with pytest.raises(OSError, match="No space left"):
        (disk.folder / "c").touch()
    disk.leave()
    (disk.folder / "c").write_bytes(bytes(9000))
    disk.mount()
    assert list(disk.folder.iterdir()) == []


def test_without_a_mount_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(command: list[str], **_: object) -> None:
        raise subprocess.CalledProcessError(1, command, stderr="mount: /disk: must be superuser to use mount.\n")

    monkeypatch.setattr(tmpfs.subprocess, "run", refuse)
    assert tmpfs.Tmpfs(tmp_path / "disk").refused() == "mount: /disk: must be superuser to use mount."


def test_a_picture_that_a_command_left_out_may_be_missing(tmp_path: Path) -> None:
    said = (
        f"the picture {tmp_path}/result/preview.png is left out, the results are not touched: UserError: no space left"
    )
    pictures = faults.left_out(f"{said}\n", tmp_path)
    assert pictures == {"result/preview.png"}
    wanted = {"result/preview.png": "1", "result/grid.png": "2", "result/manifest.json": "3", "result/a.npy": "4"}
    found = {"result/manifest.json": "5", "result/a.npy": "4"}
    told = material.difference(*(faults.but_for(pictures, one) for one in (found, wanted)))
    assert told == "missing: result/grid.png (1)"
    assert faults.but_for(faults.left_out("", tmp_path), wanted) == wanted


def test_differences_are_named() -> None:
    wanted = {"a": "1", "b": "2", "c": "3"}
    assert material.difference(dict(wanted), wanted) == ""
    assert (
        material.difference({"a": "1", "b": "x", "d": "4"}, wanted)
        == "missing: c (1); left over: d (1); other bytes: b (1)"
    )


STATES = {
    "result/a": b"1",
    f"result/.fd2fast-tmp-{'1' * 5}-abcdef12-b": b"2",
    "result/.fd2fast-lock": b'{"token": "1"}',
}


def fill(folder: Path, files: dict[str, bytes]) -> str:
    """The digest of a new folder with these files."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return states.digest(states.read(folder))


def test_states_are_equal_where_the_next_command_sees_the_same(tmp_path: Path) -> None:
    first = fill(tmp_path / "0", STATES)
    named = {name.replace("11111-abcdef12", "7-00000000"): content for name, content in STATES.items()}
    named["result/.fd2fast-lock"] = b'{"token": "2"}'
    assert fill(tmp_path / "1", named) == first
    assert fill(tmp_path / "2", STATES | {"result/seconds.json": b"1.5"}) == fill(
        tmp_path / "3", STATES | {"result/seconds.json": b"2"}
    )
    others = [
        STATES | {"result/a": b"2"},
        STATES | {"result/c": b""},
        STATES | {"result/.fd2fast-lock": b"{"},
        STATES | {"result/seconds.json": b"1."},
        {name: content for name, content in STATES.items() if "tmp" not in name},
    ]
    digests = [fill(tmp_path / f"other {number}", files) for number, files in enumerate(others)]
    assert len({first, *digests}) == 6


def test_a_folder_is_put_back_with_the_files_that_are_open(tmp_path: Path) -> None:
    root = tmp_path / "out"
    fill(root, {"a/kept": b"kept", "a/changed": b"before", "open": b"", "moved": b"moved", "gone/x": b"x"})
    (root / "link").symlink_to("moved")
    before = states.read(root)
    with open(root / "open", "wb", buffering=0) as file:
        file.write(b"12345")
        kept = states.Kept(root, tmp_path / "links")
        file.write(b"678")
        (root / "open").unlink()
        (root / "a" / "changed").write_bytes(b"longer than before")
        (root / "moved").rename(root / "elsewhere")
        (root / "moved").mkdir()
        (root / "moved" / "y").touch()
        (root / "link").unlink()
        (root / "gone" / "x").unlink()
        (root / "gone").rmdir()
        kept.put_back()
        file.write(b"!")
    kept.drop()
    after = states.read(root)
    assert (root / "open").read_bytes() == b"12345!"
    assert before.keys() == after.keys()
    files = [name for name in before if name not in ("a", "gone", "open", "link")]
    assert [after[name] for name in files] == [before[name] for name in files]
    assert after["link"].content == b"moved"


SWEPT = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tests.campaign import failing, forks, sweep
out, into = Path(sys.argv[1]), Path(sys.argv[2])
from fd2fast.artifacts import write_bytes
from fd2fast import cli

def command(arguments):
    with ThreadPoolExecutor(1) as behind:
        write_bytes(out / "first", b"1")
        job = behind.submit(write_bytes, out / "second", b"2")
        job.result()
        write_bytes(out / "third", b"3")
    print("done")
    return 0

cli.main = command
aims = []
for number in range(2):
    wanted = sweep.Wanted(["EIO"], each_time=True)
    run = sweep.Sweep(out, into / str(number), wanted, aims=aims)
    ended = forks.run([], before=run.begin)
    assert (ended.code, ended.out) == (0, "done\\n"), ended
    assert sorted(path.name for path in out.iterdir()) == ["first", "second", "third"]
    for path in out.iterdir():
        path.unlink()
    aims = [sweep.Aim(**aim) for line in sweep.results(into / str(number)) for aim in line.get("aims", ())]
"""


def test_forks_of_a_run_meet_every_fault_and_leave_it_unhurt(tmp_path: Path) -> None:
    out, into = tmp_path / "out", tmp_path / "into"
    out.mkdir()
    command = [sys.executable, "-c", SWEPT, str(out), str(into)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    runs = [list(sweep.results(into / str(number))) for number in range(2)]
    forked, aimed = ([line for line in lines if "fault" in line] for lines in runs)
    elsewhere = [aim for line in runs[0] for aim in line.get("aims", ())]
    # a fork meets each operation of this thread; the other's are left to the second run, whose forks begin ahead of them
    kinds = ["mkdir", "create", "write", "open", "sync", "rename"]
    assert [line["place"].split()[0] for line in forked] == kinds * 2
    assert [aim["place"].split()[0] for aim in elsewhere] == kinds
    threads = {(aim["place"], aim["times"]) for aim in elsewhere}
    ahead = [line for line in aimed if (line["place"], line["times"]) in threads]
    assert len(ahead) == len(kinds)
    for number, lines, before in ((0, forked[:6], []), (0, forked[6:], ["first", "second"]), (1, ahead, ["first"])):
        for line in lines:
            left = sorted(path.name for path in (into / str(number) / "states" / line["state"]).iterdir())
            if line["place"].startswith("mkdir"):  # of a folder that is there: nothing is lost
                assert (line["code"], left) == (0, ["first", "second", "third"])
            else:
                assert (line["code"], left) == (1, before)
                assert "Input/output error" in line["err"]
