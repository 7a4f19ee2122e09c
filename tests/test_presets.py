"""Presets and TOML settings."""

import os
from pathlib import Path

import pytest

from fd2fast.errors import UserError
from fd2fast.methods import BASELINES, filled
from fd2fast.settings.config import DistillConfig, PretrainConfig, RunConfig, replace
from fd2fast.settings.presets import PRESETS, from_toml, preset, quick


def test_unknown_preset_suggests_the_nearest():
    with pytest.raises(UserError, match=r"unknown preset 'cbu': did you mean 'cub'\?"):
        preset("cbu")


def test_paper_presets_follow_the_paper():
    for name in ("cub", "aircraft", "cars"):
        config = PRESETS[name]
        assert (config.ipc, config.relabel.epochs, config.data.size) == ((1, 3, 5), 400, 224)
        assert (config.evaluate.temperature, config.evaluate.eta) == (20.0, 2.0)
    assert PRESETS["imagewoof"].relabel.epochs == 300


@pytest.mark.parametrize("name", PRESETS)
def test_a_quick_run_has_the_same_rows_in_less_time_and_another_folder(name):
    full, short = PRESETS[name], quick(PRESETS[name])
    assert short.out == full.out.with_name(full.out.name + "-quick")
    for same in ("data", "methods", "teachers", "students", "ipc", "patches"):
        assert getattr(short, same) == getattr(full, same)
    assert short.pretrain.epochs == full.pretrain.epochs // 2
    assert short.relabel.epochs == full.relabel.epochs // 3
    assert short.evaluate.seeds == full.evaluate.seeds[:1]
    for method in {text.partition(":")[0] for text in full.methods} - set(BASELINES):
        resolved = [filled(replace(c.distill, method=method), classes=20, size=full.data.size) for c in (full, short)]
        iterations = [sum(r.iterations or ()) for r in resolved]
        assert iterations[1] <= iterations[0] / 3


@pytest.mark.parametrize(
    ("epochs", "backbone", "short"), [(1, 0, (1, 0)), (2, 1, (1, 0)), (9, 3, (4, 1)), (9, 8, (4, 3))]
)
def test_what_lies_within_the_epochs_still_does_when_quick(epochs, backbone, short):
    found = quick(RunConfig(pretrain=PretrainConfig(epochs=epochs, backbone_epochs=backbone))).pretrain
    assert (found.epochs, found.backbone_epochs) == short


@pytest.mark.parametrize(("given", "short"), [((300,), (100,)), ((5,), (4,)), ((2,), (2,)), ((30, 9, 1), (10, 4, 1))])
def test_quick_iterations_are_enough_for_every_phase(given, short):
    assert quick(RunConfig(distill=DistillConfig(iterations=given))).distill.iterations == short


