"""Import directions: each room imports only rooms before it; every file says its one job in its first line."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "fd2fast").rglob("*.py")) + sorted((ROOT / "kernels").glob("*.py"))
BENCH = sorted((ROOT / "bench").glob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
# Modules of tests/ that are imported by their plain names.
HELPERS = {path.stem for path in TESTS if path.parent == ROOT / "tests"}

# Room -> rooms it may import. Files directly below fd2fast/ and in GROUPS are rooms of their own name.
BASE = {"errors", "config", "fd2fast"}
ALLOWED: dict[str, set[str]] = {
    # its names are those of api, which it imports when they are asked for
    "fd2fast": set(),
    "api": BASE | {"artifacts", "data", "methods", "models", "paths", "pipeline", "stages"},
    "errors": set(),
    "limits": set(),
    "causes": {"errors", "limits"},
    "paths": {"errors"},
    "ranges": {"errors", "paths"},
    "config": {"errors", "ranges"},
    "recipe": {"config"},
    "presets": BASE | {"causes", "ranges"},
    "space": BASE,
    "seeding": set(),
    "schedules": set(),
    "streams": set(),
    "progress": {"streams"},
    "processes": {"errors"},
    "writer": set(),
    "sources": BASE,
    "lock": {"causes", "errors"},
    "artifacts": BASE | {"causes", "lock", "ranges", "sources"},
    "pictures": {"artifacts", "streams"},
    "device": BASE | {"isa", "limits"},
    "_planner": set(),
    "_frozen": set(),
    "_crop": set(),
    "_adam": set(),
    "planner": BASE | {"_planner"},
    "reference": {"errors", "planner", "recipe", "schedules", "seeding"},
    "kernels": set(),
    "ops": BASE | {"reference", "kernels", "_crop", "_adam", "_frozen"},
    "data": BASE
    | {"artifacts", "lock", "ops", "pictures", "progress", "ranges", "seeding", "sources", "space", "streams"},
    "models": BASE | {"artifacts", "causes", "device", "isa", "ops", "reference", "seeding"},
    "threads": set(),
    "isa": {"_frozen", "errors"},
    "tasks": {"errors", "streams", "threads"},
    "student": BASE | {"artifacts", "data", "device", "models", "schedules", "seeding", "threads"},
    "methods": BASE | {"recipe", "schedules"},
    "entries": BASE | {"methods"},
    "commands": {"artifacts", "config"},
    "graph": BASE | {"artifacts", "commands", "data", "entries", "space"},
    "step": BASE | {"methods", "models", "ops", "recipe", "schedules"},
    "memory": BASE | {"causes", "device", "limits", "models", "recipe", "step"},
    "start": BASE | {"artifacts", "data", "methods", "models", "ops", "planner", "recipe", "seeding", "step"},
    "runner": BASE
    | {
        "artifacts",
        "data",
        "start",
        "memory",
        "models",
        "progress",
        "recipe",
        "step",
        "threads",
        "processes",
        "writer",
    },
    "baselines": BASE | {"artifacts", "data", "models", "device", "seeding", "progress"},
    "stages": BASE
    | {
        "artifacts",
        "baselines",
        "data",
        "device",
        "runner",
        "entries",
        "graph",
        "start",
        "lock",
        "memory",
        "methods",
        "models",
        "ops",
        "pictures",
        "planner",
        "tasks",
        "progress",
        "recipe",
        "schedules",
        "seeding",
        "sources",
        "space",
        "step",
        "streams",
        "student",
        "threads",
        "processes",
    },
    "dropin": BASE
    | {
        "artifacts",
        "data",
        "device",
        "runner",
        "failure",
        "start",
        "lock",
        "memory",
        "methods",
        "models",
        "ops",
        "pictures",
        "planner",
        "progress",
        "recipe",
        "seeding",
        "step",
        "stopping",
        "streams",
        "threads",
        "processes",
    },
    "info": BASE | {"device", "isa", "ops", "threads"},
    "pipeline": BASE
    | {"artifacts", "data", "entries", "graph", "lock", "models", "ranges", "space", "stages", "streams", "processes"},
    "failure": {"causes", "errors"},
    "stopping": set(),
    "cli": BASE
    | {
        "artifacts",
        "commands",
        "failure",
        "graph",
        "info",
        "methods",
        "paths",
        "pipeline",
        "presets",
        "progress",
        "stages",
        "stopping",
        "streams",
        "threads",
        "processes",
    },
    "__main__": {"cli"},
}


# Packages whose modules are rooms of their own.
GROUPS = {"settings", "system", "distillation", "students"}


def room_of(path: Path) -> str:
    relative = path.relative_to(ROOT)
    if relative.parts[0] == "kernels":
        return "kernels"
    if len(relative.parts) == 2 or relative.parts[1] in GROUPS:
        return "fd2fast" if path.name == "__init__.py" else path.stem
    return relative.parts[1]


def imported(path: Path) -> set[str]:
    """The fd2fast modules a file imports, anywhere in it."""
    return {name for name in imports_of(path) if name == "fd2fast" or name.startswith("fd2fast.")}


def imports_of(path: Path) -> set[str]:
    """The full names of all modules (and what is taken from them) that a file imports, anywhere in it."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    if path == ROOT / "fd2fast/__init__.py":  # the types of its names
        tree.body = [node for node in tree.body if not isinstance(node, ast.If)]
    package = ("fd2fast", *path.relative_to(ROOT).with_suffix("").parts[1:-1])
    if path.relative_to(ROOT).parts[0] == "kernels":
        package = ("fd2fast", "kernels")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            found.add(module)
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def rooms_imported(path: Path) -> set[str]:
    rooms = set()
    for name in imported(path):
        parts = [part for part in name.split(".") if part not in GROUPS]
        if len(parts) > 1 and parts[1] != "__version__":
            rooms.add(parts[1])
    return {room for room in rooms if room in ALLOWED} - {room_of(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path):
    room = room_of(path)
    assert room in ALLOWED, f"{room} is a new room: say in ALLOWED what it may import"
    assert rooms_imported(path) <= ALLOWED[room]


@pytest.mark.parametrize("path", sorted((ROOT / "fd2fast" / "stages").glob("*.py")), ids=lambda p: p.stem)
def test_stages_do_not_import_each_other(path):
    stages = {p.stem for p in (ROOT / "fd2fast" / "stages").glob("*.py") if p.stem != "__init__"}
    used = {name.split(".")[2] for name in imported(path) if name.startswith("fd2fast.stages.")}
    assert used & stages <= {path.stem}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_first_line_says_the_job(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert docstring, f"{path} has no docstring"
    assert len(docstring.splitlines()[0]) > 15


def test_the_allowed_directions_have_no_circle():
    order: list[str] = []
    while len(order) < len(ALLOWED):
        ready = [room for room in ALLOWED if room not in order and ALLOWED[room] - {room} <= set(order)]
        assert ready, f"circle among {set(ALLOWED) - set(order)}"
        order += ready


@pytest.mark.parametrize("path", FILES + BENCH, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_but_tests_imports_tests_and_the_package_not_bench(path):
    forbidden = {"tests", *HELPERS} | ({"bench"} if path in FILES else set())
    names = {name.split(".")[0] for name in imports_of(path)}
    assert not names & forbidden


@pytest.mark.parametrize("path", BENCH + TESTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_benches_and_tests_do_not_change_the_search_path(path):
    changed = [
        ast.unparse(node)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("sys.path.")
    ]
    assert not changed


def test_every_room_is_on_the_page():
    page = (ROOT / "fd2fast/README.md").read_text().split("## Rooms")[1].split("## Words")[0]
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| ")]
    listed = set(re.findall(r"`(\w+)`", "\n".join(rows)))
    rooms = {room_of(path) for path in FILES} - {"fd2fast", "__main__"}
    assert listed == rooms
