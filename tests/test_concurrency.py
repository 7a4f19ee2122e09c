"""A few seconds of the campaign of two commands in one folder; the long one is run by hand (tests/campaign/README.md)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the campaign's tools know Linux")


def test_a_few_pairs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.campaign.concurrency", "--out", str(tmp_path), "--count", "10"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [*command, "--last", "datasets"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (tmp_path / "concurrency.json").is_file(), done.stderr
    assert json.loads((tmp_path / "concurrency.json").read_text()) == {"trials": 10, "faults": []}
