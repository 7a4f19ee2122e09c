"""Paths as people write them: home folders and variables are put in, what cannot be a path is refused in one line."""

import os
from pathlib import Path

import pytest

from fd2fast import cli
from fd2fast.errors import UserError
from fd2fast.settings.config import DataConfig, PretrainConfig, RunConfig
from fd2fast.settings.paths import expand, expanded
from fd2fast.settings.presets import from_toml


@pytest.fixture(autouse=True)
def _surroundings(tmp_path, monkeypatch):
    """A home folder, a variable, and nothing else of the machine that runs this."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    monkeypatch.setenv("AT_HOME", "~/sets")
    monkeypatch.setenv("NOTHING", "")
    monkeypatch.delenv("MISSPELT", raising=False)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("~", "{home}"),
        ("~/", "{home}"),
        ("~/CUB 200/", "{home}/CUB 200"),
        ("$SCRATCH/cub", "/scratch/me/cub"),
        ("${SCRATCH}_old/cub", "/scratch/me_old/cub"),
        ("/data/$SCRATCH", "/data/scratch/me"),
        ("$AT_HOME/birds", "{home}/sets/birds"),
        ("./~/x", "{here}/~/x"),
        ("./~nobody-of-this-name", "{here}/~nobody-of-this-name"),
        ("a$$b/c", "a$b/c"),
        ("price$", "price$"),
        ("a/~/b", "a/~/b"),
        ("back~", "back~"),
        ("with space/ü/鳥", "with space/ü/鳥"),
        ("..//runs///cub//", "../runs/cub"),
        ("50%/x", "50%/x"),
    ],
)
def test_what_is_meant(tmp_path, text, wanted):
    assert expand(text) == Path(wanted.format(home=tmp_path / "home", here=tmp_path))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("$MISSPELT/cub", "the variable MISSPELT is not set"),
        ("/data/${MISSPELT}", "the variable MISSPELT is not set"),
        ("$NOTHING/cub", "the variable NOTHING is empty"),
        ("${SCRATCH:-/tmp}/x", r"'\$\{SCRATCH:-/tmp\}' is not understood"),
        ("~nobody-of-this-name/x", "there is no user 'nobody-of-this-name'"),
        ("", "got ''"),
        ("  ", "got '  '"),
        ("file:///home/me/my%20set", "is a URL; wanted a path such as '/home/me/my set'"),
        ("file://localhost/x/y", "wanted a path such as '/x/y'"),
        ("https://example.org/cub.tgz", "is a URL; .* fetch or mount it first"),
        ("s3://bucket/cub", "is a URL"),
        ("/data/cub\r", "control character"),
        ("a\0b", "control character"),
    ],
)
def test_what_cannot_be_a_path_is_said_in_one_line(text, told):
    with pytest.raises(UserError, match=told) as caught:
        expand(text, "data.root")
    assert str(caught.value).startswith("data.root ")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.skipif(os.name == "nt", reason="these are paths there")
@pytest.mark.parametrize("text", [r"C:\data\birds", "D:/data/birds", r"\\server\share\birds", r"runs\cub"])
def test_paths_of_windows_are_refused_elsewhere(text, tmp_path):
    with pytest.raises(UserError, match=r"Windows path|separates folders by \\"):
        expand(text)
    if "/" not in text:
        (tmp_path / text).mkdir()
        assert expand(text) == Path(text), "a folder of exactly this name is meant"


def test_what_exists_under_the_name_is_meant(tmp_path):
    for name in ("$RECYCLE.BIN", "~nobody-of-this-name", "$MISSPELT", "line\nbreak"):
        (tmp_path / name).mkdir()
        assert expand(name).resolve() == tmp_path / name


def test_names_that_are_not_utf8_pass(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    assert os.fsencode(expand(f"$SCRATCH/{name}")) == b"/scratch/me/caf\xe9"


def test_without_a_home_folder_it_is_said(monkeypatch):
    monkeypatch.setattr(os.path, "expanduser", lambda text: text)
    with pytest.raises(UserError, match="the home folder is not known"):
        expand("~/x")


@pytest.mark.parametrize(
    ("weights", "wanted"),
    [
        ("hub", "hub"),
        (None, None),
        ("w.pth", "w.pth"),
        ("./w.pth", "./w.pth"),
        ("~/w.pth", "{home}/w.pth"),
        ("$SCRATCH/w.pth", "/scratch/me/w.pth"),
    ],
)
def test_weights_are_a_path_or_a_word(tmp_path, weights, wanted):
    config = expanded(RunConfig(pretrain=PretrainConfig(weights=weights)))
    assert config.pretrain.weights == (wanted and wanted.format(home=tmp_path / "home"))
    with pytest.raises(UserError, match=r"pretrain\.weights '\$MISSPELT'"):
        expanded(RunConfig(pretrain=PretrainConfig(weights="$MISSPELT")))


def test_every_path_of_a_file_is_expanded(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text(
        'out = "$SCRATCH/runs"\n[data]\nroot = "~/birds"\nfonts = "${SCRATCH}/fonts"\n[pretrain]\nweights = "~/w.pth"\n'
    )
    config = expanded(from_toml(file, RunConfig()))
    home = tmp_path / "home"
    assert config.out == Path("/scratch/me/runs")
    assert config.data == DataConfig(root=home / "birds", fonts=Path("/scratch/me/fonts"))
    assert config.pretrain.weights == str(home / "w.pth")
    file.write_text('[data]\nroot = "$MISSPELT/birds"\n')
    with pytest.raises(UserError, match=r"\[data\] root .*the variable MISSPELT is not set"):
        from_toml(file, RunConfig())


def test_every_path_of_the_command_line_is_expanded(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(cli, "_run", lambda config, overwrite, dry: seen.update(config=config))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mine.toml").write_text('[data]\ndataset = "folder"\n')
    arguments = [
        "run",
        "--config=~/mine.toml",
        "--out=$SCRATCH/runs",
        "--data.root=~/birds",
        "--pretrain.weights=~/w.pth",
    ]
    assert cli.main(arguments) == 0
    config = seen["config"]
    assert (config.out, config.data.root) == (Path("/scratch/me/runs"), tmp_path / "home" / "birds")
    assert (config.data.dataset, config.pretrain.weights) == ("folder", str(tmp_path / "home" / "w.pth"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["datasets", "--root", "$MISSPELT", "--out", "o"],
        ["pretrain", "--dataset", "$MISSPELT/d", "--out", "o"],
        ["patches", "--dataset", "d", "--teacher", "${MISSPELT}", "--out", "o"],
        ["distill", "--dataset", "d", "--teachers", "a", "$MISSPELT/t", "--out", "o"],
        ["relabel", "--images", "i", "--teachers", "t", "--out", "$MISSPELT"],
        ["evaluate", "--dataset", "d", "--images", "i", "--soft-labels", "$MISSPELT/l", "--out", "o"],
        ["report", "--run", "$MISSPELT"],
        ["import", "--checkpoint", "$MISSPELT/c.pth", "--dataset", "d", "--model", "ResNet18", "--out", "o"],
        ["export", "--artifact", "a", "--out", "$MISSPELT/o"],
        ["run", "--config", "$MISSPELT/c.toml"],
        ["run", "--out", "$MISSPELT/o"],
        ["run", "--pretrain.weights", "$MISSPELT/w.pth"],
    ],
    ids=lambda arguments: " ".join(arguments[:3]),
)
def test_an_unknown_variable_is_named_by_every_command(arguments, capsys, tmp_path):
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert "the variable MISSPELT is not set" in error
    assert len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_all_wrong_paths_are_listed_at_once(capsys):
    assert cli.main(["datasets", "--root", "$MISSPELT", "--fonts", "s3://fonts", "--out", ""]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 3 things are wrong, nothing was begun:\n")
    assert len(error.strip().splitlines()) == 4
