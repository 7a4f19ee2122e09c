"""Errors of the system and of libraries: one line with the cause and what to do, nothing half written, nothing lost."""

import contextlib
import errno
import json
import os
import resource

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fd2fast import artifacts
from fd2fast.data.pixels import save_image
from fd2fast.distillation.memory import is_out_of_memory
from fd2fast.errors import UserError
from fd2fast.system import causes
from fd2fast.system.writer import Writer

BIG = torch.zeros(20_000)
NOISE = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 96, 96), dtype=np.uint8))


@contextlib.contextmanager
def file_limit(size):
    """No file of this process may grow beyond `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "quota"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EROFS, "mounted read-only"),
        (errno.EIO, "input/output error"),
        (errno.ESTALE, "network share was lost"),
        (errno.ENOTCONN, "mount it again"),
        (errno.EMFILE, "ulimit -n"),
        (errno.ENAMETOOLONG, "shorter"),
        (errno.EACCES, "permission denied"),
        (errno.EBUSY, "in use"),
        (errno.EILSEQ, "plain name"),
        (errno.EPROTO, "EPROTO"),
    ],
)
@pytest.mark.parametrize("step", ["block", "replace", "fsync", "mkdir"])
def test_whatever_the_system_refuses_is_one_line_and_the_old_file_stays(tmp_path, monkeypatch, number, told, step):
    target = tmp_path / "f"
    artifacts.write_bytes(target, b"old")

    def refuse(*given, **named):
        raise OSError(number, os.strerror(number), str(target))

    monkeypatch.setattr(*{
        "block": ("pathlib.Path.write_bytes", refuse),
        "replace": ("os.replace", refuse),
        "fsync": ("os.fsync", refuse),
        "mkdir": ("pathlib.Path.mkdir", refuse),
    }[step])  # fmt: skip
    with pytest.raises(UserError) as found:
        artifacts.write_bytes(target, b"new")
    monkeypatch.undo()
    text = str(found.value)
    assert told in text
    assert str(target) in text
    assert "run the same command again" in text
    assert "\n" not in text
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def by_safetensors(path):
    with artifacts.atomic_path(path) as temporary:
        save_file({"x": BIG}, temporary)


def by_numpy(path):
    with artifacts.atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, BIG.numpy())


def by_json(path):
    with artifacts.atomic_path(path) as temporary, open(temporary, "w") as file:
        json.dump(list(range(20_000)), file)


def by_mapping(path):
    with artifacts.atomic_path(path) as temporary:
        artifacts.new_array(temporary, (40_000,))


def by_writer(path):
    with Writer() as writer:
        writer.submit(artifacts.write_torch, path, {"x": BIG})


WRITERS = {
    "write_torch": lambda path: artifacts.write_torch(path, {"x": BIG, "y": [1, 2]}),
    "write_safetensors": lambda path: artifacts.write_safetensors(path, {"x": BIG}),
    "write_npy": lambda path: artifacts.write_npy(path, BIG.numpy()),
    "write_json": lambda path: artifacts.write_json(path, list(range(20_000))),
    "save_image": lambda path: save_image(path, NOISE, "png"),
    "safetensors": by_safetensors,
    "numpy": by_numpy,
    "json": by_json,
    "mapping": by_mapping,
    "background": by_writer,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_says_that_the_disk_takes_no_more(tmp_path, name):
    path = tmp_path / "folder" / "file"
    with file_limit(4096), pytest.raises(UserError) as found:
        WRITERS[name](path)
    assert "\n" not in str(found.value)
    assert str(path) in str(found.value)
    assert "run the same command again" in str(found.value)
    assert list(path.parent.iterdir()) == []
    WRITERS[name](path)  # the same again, with space
    assert path.stat().st_size > 4096


def test_another_file_that_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(UserError, match="elsewhere"):
        copy_from_elsewhere(tmp_path)


def copy_from_elsewhere(tmp_path):
    with artifacts.atomic_path(tmp_path / "f"):
        (tmp_path / "no" / "elsewhere").read_bytes()


def test_errors_of_the_program_stay_what_they_are(tmp_path):
    for error in (KeyError("x"), RuntimeError("shapes differ"), MemoryError(), ValueError("serial number")):
        with pytest.raises(type(error)) as found:
            raise_in_the_middle(tmp_path, error)
        assert found.value is error
    assert list(tmp_path.iterdir()) == []


def raise_in_the_middle(tmp_path, error):
    with artifacts.atomic_path(tmp_path / "f"):
        try:
            raise OSError(errno.ENOSPC, "handled before")
        except OSError:
            raise error  # noqa: B904 (its context must not be taken for its cause)


def test_a_users_error_in_the_middle_is_not_changed(tmp_path):
    with pytest.raises(UserError, match="^mine$"):
        raise_in_the_middle(tmp_path, UserError("mine"))


def raised(call):
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (raised(lambda: torch.empty(1 << 60, dtype=torch.uint8)), "out of memory"),
        (MemoryError(), "out of memory"),
        (MemoryError("Unable to allocate 7.28 TiB for an array"), "7.28 TiB"),
        (RuntimeError("student 3: MemoryError: "), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "GPU's memory is full"),
        (raised(lambda: json.loads("[" * 200_000)), "nested too deeply"),
        (RuntimeError("can't start new thread"), "ulimit -u"),
        (OSError(errno.EIO, "Input/output error", "/data/a.jpg"), "/data/a.jpg: the disk or network share"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (RuntimeError("student 3: OSError: [Errno 116] Stale file handle: 'x'"), "stale file handle"),
        (ModuleNotFoundError("No module named 'timm.data'"), "install fd2fast again"),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), "nvidia-smi"),
        (raised(lambda: "é".encode("ascii")), "LC_ALL"),
        (KeyError("x"), None),
        (ValueError("x"), None),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
    ],
)  # fmt: skip
def test_causes_outside_the_program_are_told_with_advice(error, told):
    found = causes.explained(error)
    if told is None:
        assert found is None
    else:
        assert told in found
        assert "\n" not in found


@pytest.mark.parametrize(
    ("text", "left", "told"),
    [
        ("could not create a primitive", 1 << 20, True),
        ("could not create a memory object", 0, True),
        ("could not execute a primitive", 1 << 20, True),
        ("could not create a primitive descriptor for a convolution forward propagation primitive", 1 << 20, True),
        ("PyObject pointer is null", 1 << 20, True),
        ("could not create a primitive", 1 << 34, False),
        ("could not create a primitive", None, False),
        ("mat1 and mat2 shapes cannot be multiplied", 0, False),
    ],
)
def test_words_that_may_mean_memory_do_where_little_was_left(monkeypatch, text, left, told):
    monkeypatch.setattr(causes.limits, "spare", lambda *, least: left)
    found = causes.explained(RuntimeError(text))
    assert found is None or found.startswith(f"probably out of memory ({text}); end other programs")
    assert (found is not None) == told == is_out_of_memory(RuntimeError(text))


def test_damaged_records_say_how_to_go_on(tmp_path):
    path = tmp_path / "record.json"
    for content in (b"", b'{"a": 1', b"\xff\xfe\x00", b"\x80abc", b"[" * 200_000):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"record\.json is not a record of fd2fast .* remove it"):
            artifacts.read_json(path)
        with pytest.raises(UserError, match=r"record\.json is not a file of tensors .* remove it"):
            artifacts.read_torch(path)
    with pytest.raises(UserError, match="no such file"):
        artifacts.read_json(tmp_path / "none.json")
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        artifacts.read_json(path)


def test_a_saved_state_of_another_version_is_named():
    for error in (KeyError("epoch"), RuntimeError("size mismatch for a.weight"), TypeError("'NoneType'")):
        with (
            pytest.raises(UserError, match="the saved state of x does not fit .* --overwrite"),
            artifacts.resumable("the saved state of x"),
        ):
            raise error
