"""Memory for frames that come and go by the thousand."""

import ctypes
import sys

__all__ = ["keep_freed_memory"]

# mallopt's parameters (malloc.h of glibc).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_NEVER = (1 << 31) - 1
_ARENAS = 2


def keep_freed_memory() -> None:
    """Have glibc keep what frames leave behind, for the next ones.

    ZeroMQ allocates each message; above 128 KiB that is a new mapping, whose pages the kernel clears
    one by one as they are written: a third of a millisecond for a frame of 1.3 MB, and again when
    it is unmapped. Elsewhere than on glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, _NEVER)
        mallopt(_M_ARENA_MAX, _ARENAS)
