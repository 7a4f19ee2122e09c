"""The command line: help that teaches, errors without tracebacks, settings that reach the stages."""

import dataclasses
import logging
import os
import subprocess
import sys

import pytest

from fd2fast import cli, commands
from fd2fast.errors import UserError
from fd2fast.methods import BASELINES, METHODS, Selection, register_method
from fd2fast.stages import spec
from fd2fast.system.progress import show_notes


def test_usage_names_every_command(capsys):
    assert cli.main([]) == 0
    text = capsys.readouterr().out
    for name in (
        "run", "datasets", "pretrain", "patches", "distill", "relabel", "evaluate", "report", "bench", "import", "export", "info"
    ):  # fmt: skip
        assert f"  {name} " in text


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name != "bench"])
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"usage: fd2fast {command}" in capsys.readouterr().out


def test_help_loads_neither_torch_nor_what_checks_settings():
    code = (
        "import contextlib, sys\nfrom fd2fast import cli\n"
        f"for name in {[name for name in cli.COMMANDS if name != 'bench']}:\n"
        "    with contextlib.suppress(SystemExit):\n        cli.main([name, '--help'])\n"
        "sys.exit(str({'torch', 'pydantic'} & sys.modules.keys() or ''))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr.strip() == ""


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_a_command_offers_what_its_stage_declares(name):
    offered, declared = commands.COMMANDS[name], spec(name).command()
    assert (offered.config, offered.output) == (declared.config, declared.output)
    inputs = [dataclasses.replace(one, option="", note="") for one in offered.inputs]
    assert inputs == list(declared.inputs)


def test_run_help_teaches_presets_and_stage_options(capsys):
    with pytest.raises(SystemExit):
        cli.main(["run", "--help"])
    text = capsys.readouterr().out
    for part in (
        "--preset",
        "--config",
        "--distill.lam",
        "--pretrain.weights",
        "--data.root",
        "Run the same command again",
    ):
        assert part in text


@pytest.mark.parametrize("command", ["run", "distill"])
def test_help_lists_every_method(command, capsys):
    register_method("mine", Selection("a rule of one's own"))
    try:
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
    finally:
        del BASELINES["mine"]
    words = " ".join(capsys.readouterr().out.split())
    for name, method in (*METHODS.items(), *BASELINES.items()):
        assert f"{name}: {method.summary}" in words
    assert "mine: a rule of one's own" in words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rum"], "unknown command 'rum': did you mean 'run'?"),
        (["run", "--preset", "cbu"], "unknown preset 'cbu': did you mean 'cub'?"),
        (["run", "--preset"], "--preset wants a value"),
        (["run", "--config=none.toml"], "none.toml is missing"),
        (["run", "--methods", "sre2l"], "unknown method 'sre2l': did you mean 'sre2l++'?"),
        (["run", "--methods", "random:firm"], "labels are hard or soft, not 'firm'"),
        (
            ["run", "--ipc", "0"],
            "run.ipc must be a list of at least one number of images per class, each at least 1, got (0,)",
        ),
        (["pretrain", "--dataset", "nowhere", "--out", "x"], "nowhere does not exist; wanted the folder of a dataset"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_options_change_the_preset_and_the_file(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(cli, "_run", lambda config, overwrite, dry: seen.update(config=config, overwrite=overwrite))
    file = tmp_path / "mine.toml"
    file.write_text("[distill]\nlr = 0.1\nlam = 0.5\n")
    arguments = [
        "run",
        "--preset",
        "cub",
        "--config",
        str(file),
        "--distill.lam",
        "0.6",
        "--ipc",
        "1",
        "2",
        "--overwrite",
    ]
    assert cli.main(arguments) == 0
    config = seen["config"]
    assert (config.data.dataset, config.data.size, config.ipc) == ("cub", 224, (1, 2))
    assert (config.distill.lr, config.distill.lam, seen["overwrite"]) == (0.1, 0.6, True)


def test_a_bench_starts_from_any_folder(tmp_path):
    """The package of the checkout is found without being on the search path, also by benches that import each other."""
    command = [sys.executable, "-m", "fd2fast", "bench", "compare", "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage:" in done.stdout


def test_interrupt_says_how_to_go_on(capsys, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_run", stop)
    assert cli.main(["run"]) == 130
    assert "the same command goes on" in capsys.readouterr().err
    monkeypatch.setitem(cli.COMMANDS, "bench", stop)  # begins anew
    assert cli.main(["bench", "table2"]) == 130
    assert capsys.readouterr().err == "\nstopped\n"


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["rum"], 2), (["run", "--preset", "cbu"], 2)])
def test_the_exit_code_does_not_hang_on_a_reader(arguments, code, tmp_path):
    """Standard output and error are a pipe that nobody reads any more."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "fd2fast", *arguments]
    found = subprocess.run(command, stdout=writing, stderr=writing, cwd=tmp_path, timeout=120)
    os.close(writing)
    assert found.returncode == code


@pytest.mark.parametrize("columns", ["1", "7", "0", "-3", "many"])
def test_help_on_terminals_of_any_width(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit) as stop:
        cli.main(["info", "--help"])
    assert stop.value.code == 0
    assert "usage: fd2fast info" in capsys.readouterr().out


def test_an_error_cannot_steer_the_terminal(capsys, monkeypatch):
    def stop(*_):
        raise UserError("class \x1b[2J\udcff")

    monkeypatch.setattr(cli, "_run", stop)
    assert cli.main(["run"]) == 2
    assert capsys.readouterr().err == "error: class \\x1b[2J\\xff\n"


def test_take_pulls_an_option_out():
    assert cli._take(["a", "--x", "1", "b"], "--x", None) == ("1", ["a", "b"])
    assert cli._take(["--x=1", "b"], "--x", None) == ("1", ["b"])
    assert cli._take(["b"], "--x", "d") == ("d", ["b"])
    with pytest.raises(UserError, match="wants a value"):
        cli._take(["--x"], "--x", None)


def test_notes_are_shown_to_people(capsys, monkeypatch):
    package, ops = logging.getLogger("fd2fast"), logging.getLogger("fd2fast.ops")
    monkeypatch.setattr(package, "hasHandlers", lambda: False)  # pytest has its own
    monkeypatch.setattr(package, "handlers", [])
    levels = package.level, ops.level
    try:
        show_notes()
        package.info("steps of 3 images")
        ops.info("add runs on the reference backend")
        assert capsys.readouterr().err == "steps of 3 images\n"
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setattr(package, "handlers", [])
        show_notes()
        package.info("steps of 3 images")
        package.warning("split")
        assert capsys.readouterr().err == "split\n"
    finally:
        package.setLevel(levels[0])
        ops.setLevel(levels[1])
