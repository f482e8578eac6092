"""Memory of the service: what is given back, and how a program begins anew with larger pages."""

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from streaming.handlers.desk import Call, Client

_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
HUGE_PAGES = "glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"
_PROGRAM = """
import os, sys
from streaming.memory import begin_with_huge_pages
print(os.getpid(), sys.argv[1], "before")
sys.stdout.flush()
begin_with_huge_pages()
print(os.getpid(), sys.argv[1], os.environ["GLIBC_TUNABLES"])
"""


@pytest.mark.skipif(
    not _SETTING.exists() or "[madvise]" not in _SETTING.read_text(), reason="the kernel gives no huge pages on request"
)
@pytest.mark.parametrize("before", ["", "glibc.malloc.arena_max=2"])
def test_a_program_begins_once_more_as_the_same_process_with_its_arguments(before: str) -> None:
    environment = os.environ | {"GLIBC_TUNABLES": before}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, "an argument"], env=environment, capture_output=True, text=True, check=True
    )
    first, second, last = done.stdout.splitlines()
    assert first == second
    assert last == f"{first.removesuffix('before')}{before}{':' if before else ''}{HUGE_PAGES}"


def test_a_call_keeps_no_payload_that_is_on_its_way() -> None:
    """A put and its call refer to each other: without this, frames stay until somebody looks for cycles."""

    class Payload:
        def __len__(self) -> int:
            return 1000

    payload = Payload()
    call = Call(b"", Client(), None, [payload], 0.0)
    call.prepared = (call, payload)
    gone = weakref.ref(payload)
    gc.disable()
    try:
        del payload
        call.let_go()
        assert gone() is None
    finally:
        gc.enable()
    assert call.payload_bytes == 1000


def test_cycles_are_still_found() -> None:
    program = "import gc; collect_rarely(); x = []; x.append(x); del x; print(gc.collect(), gc.get_freeze_count() > 0)"
    program = f"from streaming.memory import collect_rarely; {program}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "True"]


_COMPILER = """
from pathlib import Path
import numba
from streaming.memory import let_go_of_code

def resident():
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssFile"].split()[0]) // 1024

compiled = numba.njit(lambda a: a + 1)
assert compiled(1) == 2
before = resident()
let_go_of_code("llvmlite")
print(before - resident())
assert numba.njit(lambda a: a + 2.0)(1) == 3.0, "the compiler is read again and works"
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux can be asked")
def test_a_compiler_that_is_let_go_of_takes_no_memory_and_still_compiles() -> None:
    done = subprocess.run([sys.executable, "-c", _COMPILER], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 20


FRAYED = """
from streaming.memory import give_back_freed_memory
resident = lambda: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmRSS")) >> 10
blocks = [bytearray(60_000) for _ in range(4000)]
kept = blocks[::40] + [bytearray(60_000)]
del blocks
before = resident()
give_back_freed_memory()
print(before, resident(), len(kept))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's heap")
def test_memory_that_is_free_between_what_is_in_use_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", FRAYED], capture_output=True, text=True, check=True, timeout=60)
    before, after, _ = map(int, done.stdout.split())
    assert before > 200
    assert after < before - 150
