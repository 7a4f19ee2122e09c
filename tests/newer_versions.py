"""Says which packages of tests/constraints.txt the registry has in newer versions; silent where it cannot be reached."""

import json
import re
import subprocess
import sys
from pathlib import Path


def pinned(text: str) -> set[str]:
    """Names of the packages in a constraints file, as registries write them."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return {re.split(r"[<>=!~ ]", line)[0].lower().replace("_", "-") for line in lines if line}


def newer(names: set[str], outdated: list[dict[str, str]]) -> list[str]:
    """Lines "name installed -> latest" of what pip reports, for these packages."""
    rows = [(row["name"].lower().replace("_", "-"), row["version"], row["latest_version"]) for row in outdated]
    return [f"{name} {installed} -> {latest}" for name, installed, latest in sorted(rows) if name in names]


def main() -> None:
    """Print the lines; any trouble with pip or the network is no trouble of the tests."""
    command = [sys.executable, "-m", "pip", "list", "--outdated", "--format", "json", "--disable-pip-version-check"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        found = newer(pinned((Path(__file__).parent / "constraints.txt").read_text()), json.loads(done.stdout))
    except (OSError, subprocess.SubprocessError, ValueError, KeyError):
        return
    if found:
        print("newer versions exist than were tried:", "; ".join(found))


if __name__ == "__main__":
    main()
