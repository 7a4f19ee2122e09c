"""What the limit on this process's address space (ulimit -v) leaves of it."""

from __future__ import annotations

import resource
from pathlib import Path

# What computing takes beside its tensors, at least; oneDNN dies of SIGSEGV where it gets no memory for its descriptions.
LEAST = 128 << 20


def address_space() -> int | None:
    """The limit in bytes; None without one."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def spare(*, least: bool = False) -> int | None:
    """Bytes left below the limit, now or (least) when the process held most; None without a limit, or where it is not told."""
    limit = address_space()
    if limit is None:
        return None
    try:
        status = Path("/proc/self/status").read_text()
        held = int(status.split("VmPeak:" if least else "VmSize:")[1].split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return None
    return max(0, limit - held)
