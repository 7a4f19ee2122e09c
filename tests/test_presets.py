"""Presets and TOML settings."""

import pytest

from fd2fast.config import RunConfig
from fd2fast.errors import UserError
from fd2fast.presets import PRESETS, from_toml, preset


def test_unknown_preset_suggests_the_nearest():
    with pytest.raises(UserError, match=r"unknown preset 'cbu': did you mean 'cub'\?"):
        preset("cbu")


def test_paper_presets_follow_the_paper():
    for name in ("cub", "aircraft", "cars"):
        config = PRESETS[name]
        assert (config.ipc, config.relabel.epochs, config.data.size) == ((1, 3, 5), 400, 224)
        assert (config.evaluate.temperature, config.evaluate.eta) == (20.0, 2.0)
    assert PRESETS["imagewoof"].relabel.epochs == 300


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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[data]\nsise = 3\n", r"unknown setting 'sise': did you mean 'size'\?"),
        ('[data]\nsize = "big"\n', r"data: size must be int, got 'big'"),
        ('[data]\nbad_images = "ignore"\n', "bad_images must be"),
        ("data = 3\n", "data is a table of settings"),
        ("[distill]\nlam = true\n", "lam must be float, got True"),
        ("= 3", "is not TOML"),
    ],
)
def test_wrong_toml_names_the_key(tmp_path, text, message):
    file = tmp_path / "a.toml"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        from_toml(file, RunConfig())


def test_missing_toml_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.toml is missing"):
        from_toml(tmp_path / "none.toml", RunConfig())
