"""The walk: each real file once, links that lead back, junk and special files counted, faults named, always the same order."""

import errno
import os
import socket
from pathlib import Path

import pytest

from fd2fast.data import walk as module
from fd2fast.data.walk import LeftOut, class_folders, is_junk, order, walk
from fd2fast.errors import UserError


def put(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(os.fsencode(name))
    return folder


@pytest.fixture
def birds(tmp_path: Path) -> Path:
    """A class folder of five files, two of them in a folder of its own."""
    return put(tmp_path / "set" / "train" / "bird", "a.jpg", "b.jpg", "c.jpg", "more/d.jpg", "more/e.jpg")


FIVE = ["a.jpg", "b.jpg", "c.jpg", "more/d.jpg", "more/e.jpg"]


def names(folder: Path, **options) -> list[str]:
    return [str(p.relative_to(folder)) for p in walk(folder, **options).files]


def refuse(monkeypatch: pytest.MonkeyPatch, folder: Path, code: int) -> None:
    """Listing `folder` fails with an error number, whoever asks."""
    scandir = os.scandir

    def failing(path):
        if os.fspath(path) == str(folder):
            raise OSError(code, os.strerror(code), str(folder))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)


@pytest.mark.parametrize("target", [".", "..", "../..", "../../..", "more/..", "/", "{class}", "{root}"])
def test_links_that_lead_back_are_counted_and_not_followed(birds: Path, target: str) -> None:
    root = birds.parents[1]
    (birds / "back").symlink_to(target.format(**{"class": birds, "root": root}))
    (birds / "more" / "up").symlink_to("..")
    found = walk(birds, root=root)
    assert [str(p.relative_to(birds)) for p in found.files] == FIVE
    assert found.left_out.counts == {"leads_back": 2}
    assert not found.faults
    assert not found.dangling


def test_a_link_to_a_parent_of_the_set_is_found_from_a_linked_class_too(tmp_path: Path, birds: Path) -> None:
    store = put(tmp_path / "store" / "owls", "x.jpg", "deep/y.jpg")
    (store / "deep" / "all").symlink_to(tmp_path / "store")
    (store / "home").symlink_to(tmp_path)
    (birds.parent / "owl").symlink_to(store)
    found = walk(birds.parent / "owl", root=birds.parents[1])
    assert [p.name for p in found.files] == ["y.jpg", "x.jpg"]
    assert found.left_out.counts == {"leads_back": 2}


@pytest.mark.parametrize(
    ("links", "kept", "again"),
    [
        ({"z.jpg": "a.jpg"}, [], 1),
        ({"0.jpg": "a.jpg", "1.jpg": "0.jpg"}, [], 2),
        ({"more/again": "../more"}, [], 0),
        ({"a-more": "more"}, [], 1),
        ({"outside.jpg": "{else}/o.jpg"}, ["outside.jpg"], 0),
        ({"o1.jpg": "{else}/o.jpg", "o2.jpg": "{else}/o.jpg"}, ["o1.jpg"], 1),
        ({"others": "{else}", "o.jpg": "{else}/o.jpg"}, ["others/o.jpg", "others/p/q.jpg", "others/p/r.jpg"], 1),
        ({"x1": "{else}/p", "x2": "{else}"}, ["x1/q.jpg", "x1/r.jpg", "x2/o.jpg"], 1),
    ],
)
def test_each_real_file_once_whatever_links_to_it(tmp_path: Path, birds: Path, links, kept, again: int) -> None:
    other = put(tmp_path / "else", "o.jpg", "p/q.jpg", "p/r.jpg")
    for link, target in links.items():
        (birds / link).symlink_to(target.format(**{"else": other}))
    found = walk(birds, root=birds.parents[1])
    got = [str(p.relative_to(birds)) for p in found.files]
    assert got == sorted([*FIVE, *kept], key=order)
    assert found.left_out.counts.get("again", 0) == again


def test_hard_links_are_one_file_in_a_class_and_two_entries_in_two_classes(birds: Path) -> None:
    os.link(birds / "a.jpg", birds / "more" / "same.jpg")
    owl = put(birds.parent / "owl", "1.jpg")
    os.link(birds / "a.jpg", owl / "2.jpg")
    assert names(birds) == FIVE
    assert walk(birds).left_out.say(birds) == "1 further link to what is listed already (more/same.jpg)"
    assert names(owl) == ["1.jpg", "2.jpg"]