def test_toml_overrides_nested_values(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text(
        'out = "x"\nipc = [1, 3]\n[data]\nsize = 32\nmean = [0.5, 0.5, 0.5]\n[distill]\nlr = 1\nlam = 0.7\n'
    )
    config = from_toml(file, RunConfig())
    assert (str(config.out), config.ipc, config.data.size, config.distill.lr) == ("x", (1, 3), 32, 1.0)
    assert config.data.mean == (0.5, 0.5, 0.5)
    assert config.distill.lam == 0.7
    assert config.pretrain == RunConfig().pretrain


SIDE = "a whole number of pixels within [8, 32767]"
SHARE = "a number within [0, 1]"
COUNTS = "a list of at least one, each a whole number of at least 1"
PER_CLASS = "a list of at least one number of images per class, each at least 1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[data]\nsize = "big"', f"[data] size must be {SIDE}, got 'big'"),
        ("[data]\nsize = 64.0", f"[data] size must be {SIDE}, got 64.0"),
        ("[data]\nsize = true", f"[data] size must be {SIDE}, got True"),
        ("[data]\nsize = [64]", f"[data] size must be {SIDE}, got [64]"),
        ("[data]\nsize = 4", f"[data] size must be {SIDE}, got 4"),
        ('[data]\nbad_images = "ignore"', "[data] bad_images must be error or skip, got 'ignore'"),
        ("data = 3", "data must be a table, got 3"),
        ("[[data]]\nsize = 1", "data must be a table, got [{'size': 1}]"),
        ("[distill]\nlam = true", f"[distill] lam must be {SHARE}, got True"),
        ('[distill]\nlam = "0.5"', f"[distill] lam must be {SHARE}, got '0.5'"),
        ("[distill]\nlam = nan", f"[distill] lam must be {SHARE}, got nan"),
        ("[distill]\nlam = 7", f"[distill] lam must be {SHARE}, got 7"),
        ("[pretrain]\nlr = inf", "[pretrain] lr must be a finite number above 0, got inf"),
        (
            "[pretrain]\nepochs = 9999999999",
            "[pretrain] epochs must be a whole number up to 2147483647, got 9999999999",
        ),
        ("[pretrain]\nattention_views = 1", "[pretrain] attention_views must be true or false, got 1"),
        ("[pretrain]\nweights = 3", "[pretrain] weights must be a file or hub, got 3"),
        ("ipc = 3", f"ipc must be {PER_CLASS}, got 3"),
        ("ipc = [1, 2.5]", f"ipc must be {PER_CLASS}, got [1, 2.5]"),
        ('ipc = ["1"]', f"ipc must be {PER_CLASS}, got ['1']"),
        ("ipc = []", f"ipc must be {PER_CLASS}, got []"),
        ("teachers = 'ResNet18'", "teachers must be a list of at least one name, got 'ResNet18'"),
        ("teachers = [3]", "teachers must be a list of at least one name, got [3]"),
        ("out = 2024-01-01", "out must be a path, got datetime.date(2024, 1, 1)"),
        ("out = 3", "out must be a path, got 3"),
        ('out = ""', "out must be a path, got '' (a variable that is not set?)"),
        (
            '[data]\nroot = "s3://b"',
            "[data] root 's3://b' is a URL; wanted a path on this machine: fetch or mount it first",
        ),
        ("[data]\nmean = [0.5, 0.5]", f"[data] mean must be 3 values, each {SHARE}, got [0.5, 0.5]"),
        ("[data]\nmean = 0.5", f"[data] mean must be 3 values, each {SHARE}, got 0.5"),
        ("[patches]\nfactor = 3", "[patches] factor must be 1 or 2, got 3"),
        ('[patches]\nfactor = "2"', "[patches] factor must be 1 or 2, got '2'"),
        ("[distill]\niterations = 300", f"[distill] iterations must be {COUNTS}, got 300"),
        ("[distill]\niterations = [0]", f"[distill] iterations must be {COUNTS}, got [0]"),
        (
            '[distill]\ninit = "patch"',
            "[distill] init must be patches, real or noise, got 'patch': did you mean 'patches'?",
        ),
        ('[distill]\nmethod = ""', "[distill] method must be a name, got ''"),
        (
            "[evaluate]\nseeds = [1, 1]",
            "[evaluate] seeds must be a list of at least one seed, all different, got [1, 1]",
        ),
        ("[evaluate]\nseeds = 1", "[evaluate] seeds must be a list of at least one seed, all different, got 1"),
        ("lam = 0.5", "lam is unknown: it is a setting of [distill]: write it below that line"),
    ],
)
def test_wrong_toml_names_the_setting_what_was_wanted_and_what_came(tmp_path, text, message):
    file = tmp_path / "a.toml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        from_toml(file, RunConfig())
    assert str(caught.value) == f"{file}: {message}"


