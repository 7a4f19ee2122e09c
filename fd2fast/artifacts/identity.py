"""What a result is a function of, as it is recorded, and the hash of it that makes the id."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from fd2fast.artifacts.files import plain

# What a manifest says beside its identity.
BESIDE = ("id", "places", "versions", "measured")


def config_dict(config: Any) -> dict[str, Any]:
    """The fields of a config that decide the result.

    Left out are fields marked metadata={"result": False}, those that earlier versions did not know ({"added": True}) at their
    default, and the places of files ({"place": True}) where one is given: the content of what lies there decides.
    """
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.metadata.get("result", True)}
    for field in dataclasses.fields(config):
        added = field.metadata.get("added") and values[field.name] == field.default
        if added or (field.metadata.get("place") and values[field.name] is not None):
            del values[field.name]
    return json.loads(json.dumps(values, default=plain))


def place_fields(config: Any) -> list[str]:
    """The fields that say where something read from outside lies."""
    return [f.name for f in dataclasses.fields(config) if f.metadata.get("place")]


def recorded_settings(config: Any, recorded: dict[str, Any]) -> dict[str, Any]:
    """Recorded settings as the config's class has them today: without places and their hashes, newer fields at their default."""
    fields = [f for f in dataclasses.fields(config) if f.metadata.get("result", True)]
    added = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    known = json.loads(json.dumps(added, default=plain)) | recorded
    places = place_fields(config)
    return {name: value for name, value in known.items() if name.removesuffix("_sha256") not in places}


def digest(value: Any) -> str:
    """sha256 of a value's canonical JSON, 64 hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=plain)
    return hashlib.sha256(text.encode()).hexdigest()


def identity_digest(manifest: Mapping[str, Any]) -> str:
    """The id of a manifest: the hash of all of it that decides the result, of parents their ids."""
    parents = {name: parent["id"] for name, parent in manifest["parents"].items()}
    return digest({key: value for key, value in manifest.items() if key not in BESIDE} | {"parents": parents})


def first_difference(found: Any, wanted: Any, where: str = "") -> str:
    """Where two records first differ and how, "" if they do not."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in dict.fromkeys([*wanted, *found]):
            there = f"{where}.{key}" if where else str(key)
            if key not in found or key not in wanted:
                return f"{there} is {'new' if key not in found else 'gone'}"
            if difference := first_difference(found[key], wanted[key], there):
                return difference
        return ""
    return "" if found == wanted else f"{where} was {found!r}, now {wanted!r}"
