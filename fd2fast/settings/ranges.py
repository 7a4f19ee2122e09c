"""What values a setting may have, declared beside it, and what is wrong with given ones, all at once; pydantic reads them."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval, MinLen, Predicate

from fd2fast.errors import nearest, refuse
from fd2fast.settings.paths import expand

if TYPE_CHECKING:  # loaded where something is checked: help and light imports do without
    from pydantic import TypeAdapter
    from pydantic_core import CoreSchema, ErrorDetails

# Beyond this no count of images, epochs or pixels can be meant, and 32-bit counters end; seeds may be larger.
_MOST = 2**31 - 1
_MOST_SEED = 2**63 - 1


class _AsWritten:
    """A path, or its text, whose home folder and variables are put in where the validation's context asks for it."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], CoreSchema]) -> CoreSchema:
        from pydantic_core import PydanticCustomError, core_schema

        def path(value: Any, info: core_schema.ValidationInfo) -> Path:
            if not isinstance(value, str | Path):
                raise PydanticCustomError("path_type", "not a path")
            return expand(value, "") if info.context and isinstance(value, str) else Path(value)

        return core_schema.with_info_plain_validator_function(path)


def _all_different(values: Sequence[Any]) -> bool:
    return not repeated(values)


# The text says in messages what is wanted; a type that narrows another may say it anew.
Count = Annotated[int, Interval(ge=1, le=_MOST), "a whole number of at least 1"]
NotNegative = Annotated[int, Interval(ge=0, le=_MOST), "a whole number of at least 0"]
Seed = Annotated[int, Interval(ge=0, le=_MOST_SEED), "a whole number of at least 0"]
AnySeed = Annotated[int, Interval(ge=-_MOST_SEED, le=_MOST_SEED)]
Positive = Annotated[float, Gt(0), "a finite number above 0"]
Weight = Annotated[float, Ge(0), "a finite number of at least 0"]
Share = Annotated[float, Interval(ge=0, le=1), "a number within [0, 1]"]
# A share that is not 0, and one that is not 1.
Area = Annotated[float, Interval(gt=0, le=1), "a number within (0, 1]"]
Below1 = Annotated[float, Interval(ge=0, lt=1), "a number within [0, 1)"]
Name = Annotated[str, Predicate(str.strip), "a name"]
Place = Annotated[Path, _AsWritten(), "a path"]
Counts = Annotated[tuple[Count, ...], MinLen(1), "a list of at least one, each a whole number of at least 1"]
Names = Annotated[tuple[Name, ...], MinLen(1), "a list of at least one name"]
Seeds = Annotated[
    tuple[AnySeed, ...], MinLen(1), Predicate(_all_different), "a list of at least one seed, all different"
]


def misfits(config: Any) -> dict[str, str]:
    """What is wrong with a settings object by itself, by field: "must be WANTED, got VALUE"; nested ones check themselves."""
    wrong, given = {}, {}
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        if not _is_table(hint):
            given[name] = value
        elif not dataclasses.is_dataclass(value):
            wrong[name] = f"must be of the type {hint.__name__}, got {_shown(value)}"
    _, faults = _read(type(config), given)
    return wrong | {field: text for (field,), text in faults.items()}


def damage(kind: type[Any], record: Any) -> str:
    """What a record that fd2fast wrote lacks of the dataclass `kind`, or has of another type; "" for a sound one."""
    _, faults = _read(kind, record, whole=True)
    return "; ".join(f"{'.'.join(where)} {text}".strip() for where, text in faults.items())


def fill(default: Any, values: Mapping[str, Any], source: str) -> Any:
    """A copy of settings with the nested `values` put in, paths expanded; UserError with all that is wrong in `source`."""
    good, faults = _read(type(default), values, expanding=True)
    refuse(
        [
            " ".join([f"{source}:", *(f"[{table}]" for table in tables), key, text])
            for (*tables, key), text in faults.items()
        ]
    )
    return _put_in(default, good)


def _put_in(default: Any, values: Mapping[str, Any]) -> Any:
    changes = {name: _put_in(getattr(default, name), v) if isinstance(v, dict) else v for name, v in values.items()}
    return dataclasses.replace(default, **changes)


def _read(
    kind: Any, values: Any, *, expanding: bool = False, whole: bool = False
) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    """The values of any fields of `kind` (whole: of all, others passed over), and what is wrong with them, by place."""
    from pydantic import ValidationError

    try:
        return _reader(kind, whole).validate_python(_plain(values), context=expanding), {}
    except ValidationError as error:
        faults: dict[tuple[str, ...], str] = {}
        for one in error.errors(include_url=False):
            where = _field(kind, one["loc"])
            faults.setdefault(where, _text(kind, where, one, values))
        return {}, faults