def test_all_that_is_wrong_in_a_file_is_said_at_once(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text('[data]\nsize = "big"\nsise = 1\n[distill]\nlam = 7\nbetas = [1, "x"]\n')
    with pytest.raises(UserError, match="^4 things are wrong, nothing was begun:") as caught:
        from_toml(file, RunConfig())
    lines = str(caught.value).splitlines()[1:]
    assert all(line.startswith(f"  {file}: [") for line in lines)
    for part in ("[data] size must", "[data] sise is unknown: did you mean 'size'", "[distill] lam", "got [1, 'x']"):
        assert sum(part in line for line in lines) == 1


def test_missing_toml_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.toml is missing"):
        from_toml(tmp_path / "none.toml", RunConfig())


TEXT = "[distill]\nlr = 0.25\n# café\n"


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r\n").encode("utf-16"),
        TEXT.rstrip().encode(),
    ],
)
def test_what_editors_save_is_read(tmp_path, content):
    file = tmp_path / "a.toml"
    file.write_bytes(content)
    assert from_toml(file, RunConfig()).distill.lr == 0.25


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TEXT.encode("latin-1"), r"line 3 has a byte \(0xe9\) that is not utf-8; save it as UTF-8"),
        (TEXT.encode("utf-16-le"), "zero bytes|not utf-8"),
        (b"\xff\xfea", "not utf-16|is not TOML"),
        (b"lr = 1\rlam = 2\r", "is not TOML"),
        (b"[distill]\nlr = 1\nlr = 2\n", r"line 3.*'lr = 2'"),
        (b"[data]\nsize = 1\n[data]\nsize = 2\n", "line 3"),
        (b"ipc = " + b"9" * 5000, "is not TOML"),
        (b"ipc = " + b"[" * 100_000, "nested too deeply|is not TOML"),
        (b"[" + b".".join([b"a"] * 900) + b"]\nx = 1\n", r"a is unknown: did you mean"),
        (b"\x00\x01", "is not TOML"),
        (b"x" * ((1 << 20) + 1), "more than"),
        (b"[destill]\nlr = 1\n", r"destill is unknown: did you mean 'distill'\?"),
        (b"[datasets]\nsize = 1\n", r"did you mean 'data'\?"),
        (b"lam = 0.5\n", r"lam is unknown: it is a setting of \[distill\]"),
        (b"lr = 0.5\n", r"a setting of \[pretrain\], \[distill\], \[evaluate\]"),
        (b"[pretrain]\neval-every = 2\n", r"did you mean 'eval_every'\?"),
        (b"ipc = 3\n", "ipc must be"),
        (b"teachers = 'ResNet18'\n", "teachers must be"),
        (b"[[data]]\nsize = 1\n", r"data must be a table, got \[{"),
        (b"out = 2024-01-01\n", "out must be"),
    ],
)
def test_a_file_that_cannot_be_taken_is_one_line(tmp_path, content, message):
    file = tmp_path / "a.toml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as found:
        from_toml(file, RunConfig())
    assert "\n" not in str(found.value)
    assert str(file) in str(found.value)


def test_other_languages_folders_and_pipes_are_named(tmp_path):
    (tmp_path / "a.json").write_text('{"distill": {"lr": 1}}')
    with pytest.raises(UserError, match=r"write the settings as TOML"):
        from_toml(tmp_path / "a.json", RunConfig())
    with pytest.raises(UserError, match="is a folder"):
        from_toml(tmp_path, RunConfig())
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(UserError, match="no regular file"):
        from_toml(tmp_path / "pipe.toml", RunConfig())
    with pytest.raises(UserError, match="no regular file"):
        from_toml(Path("/dev/zero"), RunConfig())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="a part of the path is a file"):
        from_toml(tmp_path / "file" / "a.toml", RunConfig())


def test_what_a_shell_hands_over_is_read():
    reader, writer = os.pipe()
    os.write(writer, TEXT.encode())
    os.close(writer)
    try:
        assert from_toml(Path(f"/dev/fd/{reader}"), RunConfig()).distill.lr == 0.25
    finally:
        os.close(reader)
