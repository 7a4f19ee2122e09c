"""Files given as weights: what they are is told from their content, and nothing in them is executed."""

import argparse
import bz2
import collections
import datetime
import gzip
import io
import json
import lzma
import os
import pathlib
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from fd2fast.errors import UserError
from fd2fast.models.weights_file import read_tensors

STATE = {"conv.weight": torch.arange(12.0).reshape(3, 4), "bn.bias": torch.ones(3)}


def saved(value=STATE, **how):
    file = io.BytesIO()
    torch.save(value, file, **how)
    return file.getvalue()


def zipped(**files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/").replace("_dot_", "."), content)
    return file.getvalue()


def tarred():
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        entry = tarfile.TarInfo("weights.pth")
        entry.size = 3
        archive.addfile(entry, io.BytesIO(b"abc"))
    return file.getvalue()


FILES = {
    "empty": (b"", "is empty"),
    "zeros": (bytes(5000), "only zeros"),
    "html": (b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>", r"web page \('Sign in'\)"),
    "html without a title": (b"\n\n <HTML><body>404</body>", "web page"),
    "xml": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "web page"),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 46830571\n", "git lfs pull"),
    "git-annex": (b"/annex/objects/SHA256E-s46830571--4d7a.pth\n", "git annex get"),
    "gzip": (gzip.compress(saved()), "gunzip"),
    "bzip2": (bz2.compress(saved()), "bunzip2"),
    "xz": (lzma.compress(saved()), "unxz"),
    "tar": (tarred(), "tar archive"),
    "zip": (zipped(resnet_dot_pth=saved()), r"zip archive: unpack it \(it holds resnet\.pth\)"),
    "npz": (zipped(a_dot_npy=b"x", b_dot_npy=b"y"), "numpy arrays"),
    "TorchScript": (zipped(m__data_dot_pkl=b"x", m__constants_dot_pkl=b"y"), "TorchScript"),
    "json": (b'{"error": "Repository not found"}', "Repository not found"),
    "index": (json.dumps({"metadata": {}, "weight_map": {"a": "model-1.safetensors"}}).encode(), "several files"),
    "text": (b"Zugriff verweigert, bitte anmelden\n", "is a text"),
    "yaml": (b"model: resnet18\nlr: 0.1\n", "is a text"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "Keras"),
    "png": (b"\x89PNG\r\n\x1a\n" + bytes(100), "image"),
    "npy": (b"\x93NUMPY\x01\x00" + bytes(100), "numpy array"),
    "half a zip": (saved()[:400], "incomplete"),
    "half a legacy file": (saved(_use_new_zipfile_serialization=False)[:300], "cannot be read"),
    "half a safetensors file": (save(STATE)[:-20], r"bytes of \d+: the download was not finished"),
    "a safetensors header": (save(STATE)[:40], "within its header"),
    "noise": (bytes(range(128, 256)) * 20, "cannot be read|pickle"),
    "plain pickle": (pickle.dumps({"a": [1.0]}, 2), "torch.save"),
    "newer pickle": (pickle.dumps({"a": [1.0]}, 5), "weights .*(pickle|tensors only)"),
    "a list": (saved([torch.ones(2)]), "holds a list"),
    "a tensor": (saved(torch.ones(2)), "holds a Tensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_file_that_holds_no_weights_is_told_for_what_it_is(tmp_path, name, suffix):
    content, told = FILES[name]
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=told) as found:
        read_tensors(path)
    assert str(path) in str(found.value)
    assert "\n" not in str(found.value)
    assert len(str(found.value)) < len(str(path)) + 450


def test_the_content_decides_not_the_ending(tmp_path):
    for name in ("a.pth", "a.safetensors", "a.ckpt", "a"):
        for content in (saved(), saved(_use_new_zipfile_serialization=False), save(STATE)):
            (tmp_path / name).write_bytes(content)
            found = read_tensors(tmp_path / name)
            assert torch.equal(found["conv.weight"], STATE["conv.weight"])


def test_folders_pipes_and_missing_files_are_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_tensors(tmp_path / "none.pth")
    with pytest.raises(UserError, match="no such file"):
        read_tensors(tmp_path / "gone" / "none.pth")
    (tmp_path / "loop.pth").symlink_to(tmp_path / "loop.pth")
    with pytest.raises(UserError, match="circle"):
        read_tensors(tmp_path / "loop.pth")
    with pytest.raises(UserError, match="name"):
        read_tensors(tmp_path / "a\0b")
    with pytest.raises(UserError, match="too long"):
        read_tensors(tmp_path / ("x" * 300))
    os.mkfifo(tmp_path / "pipe.pth")
    with pytest.raises(UserError, match="no regular file"):
        read_tensors(tmp_path / "pipe.pth")
    folder = tmp_path / "model"
    folder.mkdir()
    with pytest.raises(UserError, match="is a folder; wanted"):
        read_tensors(folder)
    save_file(STATE, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"give the file in it \(model\.safetensors\)"):
        read_tensors(folder)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="of fd2fast's own"):
        read_tensors(folder)


class Settings:
    """A class that whoever reads the file does not have."""

    def __init__(self):
        self.lr = 0.1


class Entries(dict):
    """A dict of somebody's own."""


class Things(list):
    """A list of somebody's own."""


class Kind:
    """Stands for a class whose objects say how they are made anew, as enums and times do."""

    def __init__(self, value):
        self.value = value

    def __reduce__(self):
        return Kind, (self.value,)


EXTRAS = {
    "Namespace": argparse.Namespace(arch="resnet18", lr=0.1, out=pathlib.PurePosixPath("runs")),
    "path": pathlib.Path("runs/best.pth"),
    "numpy scalars": {"best": np.float64(71.5), "epoch": np.int64(3), "flag": np.bool_(True)},
    "numpy array": np.arange(3),
    "OrderedDict": collections.OrderedDict(a=1),
    "defaultdict": collections.defaultdict(list, a=[1]),
    "date": datetime.datetime(2024, 5, 1),
    "own class": Settings(),
    "own dict": Entries(lr=0.1, nested=Entries(a=1)),
    "own list": Things([1, 2]),
    "own way": Kind(3),
    "class": Settings,
    "device": torch.device("cpu"),
    "random state": torch.get_rng_state(),
}


@pytest.mark.parametrize("name", EXTRAS)
@pytest.mark.parametrize("legacy", [False, True])
def test_what_trainers_save_beside_the_weights_does_not_matter(tmp_path, name, legacy):
    path = tmp_path / "weights.pth"
    torch.save({"args": EXTRAS[name], "state_dict": STATE}, path, _use_new_zipfile_serialization=not legacy)
    found = read_tensors(path)
    assert torch.equal(found["state_dict"]["conv.weight"], STATE["conv.weight"])


def test_an_optimisers_state_does_not_matter(tmp_path):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    torch.save(
        {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "o": optimizer,
        },
        tmp_path / "w.pth",
    )
    assert torch.equal(read_tensors(tmp_path / "w.pth")["model"]["weight"], model.weight)


def test_a_dict_of_somebodys_own_keeps_its_tensors(tmp_path):
    torch.save(Entries(STATE), tmp_path / "w.pth")
    assert torch.equal(read_tensors(tmp_path / "w.pth")["conv.weight"], STATE["conv.weight"])


def test_a_whole_model_of_the_old_format_says_so_too(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"whole pickled model .*state_dict\(\)"):
        read_tensors(tmp_path / "w.pth")


def test_a_whole_model_says_how_to_save_its_state_dict(tmp_path):
    torch.save(torch.nn.Sequential(torch.nn.Linear(2, 2)), tmp_path / "w.pth")
    with pytest.raises(
        UserError, match=r"whole pickled model \(torch\.nn\.modules\.container\.Sequential\).*state_dict\(\)"
    ):
        read_tensors(tmp_path / "w.pth")


class Runs:
    """A pickle that would run a function when it is loaded."""

    def __init__(self, function, *given):
        self.function, self.given = function, given

    def __reduce__(self):
        return self.function, self.given


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("function", [os.system, os.mkdir, open, exec, eval, getattr, pathlib.Path.touch, print])
def test_nothing_in_a_file_is_executed(tmp_path, monkeypatch, capsys, function, legacy):
    monkeypatch.chdir(tmp_path)
    given = {os.system: "touch ran", exec: "open('ran', 'w')", eval: "open('ran', 'w')", print: "ran"}.get(
        function, "ran"
    )
    extra = (tmp_path, "x") if function is getattr else (given, "w") if function is open else (given,)
    extra = (pathlib.Path("ran"),) if function is pathlib.Path.touch else extra
    path = tmp_path / "weights.pth"
    torch.save({"state_dict": STATE, "x": Runs(function, *extra)}, path, _use_new_zipfile_serialization=not legacy)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="tensors only.*nothing in it was executed"):
        read_tensors(path)
    assert sorted(tmp_path.iterdir()) == before
    assert capsys.readouterr().out == ""


def test_a_foreign_function_is_not_run_either(tmp_path, monkeypatch):
    (tmp_path / "somewhere.py").write_text("def make(name):\n    open(name, 'w').close()\n    return 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import somewhere

    torch.save({"state_dict": STATE, "x": Runs(somewhere.make, str(tmp_path / "ran"))}, tmp_path / "w.pth")
    assert set(read_tensors(tmp_path / "w.pth")) == {"state_dict", "x"}
    assert not (tmp_path / "ran").exists()
    import sys

    del sys.modules["somewhere"]
    read_tensors(tmp_path / "w.pth")
    assert "somewhere" not in sys.modules
