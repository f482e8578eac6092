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
