"""The package as installed and as built: light import, kernels in one place only, version, what the wheel holds and does."""

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python(code: str, **kwargs: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **kwargs)  # type: ignore[call-overload]


def test_import_is_light():
    done = python("import sys, fd2fast; print([m for m in ('torch', 'triton', 'timm', 'numpy') if m in sys.modules])")
    assert done.stdout.strip() == "[]", done.stderr


def test_help_needs_no_torch():
    done = python("import sys; from fd2fast.cli import main; main(['--help']); print('torch' in sys.modules)")
    assert done.stdout.strip().splitlines()[-1] == "False", done.stderr


@pytest.mark.parametrize("module", ["fd2fast.ops", "fd2fast.reference", "fd2fast.kernels"])
def test_operations_import_without_triton_or_a_gpu(module):
    done = python(
        f"import sys; sys.modules['triton'] = None\nimport importlib; importlib.import_module({module!r}); print('ok')"
    )
    assert done.stdout.strip() == "ok", done.stderr


def test_a_second_copy_of_the_kernels_is_refused():
    done = python("import kernels", cwd=ROOT)
    assert "import fd2fast.kernels instead" in done.stderr


def test_version_is_the_installed_one():
    import importlib.metadata

    import fd2fast

    assert fd2fast.__version__ == importlib.metadata.version("fd2fast")


@pytest.mark.parametrize("name", ["_planner", "_frozen", "_crop", "_adam"])
def test_extensions_link_neither_torch_nor_cuda(name):
    extension = importlib.import_module(f"fd2fast.{name}")
    linked = subprocess.run(["ldd", extension.__file__], capture_output=True, text=True, check=True).stdout
    names = [line.split()[0] for line in linked.splitlines()]
    assert not [n for n in names if "torch" in n or "cuda" in n or "python" in n]


def build_tools_missing() -> str:
    """What building needs and this environment lacks; "" for nothing."""
    modules = [name for name in ("scikit_build_core", "pybind11", "pip") if importlib.util.find_spec(name) is None]
    programs = [] if shutil.which("cmake") or importlib.util.find_spec("cmake") else ["cmake"]
    compilers = [name for name in (os.environ.get("CXX", "c++"), "g++", "clang++") if shutil.which(name)]
    return ", ".join([*modules, *programs, *([] if compilers else ["a C++ compiler"])])


def built(kind: str, source: Path, out: Path, **environment: str) -> Path:
    """The archive that the build backend makes of the folder `source`, without network or isolation."""
    out.mkdir()
    launcher = environment.pop("launcher", None)
    settings = {"cmake.define.CMAKE_CXX_COMPILER_LAUNCHER": launcher} if launcher else {}
    code = (
        f"from scikit_build_core.build import build_{kind} as build; print('made', build({str(out)!r}, {settings!r}))"
    )
    done = python(code, cwd=source, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out / re.findall(r"^made (.+)$", done.stdout, re.MULTILINE)[-1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the unpacked source archive, as whoever installs that does; not optimised, which takes most of the time."""
    if missing := build_tools_missing():
        pytest.skip(f"no wheel can be built here: {missing} missing")
    folder = tmp_path_factory.mktemp("build")
    archive = built("sdist", ROOT, folder / "sdist")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    (source,) = (path for path in folder.iterdir() if path.name.startswith("fd2fast-"))
    launcher = folder / "launcher"
    launcher.write_text('#!/bin/sh\nexec "$@" -O0\n')
    launcher.chmod(0o755)
    cores = str(len(os.sched_getaffinity(0)))
    return built("wheel", source, folder / "wheel", launcher=str(launcher), CMAKE_BUILD_PARALLEL_LEVEL=cores)


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"fd2fast", "-".join(wheel.name.split("-")[:2]) + ".dist-info"}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "fd2fast").rglob("*.py") if "kernels" not in path.parts}
    kernels = {f"fd2fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources | kernels
    assert "fd2fast/py.typed" in names
    extensions = {name.split(".")[0] for name in names if name.endswith(".so")}
    assert extensions == {f"fd2fast/{name}" for name in ("_planner", "_frozen", "_crop", "_adam")}
    assert not [name for name in names if re.search(r"(^|/)(tests?|bench|csrc)(/|_|$)|\.(cpp|h|o)$", name)]


@pytest.mark.slow
def test_the_wheel_works_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(target), str(wheel)], check=True, cwd=elsewhere)
    environment = {**os.environ, "PYTHONPATH": str(target), "FD2FAST_CACHE": ""}
    # an editable installation has a finder of its own that comes before every path
    own = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in type(f).__module__]\n"
    code = (
        f"{own}import fd2fast, fd2fast.kernels, fd2fast._planner, fd2fast._frozen, fd2fast._crop, fd2fast._adam as last\n"
        "assert fd2fast.distill.__module__ == 'fd2fast.api'\n"
        "print(fd2fast.__file__, fd2fast.kernels.__file__, last.__file__, sep='\\n')"
    )
    done = python(code, cwd=elsewhere, env=environment)
    assert done.returncode == 0, done.stderr
    files = [Path(line) for line in done.stdout.splitlines()]
    assert len(files) == 3
    assert all(file.is_relative_to(target) for file in files), files
    info = python(f"{own}from fd2fast.cli import main; sys.exit(main(['info']))", cwd=elsewhere, env=environment)
    assert info.returncode == 0, info.stderr
    assert str(target) in info.stdout  # where the extensions lie
    assert "bn_matching" in info.stdout
