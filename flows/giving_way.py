"""Work that can wait gives way to frames and live analysis."""

import os
from contextlib import suppress
from pathlib import Path

__all__ = ["give_way"]


def give_way() -> None:
    """Make our niceness that of our session, if the session is ours.

    Linux shares the processors among sessions first ("autogroup", sched(7)); a process's niceness counts only within
    its session, and a worker starts each flow run in one of its own.
    """
    niceness = os.nice(0)
    if niceness > 0 and os.getsid(0) == os.getpid():
        with suppress(OSError):  # this system has no such groups: the niceness counts
            Path("/proc/self/autogroup").write_text(str(niceness))
