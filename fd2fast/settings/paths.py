"""Paths as people write them: the home folder and variables in them are put in, what is no path of this machine is refused."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from fd2fast.errors import UserError

# Settings that hold a path or one of these words.
WORDS = {"weights": ("hub",)}

_VARIABLE = re.compile(r"\$(?:(\$)|\{([^}]*)\}|([A-Za-z_][A-Za-z0-9_]*))")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_FILE_URL = re.compile(r"file:(?://(?:localhost)?)?(/[^/].*)", re.IGNORECASE)
_DRIVE = re.compile(r"([A-Za-z]):[\\/]")


def expand(text: str, name: str = "path") -> Path:
    """The path that `text` means: `~`, `~user`, `$VAR` and `${VAR}` put in, `$$` for a dollar sign.

    What exists under exactly this name is meant as it stands where its `~user` or variable is not known; a folder that is
    called `~` is reached as `./~`. `name` is the setting's, for messages. Raises UserError for an unknown user, a variable
    that is not set or empty, an empty text, a URL, a Windows path, and characters that no path of a person has.
    """
    _must_be_a_path(text, name)
    if text.startswith("./~"):  # pathlib drops the "./", and others would read the rest as a home folder
        return Path.cwd() / _variables(text[2:], text, name)
    found = _variables(text, text, name)
    if found.startswith("~"):
        home = os.path.expanduser(found)
        if home.startswith("~"):
            if os.path.lexists(found):
                return Path.cwd() / found
            user = found[1:].split("/")[0]
            what = f"there is no user {user!r}" if user else "the home folder is not known (HOME is not set)"
            raise UserError(f"{name} {text!r}: {what}; a file or folder of this name is reached as {'./' + found!r}")
        found = home
    return Path(found)


def _must_be_a_path(text: str, name: str) -> None:
    if not text.strip():
        raise UserError(f"{name} must be a path, got {text!r} (a variable that is not set?)")
    if any(ord(character) < 32 for character in text) and (chr(0) in text or not os.path.lexists(text)):
        raise UserError(
            f"{name} {text!r} holds a control character; wanted a path (a script with line ends of Windows adds \\r)"
        )
    if os.path.lexists(text):
        return
    if os.name != "nt" and (_DRIVE.match(text) or text.startswith("\\\\")):
        raise UserError(f"{name} {text!r} is a Windows path; wanted one of this system, such as /mnt/data/birds")
    if _URL.match(text):
        local = _FILE_URL.match(text)
        hint = f" such as {unquote(local[1])!r}" if local else " on this machine: fetch or mount it first"
        raise UserError(f"{name} {text!r} is a URL; wanted a path{hint}")
    if os.name != "nt" and "\\" in text and "/" not in text:
        raise UserError(f"{name} {text!r} separates folders by \\; wanted {text.replace(chr(92), '/')!r}")


def _variables(text: str, given: str, name: str) -> str:
    def value(match: re.Match[str]) -> str:
        if match[1]:
            return "$"
        variable = match[2] if match[2] is not None else match[3]
        if not _NAME.fullmatch(variable):
            raise UserError(f"{name} {given!r}: {match[0]!r} is not understood; wanted $NAME or ${{NAME}}")
        found = os.environ.get(variable, "")
        if not found:
            state = "empty" if variable in os.environ else "not set"
            raise UserError(f"{name} {given!r}: the variable {variable} is {state}; a dollar sign is written $$")
        return found

    if "$" not in text:
        return text
    try:
        return _VARIABLE.sub(value, text)
    except UserError:
        if os.path.lexists(text):
            return text
        raise


def expanded(config: Any, name: str = "") -> Any:
    """A copy of settings, nested ones too, in which fields that hold a path or a word (WORDS) are expanded, words left alone."""
    changes: dict[str, Any] = {}
    for one in dataclasses.fields(config):
        value, where = getattr(config, one.name), f"{name}.{one.name}" if name else one.name
        if dataclasses.is_dataclass(value):
            changes[one.name] = expanded(value, where)
        elif one.name in WORDS and value is not None:
            changes[one.name] = _path_or_word(value, WORDS[one.name], where)
    return dataclasses.replace(config, **changes)


def _path_or_word(value: Any, words: tuple[str, ...], where: str) -> Any:
    if value in words:
        return value
    found = expand(value, where)
    return value if found == Path(value) else str(found)
