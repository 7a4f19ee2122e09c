"""What users' code and scripts rely on: the operations' signatures, the commands' names, and every command of the README."""

import functools
import inspect
import re
import shlex
import types
from pathlib import Path

import pytest

from fd2fast import cli, ops

ROOT = Path(__file__).parents[1]
REQUIRED = inspect.Parameter.empty
# operation -> parameters in order; keyword-only ones behind "*", with their defaults
SIGNATURES: dict[str, dict[str, object]] = {
    "bilinear_attention_pool": {"features": REQUIRED, "attention": REQUIRED, "*": {"eps": 1e-6}},
    "normalized_l2": {"u": REQUIRED, "v": REQUIRED, "*": {"eps": 1e-6}},
    "prototype_loss": {"z": REQUIRED, "prototypes": REQUIRED, "labels": REQUIRED, "*": {"beta": 0.5, "eps": 1e-6}},
    "attention_similarity_loss": {"attention": REQUIRED, "prior": REQUIRED, "offsets": REQUIRED, "*": {"eps": 1e-6}},
    "bn_matching": {"x": REQUIRED, "running_mean": REQUIRED, "running_var": REQUIRED, "segments": REQUIRED, "*": {}},
    "bn_act_matching": {
        "x": REQUIRED,
        "weight": REQUIRED,
        "bias": REQUIRED,
        "running_mean": REQUIRED,
        "running_var": REQUIRED,
        "segments": REQUIRED,
        "*": {"residual": None, "activation": "relu", "eps": 1e-5},
    },
    "crop_flip_roll": {"images": REQUIRED, "params": REQUIRED, "segments": REQUIRED, "size": REQUIRED, "*": {}},
    "adam_clamp_": {
        "image": REQUIRED,
        "grad": REQUIRED,
        "exp_avg": REQUIRED,
        "exp_avg_sq": REQUIRED,
        "step": REQUIRED,
        "*": dict.fromkeys(("lr", "betas", "eps", "low", "high"), REQUIRED),
    },
}
COMMANDS = set("run pretrain patches distill relabel evaluate report bench datasets import export info".split())


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_stay(name):
    parameters = inspect.signature(getattr(ops, name)).parameters.values()
    positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    keywords = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    expected = dict(SIGNATURES[name])
    expected_keywords = {**expected.pop("*"), "backend": "auto"}
    assert list(positional.items()) == list(expected.items())
    assert {key: keywords.get(key, "missing") for key in expected_keywords} == expected_keywords
    # what came later may be left out
    assert all(keywords[key] is not REQUIRED for key in keywords.keys() - expected_keywords.keys())


def test_commands_stay():
    assert COMMANDS <= cli.COMMANDS.keys()


def commands_of(text: str) -> list[str]:
    """The arguments of every `fd2fast ...` in the shell blocks and the inline code of a Markdown text."""
    lines: list[str] = []
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split(" #")[0].split("&&"):
                lines += re.findall(r"^\s*(?:torchrun .*-m )?fd2fast (.+)", part)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    lines += re.findall(r"`fd2fast ([^`]+)`", prose)
    return [" ".join(line.split()) for line in dict.fromkeys(lines) if "NAME" not in line]


README = commands_of((ROOT / "README.md").read_text())


def test_the_readme_names_commands():
    assert {line.split()[0] for line in README} >= {"run", "datasets", "distill", "evaluate", "bench", "info"}


@pytest.mark.parametrize("line", README)
def test_commands_of_the_readme_are_understood(line, tmp_path, monkeypatch):
    """Parsed by the command line itself; what it would call does nothing."""
    parse, parsed = cli.tyro.cli, []

    def parse_only(function, **options):
        # in the function's own module, where its annotations are resolved
        idle = types.FunctionType((lambda *_, **__: None).__code__, function.__globals__)
        parse(functools.update_wrapper(idle, function), **options)
        parsed.append(options["prog"])

    monkeypatch.setattr(cli.tyro, "cli", parse_only)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text("[distill]\nlr = 0.1\n")
    arguments = shlex.split(line)
    if arguments[0] == "bench":
        assert "__main__" in (ROOT / "bench" / f"{arguments[1]}.py").read_text()
    elif "--help" in arguments[1:]:
        with pytest.raises(SystemExit, match="^0$"):
            cli.main(arguments)
    else:
        assert cli.main(arguments) == 0
        assert parsed == ([] if arguments[0].startswith("--") else [f"fd2fast {arguments[0]}"])


def test_a_command_that_is_not_understood_would_be_seen(monkeypatch):
    monkeypatch.setattr(cli, "_run", lambda *_: None)
    with pytest.raises(SystemExit, match="^2$"):
        cli.main(["run", "--data.folder", "x"])