@functools.cache
def _reader(kind: Any, whole: bool) -> TypeAdapter[dict[str, Any]]:
    from pydantic import ConfigDict, TypeAdapter

    extra: Literal["ignore", "forbid"] = "ignore" if whole else "forbid"
    rules = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True, extra=extra)
    # a mapping of fields: a dataclass's own would want all of them, and put defaults where a preset says otherwise
    return TypeAdapter(_table(kind, whole, rules))


def _table(kind: type[Any], whole: bool, rules: Any) -> Any:
    import typing_extensions

    make: Any = typing_extensions.TypedDict  # types know of literal ones only
    fields = {name: _table(hint, whole, rules) if _is_table(hint) else hint for name, hint in _hints(kind).items()}
    table = make(kind.__name__, fields, total=whole)
    table.__pydantic_config__ = rules
    return table


def _is_table(hint: Any) -> bool:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _hints(kind: type[Any]) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: hint for name, hint in get_type_hints(kind, include_extras=True).items() if name in names}


def _plain(value: Any, depth: int = 5) -> Any:
    """Numbers of numpy as Python's, lists as tuples: what pydantic takes strictly. Of deeper levels nothing is a setting."""
    if isinstance(value, dict) and depth:
        return {key: _plain(one, depth - 1) for key, one in value.items()}
    if isinstance(value, list | tuple) and depth:
        return tuple(_plain(one, depth - 1) for one in value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _field(kind: Any, place: Sequence[int | str]) -> tuple[str, ...]:
    """The tables and the field that a place within a value belongs to."""
    where: tuple[str, ...] = ()
    for name in place:
        if not _is_table(kind):
            break
        where += (str(name),)
        kind = _hints(kind).get(str(name))
    return where


def _text(kind: Any, where: tuple[str, ...], error: ErrorDetails, value: Any) -> str:
    hint, fields = kind, {}
    for name in where:
        fields = _hints(hint)
        hint = fields.get(name)
        if error["type"] == "missing" and name not in value:
            return "is missing"
        value = value[name]
    if error["type"] == "extra_forbidden":
        return f"is unknown: {_elsewhere(kind, where) or nearest(where[-1], fields)}"
    cause = error.get("ctx", {}).get("error")
    if cause is not None:  # of a validator of ours
        return str(cause).strip()
    limit = error.get("ctx", {}).get("le" if error["type"] == "less_than_equal" else "ge", 0)
    wanted = f"a whole number up to {limit}" if abs(limit) >= _MOST else _wanted(hint)
    return f"must be {wanted}, got {_shown(value)}{_closest(value, hint)}"


def _elsewhere(kind: Any, where: tuple[str, ...]) -> str:
    """In which tables a setting belongs that stands outside of them; "" if in none."""
    key = where[-1].replace("-", "_")
    tables = [f"[{name}]" for name, hint in _hints(kind).items() if _is_table(hint) and key in _hints(hint)]
    return f"it is a setting of {', '.join(tables)}: write it below that line" if tables and len(where) == 1 else ""


def _wanted(hint: Any) -> str:
    """The values that a hint allows, in words."""
    said = [one for one in getattr(hint, "__metadata__", ()) if isinstance(one, str)]
    if said:
        return said[-1]
    kind = hint.__origin__ if get_origin(hint) is Annotated else hint
    origin, arguments = get_origin(kind), get_args(kind)
    if NoneType in arguments:
        return _wanted(next(one for one in arguments if one is not NoneType))
    if origin is Literal:
        return either(arguments)
    if origin is tuple:
        return f"{'a list' if Ellipsis in arguments else f'{len(arguments)} values'}, each {_wanted(arguments[0])}"
    if origin is dict:
        return "a table" if arguments[1] is Any else f"a table, each value {_wanted(arguments[1])}"
    words = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}
    return "a table" if _is_table(kind) else words.get(kind, str(kind))


def either(choices: Sequence[Any]) -> str:
    """'patches, real or noise'."""
    texts = [str(choice) for choice in choices]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"


def _closest(value: Any, hint: Any) -> str:
    literal = next((one for one in (hint, *get_args(hint)) if get_origin(one) is Literal), None)
    known = [one for one in get_args(literal) if isinstance(one, str) and isinstance(value, str)]
    close = difflib.get_close_matches(str(value).lower(), known, n=1, cutoff=0.4)
    return f": did you mean {close[0]!r}?" if close else ""


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def repeated(values: Iterable[Any]) -> list[Any]:
    """Values that come more than once, each once, in order."""
    seen: dict[Any, int] = {}
    for value in values:
        seen[value] = seen.get(value, 0) + 1
    return [value for value, count in seen.items() if count > 1]
