"""What a limit on the address space leaves, in processes that have one."""

import subprocess
import sys

import pytest

from fd2fast.system import limits

LIMITED = """
import mmap, resource
from fd2fast.system import limits
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, resource.RLIM_INFINITY))
before = limits.spare()
room = mmap.mmap(-1, 100 << 20)
during = limits.spare()
room.close()
print(limits.address_space(), before - during, limits.spare() - limits.spare(least=True), limits.spare(least=True))
"""


def test_without_a_limit_nothing_is_said() -> None:
    if limits.address_space() is None:
        assert limits.spare() is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not say what a process holds")
def test_what_is_left_now_and_at_the_worst_moment() -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=True)
    limit, taken, risen, least = map(int, done.stdout.split())
    assert limit == 1 << 30
    assert 100 << 20 <= taken < 110 << 20
    assert 90 << 20 <= risen <= 110 << 20
    assert 0 < least < limit - taken
