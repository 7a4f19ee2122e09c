"""Whether settings can be right by themselves: types, choices, finite numbers and ranges, all faults at once."""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

# Field, test of its value, and what is wanted, in words.
Bound = tuple[str, Callable[[Any], bool], str]

# Beyond this no count of images, epochs or pixels can be meant, and 32-bit counters end; seeds may be larger.
_MOST = 2**31 - 1
_SEED = 2**63 - 1
# What is wanted of a number where no bound says it better.
_NUMBERS = ("a whole number", "a finite number")


def out_of_range(config: Any, stage: str, bounds: Iterable[Bound] = ()) -> list[str]:
    """Faults of a settings object, in the order of its fields: "STAGE.FIELD must be WANTED, got VALUE", one for each field.

    Checked from the type hints: types (a whole number may stand for a float, True for no number), Literal choices, numbers that
    are finite. Then the bounds, whose tests see only values of the right type that are not None.
    """
    hints, bounds = _hints(type(config)), list(bounds)
    found: list[str] = []
    for name, hint in hints.items():
        value = getattr(config, name)
        own = [(fits, text) for field, fits, text in bounds if field == name]
        wanted = _misfit(value, hint, _SEED if name in ("seed", "seeds") else _MOST)
        if wanted in _NUMBERS and own:
            wanted = own[0][1]
        if wanted is None and value is not None:
            wanted = next((text for fits, text in own if not _passes(fits, value)), None)
        if wanted is not None:
            found.append(f"{stage}.{name} must be {wanted}, got {value!r}{_closest(value, hint)}")
    return found


def _hints(kind: type) -> dict[str, Any]:
    names = {one.name for one in dataclasses.fields(kind)}
    return {name: hint for name, hint in get_type_hints(kind).items() if name in names}


def _passes(fits: Callable[[Any], bool], value: Any) -> bool:
    try:
        return bool(fits(value))
    except TypeError:  # another field, which the test compares with, has a wrong type and its own fault
        return True


def _misfit(value: Any, hint: Any, most: int) -> str | None:
    """What was wanted, where the value does not fit the hint."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        return None if value in arguments else either(arguments)
    if type(None) in arguments:
        if value is None:
            return None
        return _misfit(value, next(one for one in arguments if one is not type(None)), most)
    if origin is tuple:
        return _sequence_misfit(value, arguments, most)
    if dataclasses.is_dataclass(hint):
        return None if dataclasses.is_dataclass(value) else "a group of settings"
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if hint is int:
        if not number or not isinstance(value, numbers.Integral):
            return _NUMBERS[0]
        return None if abs(int(value)) <= most else f"a number up to {most}"
    if hint is float:
        return None if number and math.isfinite(float(value)) else _NUMBERS[1]
    if hint is bool:
        return None if isinstance(value, bool) else "true or false"
    if hint is str:
        return None if isinstance(value, str) and value.strip() else "a name"
    if hint is Path:
        return None if isinstance(value, str | Path) else "a path"
    return None


def _sequence_misfit(value: Any, arguments: tuple[Any, ...], most: int) -> str | None:
    if not isinstance(value, list | tuple):
        return "a list"
    if arguments[-1] is Ellipsis:
        kinds: Sequence[Any] = [arguments[0]] * len(value)
    elif len(arguments) != len(value):
        return f"{len(arguments)} values"
    else:
        kinds = arguments
    wanted = next((text for one, kind in zip(value, kinds, strict=True) if (text := _misfit(one, kind, most))), None)
    return None if wanted is None else f"a list, each {wanted}"


def either(choices: Sequence[Any]) -> str:
    """'patches, real or noise'."""
    texts = [str(choice) for choice in choices]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"


def _closest(value: Any, hint: Any) -> str:
    options = [hint, *get_args(hint)]
    known = [str(one) for option in options if get_origin(option) is Literal for one in get_args(option)]
    close = difflib.get_close_matches(str(value).lower(), known, n=1, cutoff=0.4) if isinstance(value, str) else []
    return f": did you mean {close[0]!r}?" if close else ""


def repeated(values: Iterable[Any]) -> list[Any]:
    """Values that come more than once, each once, in order."""
    seen: dict[Any, int] = {}
    for value in values:
        seen[value] = seen.get(value, 0) + 1
    return [value for value, count in seen.items() if count > 1]
