"""Constraints and bounds: what is pinned is required, what is required is bounded, newer versions are told."""

import re
import tomllib
from pathlib import Path

import newer_versions
import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def required() -> dict[str, str]:
    """Bounds by package of the dependencies and the test tools."""
    lines = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
    return {re.split(r"[<>=!~]", line)[0].lower(): line for line in lines}


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-floor.txt"])
def test_only_what_is_required_is_pinned(name):
    pinned = newer_versions.pinned((ROOT / "tests" / name).read_text())
    assert pinned <= {*required(), "triton"}  # triton comes with torch


def test_everything_required_is_pinned_and_bounded():
    assert set(required()) <= newer_versions.pinned((ROOT / "tests/constraints.txt").read_text())
    for line in PROJECT["dependencies"]:
        assert ">=" in line, line
        assert "<" in line, line


def test_newer_versions_are_told():
    outdated = [
        {"name": "Torch", "version": "2.11.0", "latest_version": "2.15.0"},
        {"name": "somebody_elses", "version": "1", "latest_version": "2"},
        {"name": "scikit_learn", "version": "1.8", "latest_version": "1.9"},
    ]
    told = newer_versions.newer({"torch", "scikit-learn", "numpy"}, outdated)
    assert told == ["scikit-learn 1.8 -> 1.9", "torch 2.11.0 -> 2.15.0"]


def test_without_a_registry_nothing_is_said(monkeypatch, capsys):
    def missing(*arguments, **settings):
        raise OSError("no network")

    monkeypatch.setattr(newer_versions.subprocess, "run", missing)
    newer_versions.main()
    assert capsys.readouterr().out == ""
