"""A tiny run of every method gives what data/recorded.json holds of it, so that no change of code changes results unnoticed.

In an environment that is recorded (`record.Environment`), every hash and number is equal. In another, numbers and projections
agree with the nearest recorded one within TOLERANCES. A change that is meant to change results records them anew, in each
environment of the file that can be had, and says so in its commit:

    python tests/record.py                                                      # fp32, and bf16 where the processor has it
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python tests/record.py     # as a processor without AVX-512
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import record
import torch
from record import Environment, Material, Outcome

# Largest relative distance from the nearest record, by precision and array; those that are not named are equal.
# fp32: about 5 times what AVX2 and AVX-512 are apart (a pixel or two rounded otherwise). bf16: about 1.5 times what it is apart
# from fp32. One image of the test set is 0.1 to 0.2 of an accuracy.
TOLERANCES: dict[str, dict[str, float]] = {
    "fp32": {
        "weights": 1.5e-3,
        "images": 1e-3,
        "terms": 2e-5,
        "logits": 1e-3,
        "views": 1e-6,
        "student": 5e-3,
        "losses": 0.01,
        "accuracies": 0.2,
    },
    "bf16": {
        "weights": 0.06,
        "images": 0.25,
        "terms": 3e-3,
        "logits": 0.3,
        "views": 1e-6,
        "student": 0.03,
        "losses": 1.0,
        "accuracies": 0.75,
    },
}
# The same for students of equal images and labels, whose few steps amplify little (fp32: 3e-7; losses have six decimals).
STUDENT_TOLERANCES: dict[str, dict[str, float]] = {
    "fp32": {"student": 1e-5, "losses": 2e-4, "accuracies": 0.2},
    "bf16": {"student": 0.01, "losses": 0.05, "accuracies": 0.3},
}


@pytest.fixture(scope="session")
def records() -> dict[Environment, dict[str, Outcome]]:
    return record.load_records()


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Material]:
    """Made, and used, in one thread and without a choice of kernels by time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with record.no_pictures(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("FD2FAST_TUNE", "0")
        yield record.make_material(tmp_path_factory.mktemp("material"))
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def glyphs(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return record.run_row("typefaces", material, tmp_path_factory.mktemp("glyphs"), "fp32")


def nearest(here: Environment, records: dict[Environment, dict[str, Outcome]]) -> Environment:
    return min((e for e in records if e.precision == here.precision), key=here.unlike)


def distance(found: dict[str, Any], recorded: dict[str, Any]) -> float:
    """Relative: of projections in the L2 norm, of numbers the largest; infinite where one has more of them."""
    kind = "projections" if "projections" in recorded else "numbers"
    mine, theirs = np.array(found[kind]), np.array(recorded[kind])
    if mine.shape != theirs.shape:
        return float("inf")
    if kind == "projections":
        return float(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs))
    apart = np.abs(mine - theirs)
    return float(np.divide(apart, np.abs(theirs), out=np.where(apart > 0, np.inf, 0.0), where=theirs != 0).max())


def tolerance(name: str, found: Outcome, recorded: Outcome, precision: str) -> float:
    taught_alike = all(found.get(n) == recorded.get(n) for n in ("images", "logits"))
    own = STUDENT_TOLERANCES[precision] if taught_alike else {}
    return own.get(name, TOLERANCES[precision].get(name, 0.0))


def differences(found: Outcome, recorded: Outcome, precision: str | None) -> list[str]:
    """What is not the recorded, one line each, with the tolerances of `precision`; without, every bit counts."""
    lines = [f"{name}: only in one of them" for name in sorted(found.keys() ^ recorded.keys())]
    for name in recorded:
        if name not in found or found[name] == recorded[name]:
            continue
        apart = distance(found[name], recorded[name])
        allowed = tolerance(name, found, recorded, precision) if precision else 0.0
        if not apart <= allowed or allowed == 0:
            lines.append(f"{name}: {apart:.2g} apart, {allowed:g} allowed")
    return lines


@pytest.mark.parametrize("precision", record.PRECISIONS)
@pytest.mark.parametrize("name", record.ROWS)
def test_result_is_the_recorded(
    name: str,
    precision: str,
    material: Material,
    glyphs: Outcome,
    records: dict[Environment, dict[str, Outcome]],
    tmp_path: Path,
) -> None:
    if reason := record.reason_against(precision):
        pytest.skip(reason)
    here = record.environment(precision)
    known = nearest(here, records)
    if glyphs != records[known]["typefaces"] and (here.pillow, here.matplotlib) != (known.pillow, known.matplotlib):
        pytest.skip(f"pillow {here.pillow} with matplotlib {here.matplotlib} draws other glyphs than recorded")
    found = record.run_row(name, material, tmp_path, precision)
    assert differences(found, records[known][name], None if here in records else precision) == [], (here, known)


def test_every_row_is_recorded(records: dict[Environment, dict[str, Outcome]]) -> None:
    """New methods, too, in every environment."""
    assert {environment.precision for environment in records} == set(record.PRECISIONS)
    for environment, rows in records.items():
        assert list(rows) == list(record.ROWS), environment


@pytest.mark.parametrize("precision", record.PRECISIONS)
def test_comparison_sees_small_changes(precision: str, records: dict[Environment, dict[str, Outcome]]) -> None:
    """One bit where the environment is recorded; twice what is allowed elsewhere."""
    recorded = next(rows for e, rows in records.items() if e.precision == precision)["sre2l++_fd2 paper"]
    assert differences(copy.deepcopy(recorded), recorded, None) == []
    for name, value in recorded.items():
        kind = "projections" if "projections" in value else "numbers"
        allowed = tolerance(name, {**recorded, name: {}}, recorded, precision)
        for factor in (0.5, 2.0):
            other: Outcome = copy.deepcopy(recorded)
            other[name] = {"sha256": "another", kind: list(np.multiply(value[kind], 1 + factor * allowed))}
            assert bool(differences(other, recorded, precision)) == (factor > 1), name
            assert len(differences(other, recorded, None)) == 1, name
    assert differences({n: v for n, v in recorded.items() if n != "images"}, recorded, precision) != []
