"""The command line: one function a command, its options made from the settings classes."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from fd2fast import __version__
from fd2fast.commands import COMMANDS as OFFERED
from fd2fast.commands import Command
from fd2fast.errors import UserError, nearest, refuse
from fd2fast.settings.config import RunConfig
from fd2fast.settings.paths import expand, expanded
from fd2fast.settings.presets import PRESETS, from_toml, preset, quick
from fd2fast.stages import ADDED, STAGES, spec
from fd2fast.system import failure, stopping, threads
from fd2fast.system.processes import is_first
from fd2fast.system.progress import show_notes
from fd2fast.system.streams import say, steady

# Columns of the narrowest page of help: on fewer tyro never ends.
_NARROWEST = 40

T = TypeVar("T")
_BARE = tyro.conf.arg(name="")  # no "config." before every option
Bare = Annotated[T, _BARE]
FilePath = Annotated[Path, tyro.conf.arg(metavar="PATH")]


def _bare(kind: type[Any]) -> Any:
    """`Bare` of a class that is known when it runs only."""
    return Annotated[kind, _BARE]


def _stage(name: str, about: str) -> Callable[[Sequence[str]], None]:
    """The command of a stage: options for its settings and for the folders of its inputs."""

    def command(arguments: Sequence[str]) -> None:
        offered = {stage: OFFERED[stage] if stage in OFFERED else spec(stage).command() for stage in STAGES}
        makers = {one.output: stage for stage, one in reversed(offered.items())}
        _parse(_stage_function(name, about, offered[name], makers), arguments, name)

    command.__doc__ = about
    return command


def _stage_function(name: str, about: str, offered: Command, makers: Mapping[type, str]) -> Callable[..., None]:
    """What tyro makes the options of a stage from. makers: for a type of artifact, the command that makes it."""
    options = {one.option or one.name: one for one in offered.inputs}

    def function(config: Any, *, out: Path, overwrite: bool = False, **folders: Any) -> None:
        inputs: list[Any] = []
        for option, one in options.items():
            given = folders[option]
            if one.several:
                inputs.append([one.type.load(folder) for folder in given])
            else:
                inputs.append(None if given is None else one.type.load(given))
        stage = spec(name)  # which loads torch
        _done(stage.run(config, out, *inputs, overwrite=overwrite), stage.say)

    def keyword(name: str, annotation: Any, default: Any) -> inspect.Parameter:
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)

    required = inspect.Parameter.empty
    parameters = [
        inspect.Parameter(
            "config",
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            annotation=_bare(offered.config),
            default=offered.config(),
        )
    ]
    told = []
    for option, one in options.items():
        if one.several:
            parameters.append(keyword(option, tuple[FilePath, ...], ()))
        else:
            parameters.append(
                keyword(option, FilePath | None, None) if one.optional else keyword(option, FilePath, required)
            )
        note = f"; {one.note}" if one.note else ""
        told.append(f"{option}: Folder{'s' if one.several else ''} made by `fd2fast {makers[one.type]}`{note}.")
    parameters += [keyword("out", FilePath, offered.out or required), keyword("overwrite", bool, False)]
    told += [
        "out: Folder of the result.",
        "overwrite: Make it anew when the folder holds a result with other settings.",
    ]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    arguments = "\n".join(f"    {line}" for line in told)
    function.__doc__ = "\n\n".join([about, *offered.examples, f"Args:\n{arguments}"])
    return function


def report(*, run: FilePath) -> None:
    """Draw the table and the pictures of a run again from its manifests.

    Args:
        run: Output folder of `fd2fast run`.
    """
    from fd2fast.pipeline import report_of

    say(report_of(run))


def info() -> None:
    """Print versions, devices and, for each operation, which backend runs and why not another."""
    from fd2fast.info import describe

    say(describe())


def _run(config: RunConfig, overwrite: bool, dry_run: bool = False) -> None:
    from fd2fast.pipeline import run

    run(config, overwrite=overwrite, dry=dry_run)


def run(arguments: Sequence[str]) -> None:
    """Run every stage. --preset and --config choose the defaults that the other options then change."""
    name, rest = _take(list(arguments), "--preset", "typefaces")
    file, rest = _take(rest, "--config", None)
    default = preset(name or "typefaces")
    if ADDED:
        from fd2fast.graph import with_settings

        default = with_settings(default, {added: spec(added) for added in ADDED})
    if file is not None:
        default = from_toml(expand(file, "--config"), default)
    if "--quick" in rest:
        rest = [argument for argument in rest if argument != "--quick"]
        default = quick(default)

    def command(config: Bare[RunConfig] = default, *, overwrite: bool = False, dry_run: bool = False) -> None:
        _run(config, overwrite, dry_run)

    command.__annotations__["config"] = _bare(type(default))  # with the settings of added stages
    command.__doc__ = f"""Do everything: data set, teachers, patches, distilled images, soft labels, students, report.

    Without options: the built-in typefaces, some minutes on two cores. Examples:

    fd2fast run

    fd2fast run --preset cub --data.root ~/CUB_200_2011

    fd2fast run --methods sre2l++_fd2 fadrm+_fd2 --teachers ResNet18 MobileNetV2 --ipc 1 3

    fd2fast run --config mine.toml --distill.lr 0.1

    fd2fast run --quick

    fd2fast run --preset cub --data.root ~/CUB_200_2011 --dry-run

    {{methods}}

    --quick gives a first table of the same rows: half of the teachers' epochs, a third of the iterations, label epochs and
    student epochs, one student each, in a folder of its own (runs/typefaces-quick).

    Run the same command again to resume; finished stages are kept. --preset NAME takes its defaults from one of
    {", ".join(PRESETS)}; --config FILE.toml changes them; every option below changes both.

    Args:
        overwrite: Make results anew that were made with other settings.
        dry_run: Check everything, print what would be done and what it takes, and stop; nothing is written or fetched.
    """
    _parse(command, rest, "run")


def bench(arguments: Sequence[str]) -> None:
    """Measure: fd2fast bench NAME [OPTIONS] runs bench/NAME.py of the source checkout."""
    import importlib.util
    import runpy

    import fd2fast

    folder = Path(fd2fast.__file__).parents[1] / "bench"
    package = importlib.util.spec_from_file_location("bench", folder / "__init__.py")
    if package is None or not (folder / "__init__.py").is_file():
        raise UserError('benches are part of the source checkout: install it with pip install -e ".[test]"')
    found = {
        path.stem: path
        for path in sorted(folder.glob("*.py"))
        if path.stem not in ("registry", "shapes") and "__main__" in path.read_text()
    }
    if not arguments or arguments[0] in ("-h", "--help"):
        say(f"usage: fd2fast bench NAME [OPTIONS]     (fd2fast bench NAME --help)\n\nnames: {', '.join(found)}")
        return
    if arguments[0] not in found:
        raise UserError(f"unknown bench {arguments[0]!r}: {nearest(arguments[0], found)}")
    sys.modules["bench"] = importlib.util.module_from_spec(package)  # of this checkout, wherever it is started
    sys.argv = [str(found[arguments[0]]), *arguments[1:]]
    runpy.run_module(f"bench.{arguments[0]}", run_name="__main__", alter_sys=True)


def import_(*, checkpoint: FilePath, dataset: FilePath, model: str, out: FilePath, overwrite: bool = False) -> None:
    """Turn a teacher of the released reference code into a teacher artifact.

    Args:
        checkpoint: {Model}_M{M}_{alpha}cal.pth, read without executing anything in it.
        dataset: Folder made by `fd2fast datasets`: its classes must be the teacher's.
        model: Backbone name, e.g. ResNet18.
        out: Folder of the result.
        overwrite: Make it anew when the folder holds a result with other settings.
    """
    from fd2fast import artifacts
    from fd2fast.stages.exchange import import_teacher

    _done(import_teacher(checkpoint, model, out, artifacts.Dataset.load(dataset), overwrite=overwrite))


def export(*, artifact: FilePath, out: FilePath, ipc: int | None = None) -> None:
    """Write an artifact for other programs: a teacher as the reference's checkpoint, images as an image folder.

    Args:
        artifact: Folder of a teacher or of distilled images.
        out: Folder to write to.
        ipc: Images: only ids 0 .. ipc-1 of each class.
    """
    from fd2fast import artifacts
    from fd2fast.stages.exchange import export_artifact

    say(export_artifact(artifacts.load(artifact), out, ipc=ipc))


def _done(artifact: Any, told: Callable[[Any], str] | None = None) -> None:
    if not is_first():
        return
    if told is not None:
        say(told(artifact))
        return
    say(f"{artifact.kind}: {artifact.path} ({artifact.measured['seconds']:.1f} s)")
    for name, value in artifact.facts.items():
        text = str(value)
        say(f"  {name}: {text if len(text) < 100 else text[:97] + '...'}")


def _take(arguments: list[str], option: str, default: str | None) -> tuple[str | None, list[str]]:
    """Pull `option VALUE` or `option=VALUE` out of the arguments."""
    for at, argument in enumerate(arguments):
        if argument == option:
            if at + 1 >= len(arguments):
                raise UserError(f"{option} wants a value")
            return arguments[at + 1], arguments[:at] + arguments[at + 2 :]
        if argument.startswith(option + "="):
            return argument[len(option) + 1 :], arguments[:at] + arguments[at + 1 :]
    return default, arguments


def _parse(function: Callable[..., None], arguments: Sequence[str], name: str) -> None:
    """Call `function` with the options of the command `name`, the paths among them expanded."""
    faults: list[str] = []
    registry = tyro.constructors.ConstructorRegistry()

    def path(given: list[str]) -> Path:
        try:
            return expand(given[0])
        except UserError as error:  # tyro would show it in its own way
            faults.append(str(error))
            return Path(given[0])

    @registry.primitive_rule
    def rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Path] | None:
        if info.type is not Path:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=path,
            is_instance=lambda value: isinstance(value, Path),
            str_from_instance=lambda value: [str(value)],
        )

    @functools.wraps(function)
    def checked(*values: Any, **named: Any) -> None:
        refuse(dict.fromkeys(faults))

        def whole(value: Any) -> Any:
            return expanded(value) if dataclasses.is_dataclass(value) else value

        function(*map(whole, values), **{key: whole(value) for key, value in named.items()})

    if "{methods}" in (function.__doc__ or ""):
        checked.__doc__ = (function.__doc__ or "").replace("{methods}", _methods())
    with registry:
        tyro.cli(checked, args=list(arguments), prog=f"fd2fast {name}")


def _methods() -> str:
    """The registered methods in one paragraph of help."""
    from fd2fast.methods import BASELINES, METHODS

    optimising, selecting = (
        "; ".join(f"{name}: {method.summary}" for name, method in table.items()) for table in (METHODS, BASELINES)
    )
    return f"Methods. {optimising}. Selection of real images. {selecting}."


def _simple(function: Callable[..., None], name: str) -> Callable[[Sequence[str]], None]:
    def command(arguments: Sequence[str]) -> None:
        _parse(function, arguments, name)

    command.__doc__ = function.__doc__
    return command


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "run": run,
    **{name: _stage(name, about) for name, (_, about) in STAGES.items()},
    "report": _simple(report, "report"),
    "bench": bench,
    "import": _simple(import_, "import"),
    "export": _simple(export, "export"),
    "info": _simple(info, "info"),
}


def commands() -> dict[str, Callable[[Sequence[str]], None]]:
    """Every command, with those of stages that were added later."""
    return COMMANDS | {name: _stage(name, STAGES[name][1]) for name in ADDED if name not in COMMANDS}


def _shared() -> list[str]:
    """Commands whose work a torchrun job shares."""
    from fd2fast.stages import specs

    return [*(name for name, stage in specs().items() if stage.shared), "run"]


def usage() -> str:
    """The first help page."""
    lines = [f"fd2fast {__version__}: distil a fine-grained image data set into a few synthetic images per class", ""]
    lines += ["usage: fd2fast COMMAND [OPTIONS]     (fd2fast COMMAND --help explains the options)", ""]
    lines += [f"  {name:9} {(command.__doc__ or '').strip().splitlines()[0]}" for name, command in commands().items()]
    return "\n".join(lines)


@steady()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 2 for a user's error, 1 for one of the surroundings, 70 for one of the program.

    130 when interrupted, 143 when ended by SIGTERM. FD2FAST_DEBUG=1 shows tracebacks.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        say(usage())
        return 0
    if arguments[0] in ("--version", "version"):
        say(__version__)
        return 0
    if shutil.get_terminal_size().columns < _NARROWEST:
        os.environ["COLUMNS"] = str(_NARROWEST)
    stopping.be_deaf_at_exit()
    try:
        with stopping.raising(lambda number: _stopped(arguments[0], number)):
            show_notes()
            threads.settle()
            _command(arguments)
    except UserError as error:
        _complain(error, str(error))
        return 2
    except KeyboardInterrupt as error:
        code = stopping.exit_code(error)
        _stopped(arguments[0], code - 128)
        return code
    except BaseException as error:
        # a panic of a library in Rust (safetensors) is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        told, code = failure.line(error, arguments)
        _complain(error, told)
        return code
    return 0


def _command(arguments: Sequence[str]) -> None:
    name = arguments[0]
    if name not in commands():
        raise UserError(f"unknown command {name!r}: {nearest(name, commands())}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and name not in (shared := _shared()):
        raise UserError(f"{name} runs in one process: start it without torchrun ({', '.join(shared)} can share)")
    commands()[name](arguments[1:])


def _complain(error: BaseException, told: str) -> None:
    """One line on stderr, which says whose it is where several processes write."""
    if failure.wants_traceback():
        traceback.print_exception(error)
    rank = os.environ.get("RANK", "?") if os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1") else ""
    whose = f" (process {rank} of the job)" if rank else ""
    say(f"error{whose}: {told}", error=True)


def _stopped(command: str, number: int) -> None:
    by = "" if number == signal.SIGINT else f" by {stopping.SIGNALS.get(signal.Signals(number).name, number)}"
    resumes = command not in ("bench", "info")
    told = f"stopped{by}" + ("; the same command goes on from the last checkpoint" if resumes else "")
    say(f"\n{told}", error=True)