def test_equal_inode_numbers_alone_do_not_make_one_file(birds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (birds / "z.jpg").symlink_to("a.jpg")
    stat = os.stat

    def same(path, *args, **options):
        values = list(stat(path, *args, **options))
        if str(path).endswith(".jpg"):
            values[1] = 7
        return os.stat_result(values)

    monkeypatch.setattr(os, "stat", same)
    found = walk(birds)
    assert [str(p.relative_to(birds)) for p in found.files] == FIVE
    assert found.left_out.counts == {"again": 1}


def test_the_order_is_by_bytes_whatever_order_the_file_system_has(birds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(birds, "B.jpg", "é.jpg", "\U0001f426.jpg", "more.jpg", "more-/f.jpg", "more/d.jpg.png")
    (birds / "link").symlink_to("more-")
    (birds / "kink").symlink_to("more-")
    first = walk(birds)
    scandir = os.scandir

    class Backwards:
        def __init__(self, path):
            with scandir(path) as entries:
                self.entries = sorted(entries, key=lambda e: e.name, reverse=True)

        def __enter__(self):
            return iter(self.entries)

        def __exit__(self, *exc) -> None:
            pass

    monkeypatch.setattr(os, "scandir", Backwards)
    assert walk(birds) == first
    assert first.files == sorted(first.files)  # for names in UTF-8 the order of paths
    assert [p.name for p in first.files[-3:]] == ["more.jpg", "é.jpg", "\U0001f426.jpg"]


def test_names_that_are_not_utf8_are_listed(birds: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    try:
        put(birds, name)
    except OSError:
        pytest.skip("this file system takes no such name")
    assert names(birds) == ["a.jpg", "b.jpg", "c.jpg", name, "more/d.jpg", "more/e.jpg"]


@pytest.mark.parametrize("ends", ["gone.jpg", "/nowhere/at/all", "a.jpg/inside", "circle"])
def test_links_without_a_target_are_named_with_it(birds: Path, ends: str) -> None:
    (birds / "circle").symlink_to(ends)
    found = walk(birds)
    assert [str(p.relative_to(birds)) for p in found.files] == FIVE
    ((path, text),) = found.dangling
    assert path == birds / "circle"
    assert f"circle: a link to {ends}, which " in text
    assert ("leads back to itself" if ends == "circle" else "does not exist") in text


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG, errno.ENOENT])
def test_a_folder_that_cannot_be_listed_is_a_fault(birds: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    refuse(monkeypatch, birds / "more", code)
    found = walk(birds)
    assert [p.name for p in found.files] == ["a.jpg", "b.jpg", "c.jpg"]
    ((path, text),) = found.faults
    assert path == birds / "more"
    assert ("too long" if code == errno.ENAMETOOLONG else os.strerror(code)) in text


def test_a_listing_that_breaks_off_is_a_fault(birds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    class Breaks:
        def __init__(self, path):
            self.path, self.entries = path, scandir(path)

        def __enter__(self):
            def some():
                yield next(self.entries)
                raise OSError(errno.EIO, os.strerror(errno.EIO))

            return some() if str(self.path).endswith("more") else self.entries

        def __exit__(self, *exc) -> None:
            self.entries.close()

    monkeypatch.setattr(os, "scandir", Breaks)
    found = walk(birds)
    assert [p.name for p in found.files] == ["a.jpg", "b.jpg", "c.jpg"]
    assert [text for _, text in found.faults] == [f"{birds / 'more'}: {os.strerror(errno.EIO)}"]


def test_an_entry_that_cannot_be_asked_is_a_fault(birds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (birds / "far.jpg").symlink_to("/")
    stat = os.stat

    def failing(path, *args, **options):
        if str(path).endswith("far.jpg"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", failing)
    found = walk(birds)
    assert [str(p.relative_to(birds)) for p in found.files] == FIVE
    assert found.faults == [(birds / "far.jpg", f"{birds / 'far.jpg'}: {os.strerror(errno.EACCES)}")]


JUNK = (
    *(
        "@eaDir",
        "@EADIR",
        "#recycle",
        "#snapshot",
        "@Recycle",
        "@Recently-Snapshot",
        ".@__thumb",
        "@__thumb",
        "@tmp",
        "~snapshot",
    ),
    *("__MACOSX", "._photo.jpg", ".DS_Store", ".AppleDouble", ".Spotlight-V100", "Icon\r", "Network Trash Folder"),
    *("Thumbs.db", "thumbs.DB", "ehthumbs.db", "Desktop.ini", "$RECYCLE.BIN", "System Volume Information", "found.000"),
    *("lost+found", ".Trash-1000", ".thumbnails", ".nfs000000000084a1", ".fuse_hidden0000", ".smbdeleteAAA1"),
    *(".ipynb_checkpoints", ".git", ".picasaoriginals", "Picasa.ini", "sync.ffs_db", "_gsdata_", ".stversions"),
    *(
        "a.jpg:Zone.Identifier",
        "a.jpg@SynoEAStream",
        "SYNOPHOTO_THUMB_XL.jpg",
        "a.jpg:com.dropbox.attributes",
        "~$list.docx",
        "@SynologyDriveShareSync",
        "PaxHeaders.123",
        "@LongLink",
        "__pycache__",
    ),
)
FINE = (
    *(
        "eaDir",
        "recycle",
        "recycled",
        "snapshot",
        "trash",
        "Thumbs",
        "thumbs.jpg",
        "found.jpg",
        "lost and found.jpg",
        "icon.jpg",
    ),
    *(
        "@bird",
        "#1 bird",
        "$100",
        "_macosx",
        "git",
        "desktop.png",
        "~bird.jpg",
        "nfs0001.jpg",
        "synopsis.jpg",
        "com.jpg",
    ),
)


def test_known_junk_is_left_out_and_nothing_else() -> None:
    assert [name for name in JUNK if not is_junk(name)] == []
    assert [name for name in FINE if is_junk(name)] == []


@pytest.mark.parametrize("name", JUNK)
def test_junk_is_counted_as_file_and_as_folder_and_never_entered(birds: Path, name: str, monkeypatch) -> None:
    put(birds, name)
    put(birds / "more" / name, "thumb.jpg", "deep/er.jpg")
    refuse(monkeypatch, birds / "more" / name, errno.EACCES)
    found = walk(birds)
    assert [str(p.relative_to(birds)) for p in found.files] == FIVE
    assert found.left_out.counts == {"junk": 2}
    assert not found.faults


def test_hidden_entries_are_left_out_unless_asked_for(birds: Path) -> None:
    put(birds, ".secret.jpg", ".cache/f.jpg", ".git/g.jpg")
    assert names(birds) == FIVE
    assert walk(birds).left_out.counts == {"hidden": 2, "junk": 1}
    assert names(birds, hidden=True) == [".cache/f.jpg", ".secret.jpg", *FIVE]
    assert names(birds, wanted=lambda name: name.startswith("d")) == ["more/d.jpg"]


def test_pipes_sockets_and_devices_are_counted_and_not_opened(birds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(birds / "pipe.jpg")
    (birds / "more" / "null.jpg").symlink_to(os.devnull)
    (birds / "linked.jpg").symlink_to("pipe.jpg")
    monkeypatch.chdir(birds)  # a socket's path may have about a hundred characters
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket.jpg")
        found = walk(birds)
    assert [str(p.relative_to(birds)) for p in found.files] == FIVE
    assert found.left_out.counts == {"special": 4}


def test_depth_and_number_of_entries_have_an_end(birds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DEPTH", 3)
    put(birds, "1/2/3/ok.jpg", "1/2/3/4/5/no.jpg")
    found = walk(birds)
    assert "1/2/3/ok.jpg" in [str(p.relative_to(birds)) for p in found.files]
    assert found.faults == [(birds / "1/2/3/4", f"{birds / '1/2/3/4'}: lies more than 3 folders deep")]
    monkeypatch.setattr(module, "MAX_ENTRIES", 6)
    with pytest.raises(UserError, match=r"bird holds more than 6 entries .*link"):
        walk(birds)


def test_links_that_branch_without_end_end(tmp_path: Path) -> None:
    """Twenty folders that each hold links to all of them: without a memory of folders a walk of 20^depth."""
    for n in range(20):
        put(tmp_path / "rooms" / f"{n:02d}", f"{n}.jpg")
        for m in range(20):
            (tmp_path / "rooms" / f"{n:02d}" / f"to{m:02d}").symlink_to(f"../{m:02d}")
    bird = put(tmp_path / "set" / "bird", "a.jpg")
    (bird / "in").symlink_to(tmp_path / "rooms" / "07")
    found = walk(bird, root=tmp_path / "set")
    assert sorted(int(p.stem) for p in found.files if p.stem.isdigit()) == list(range(20))
    assert not found.faults


def test_a_folder_that_a_file_system_shows_inside_itself_is_not_entered_again(birds: Path, monkeypatch) -> None:
    """As a damaged file system or a mount of a folder into itself does: the same numbers, no link."""
    stat = os.stat
    more = stat(birds)

    def loops(path, *args, **options):
        return more if str(path).endswith("more") else stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", loops)
    found = walk(birds)
    assert [p.name for p in found.files] == ["a.jpg", "b.jpg", "c.jpg"]
    assert found.left_out.counts == {"leads_back": 1}


def test_a_folder_that_is_one_above_by_its_numbers_is_not_entered(birds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mount of the set inside a class, a link in other letters where letters mean the same: another path, equal numbers."""
    put(birds.parents[1], "elsewhere/f.jpg")
    (birds / "mount").mkdir()
    (birds / "link").symlink_to("../../elsewhere")
    stat = os.stat
    root, here = stat(birds.parents[1]), stat(birds)

    def same(path, *args, **options):
        ends = {"mount": root, "link": here}
        return ends.get(Path(path).name) or stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", same)
    found = walk(birds, root=birds.parents[1])
    assert [str(p.relative_to(birds)) for p in found.files] == FIVE
    assert found.left_out.counts == {"leads_back": 2}
    assert found.followed == []


def test_links_to_folders_elsewhere_are_followed_and_named(tmp_path: Path, birds: Path) -> None:
    other = put(tmp_path / "else", "o.jpg", "p/q.jpg")
    (birds / "x").symlink_to(other)
    (birds / "y").symlink_to(other / "p")
    (birds / "z").symlink_to("more")
    found = walk(birds, root=birds.parents[1])
    assert found.followed == [(birds / "x", str(other.resolve()))]
    assert found.left_out.counts == {"again": 2}


def test_class_folders_are_folders_that_lead_somewhere_else(tmp_path: Path) -> None:
    train = put(
        tmp_path / "set" / "train", "b/1.jpg", "a/1.jpg", "@eaDir/x.jpg", ".hidden/x.jpg", "labels.csv", "Thumbs.db"
    )
    store = put(tmp_path / "store", "x.jpg")
    for name, target in {
        "c": store,
        "self": ".",
        "top": "/",
        "set": "..",
        "gone": "/nowhere/x",
        "l.csv": "labels.csv",
    }.items():
        (train / name).symlink_to(target)
    os.mkfifo(train / "pipe")
    found_names, found = class_folders(train, tmp_path / "set")
    assert found_names == ["a", "b", "c"]
    assert found.left_out.counts == {"junk": 2, "hidden": 1, "leads_back": 3, "special": 1, "beside": 2}
    assert [path.name for path, _ in found.dangling] == ["gone"]


def test_what_was_left_out_is_said_in_one_line(tmp_path: Path) -> None:
    assert LeftOut().say() == ""
    one, two = LeftOut(), LeftOut()
    one.add("junk", f"{tmp_path}/b/@eaDir")
    one.add("junk", f"{tmp_path}/a/@eaDir")
    two.add("special", f"{tmp_path}/pipe")
    one.merge(two)
    assert one.say(tmp_path) == (
        "2 entries of NAS, system or archive programs (a/@eaDir, ...), 1 pipe, socket or device (pipe)"
    )
    assert LeftOut({"hidden": 3}).say() == "3 hidden entries"
