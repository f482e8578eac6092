"""Memory for frames that come and go by the thousand."""

import ctypes
import gc
import os
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

__all__ = ["begin_with_huge_pages", "collect_rarely", "give_back_freed_memory", "keep_freed_memory", "let_go_of_code"]

# mallopt's parameters (malloc.h of glibc).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_NEVER = (1 << 31) - 1
_ARENAS = 2
# Where glibc is told such things before a program begins, and what it is told (manual, "Memory Allocation Tunables").
# One arena: glibc asks for huge pages for the first one only, and ZeroMQ's thread would get another.
_TUNABLES, _HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"
_HAS_BEGUN = "NEARLINE_HUGE_PAGES"
_KERNEL_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MAPS = Path("/proc/self/smaps")
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) r-xp \S+ \S+ \S+ +(\S.*)")
_MADV_DONTNEED = 4
# New objects between two looks for cycles, and looks at the young between two at older ones (Python: 700, 10, 10).
_COLLECT = (20_000, 20, 20)


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
        if "glibc.malloc.arena_max" not in os.environ.get(_TUNABLES, ""):
            mallopt(_M_ARENA_MAX, _ARENAS)


def give_back_freed_memory() -> None:
    """Free what refers to itself only, and have glibc give the system what is free between what is in use.

    Where many threads allocate and free tables of all sizes the heap frays: a processing holds some 30 kB more
    after each chunk, in which there is nothing. Clients of HTTP refer to themselves when they are done, and Python
    looks for such a thing when there is a quarter more of everything: some 100,000 objects in a flow run, between
    which others come to lie. Arrow has a heap of its own, which keeps some megabytes. Takes a tenth of a second.
    Elsewhere than on glibc the C heap is left alone.
    """
    import pyarrow as pa  # here: what begins a program anew must not load it twice

    gc.collect()
    pa.default_memory_pool().release_unused()
    if sys.platform.startswith("linux"):
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def begin_with_huge_pages() -> None:
    """Start this program anew with a heap of 2 MiB pages, where the kernel gives them to those who ask.

    Half a gigabyte of frames in pages of 4 KiB is more than a processor has addresses for at hand:
    hashing them, writing and sending costs a tenth more. glibc (2.35 and later) takes the wish from the
    environment only, before the program begins. Nothing happens elsewhere, or the second time.
    """
    tunables = os.environ.get(_TUNABLES, "")
    if "glibc.malloc.hugetlb" in tunables or os.environ.get(_HAS_BEGUN) or not _gives_huge_pages():
        return
    os.environ[_TUNABLES] = f"{tunables}:{_HUGE_PAGES}" if tunables else _HUGE_PAGES
    os.environ[_HAS_BEGUN] = "1"  # glibc's own variable does not reach programs with special rights
    with suppress(OSError):
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _gives_huge_pages() -> bool:
    """Whether the kernel is set to ``madvise``: with ``always`` there is nothing to ask for, with ``never`` no use."""
    try:
        return sys.platform.startswith("linux") and "[madvise]" in _KERNEL_SETTING.read_text()
    except OSError:
        return False


def collect_rarely() -> None:
    """Have Python look for cyclic garbage less often, and never again among the objects there are now.

    A service's frames are freed when nobody refers to them; what is looked through in vain is above all
    its modules: 50 ms and more at a time, in which no Python thread runs, some 3 % of all it does.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_COLLECT)


def let_go_of_code(library: str) -> None:
    """Have the kernel take back the pages of a library's code, which will hardly be run again; by part of its name.

    They are read again from the file when somebody does run it. Numba's compiler holds 50 MB of a service's memory
    once it has loaded what it had compiled before. Elsewhere than on Linux nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    with suppress(OSError):
        for start, stop in _code_of(library):
            madvise(start, stop - start, _MADV_DONTNEED)


def _code_of(library: str) -> Iterator[tuple[int, int]]:
    """Addresses of its executable mappings that are as they are in the file, so that nothing is lost with them."""
    start = stop = 0
    for line in _MAPS.read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            found = _MAPPING.fullmatch(line)
            start, stop = (int(found[1], 16), int(found[2], 16)) if found and library in found[3] else (0, 0)
        elif stop and line.split()[:2] == ["Anonymous:", "0"]:
            yield start, stop
