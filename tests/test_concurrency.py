"""A few seconds of the campaign of two commands in one folder; the long one is run by hand (tests/campaign/README.md)."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from campaign import concurrency, forks

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the campaign's tools know Linux")


@pytest.mark.parametrize(
    ("errors", "wrong"),
    [
        ("error: x is in use by process 3", False),
        ("error (process 0 of the job): x is in use by process 3\nerror (process 1 of the job): x is in use", False),
        ("a warning that speaks of an error: one", True),
        ("", True),
    ],
)
def test_a_refusal_says_why(errors: str, wrong: bool) -> None:
    assert bool(concurrency.plain(forks.Ended(2, "", errors, 0.1))) is wrong


def test_the_code_of_a_job_is_that_of_the_process_that_failed_first() -> None:
    def before() -> None:
        if os.environ["RANK"] == "1":
            os._exit(2)
        time.sleep(60)

    assert forks.run([], world=2, before=before).code == 2  # the other's is that of its signal


def test_a_few_pairs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.campaign.concurrency", "--out", str(tmp_path), "--count", "10"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [*command, "--last", "datasets"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert (tmp_path / "concurrency.json").is_file(), done.stderr
    assert json.loads((tmp_path / "concurrency.json").read_text()) == {"trials": 10, "faults": []}
