"""The package as installed: light import, kernels in one place only, version, entry point."""

import importlib
import subprocess
import sys
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
