"""A disk that is really full: a file system in memory whose room and number of files are set, and set anew (root on Linux)."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import NamedTuple

_PAGE = os.sysconf("SC_PAGE_SIZE")
_ROOM = 1 << 18  # pages of a disk that is not small; nothing is reserved for them


class Used(NamedTuple):
    """Pages and files that are taken."""

    pages: int
    files: int


class Tmpfs:
    """One such disk at `folder`, empty after each `mount`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def refused(self) -> str:
        """Why none can be mounted here; empty where it can."""
        try:
            self.mount()
        except (OSError, subprocess.CalledProcessError) as error:
            return " ".join(str(getattr(error, "stderr", "") or error).split())
        self.unmount()
        return ""

    def mount(self) -> None:
        """A new one with room for everything."""
        self.unmount()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._mount(f"size={_ROOM * _PAGE},nr_inodes={_ROOM}")

    def leave(self, *, pages: int = _ROOM, files: int = _ROOM) -> None:
        """So much room beyond what is taken."""
        used = self.used()
        # a size of 0 is none at all
        self._mount(f"remount,size={max(1, used.pages + pages) * _PAGE},nr_inodes={used.files + files}")

    def used(self) -> Used:
        found = os.statvfs(self.folder)
        return Used(found.f_blocks - found.f_bfree, found.f_files - found.f_ffree)

    def unmount(self) -> None:
        """Nothing where none is mounted."""
        if self.folder.is_mount():
            subprocess.run(["umount", self.folder], check=True, capture_output=True, text=True)

    def _mount(self, options: str) -> None:
        command = ["mount", "-t", "tmpfs", "-o", options, "fd2fast-campaign", self.folder]
        subprocess.run(command, check=True, capture_output=True, text=True)
