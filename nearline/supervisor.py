"""Programs that are kept running: started in order, started again when they die, ended in the reverse order.

What they leave behind is ended too. A Prefect worker starts each flow run in a session of its own, so a worker that
was killed leaves its flow runs running: they come to us (`PR_SET_CHILD_SUBREAPER`), finish their work, and are
reaped; at the end those that are still there are told to stop.
"""

import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from nearline.children import ChildFailed, die_with_parent, end_group

__all__ = ["Program", "ProgramStatus", "Supervisor"]

log = logging.getLogger("nearline.supervisor")

_PR_SET_CHILD_SUBREAPER = 36
_FIRST_PAUSE_S, _LAST_PAUSE_S = 1.0, 30.0
# Who has run for so long has recovered: its next death is a first one.
_STEADY_S = 60.0
_LOOK_S = 0.1
_ORPHANS_S = 8.0
_MOST_LOG_BYTES = 32 << 20
_LAST_WORDS = 15


@dataclass(frozen=True)
class Program:
    """A Python module's command, ``python -m …``, that is to run all the time.

    is_ready : asked at its first start until it says yes; what comes after it needs it.
    patience_s : how long that may take, s.
    niceness : added to ours; it and what it starts give way to the others by so much, 0 to 19.
    """

    name: str
    command: tuple[str, ...]
    is_ready: Callable[[], bool] = lambda: True
    patience_s: float = 60.0
    niceness: int = 0


@dataclass(frozen=True)
class ProgramStatus:
    """How a program is doing.

    seconds : since it was started, or until it is started again.
    exit_code : of the last time it ended by itself; negative: the signal that ended it.
    """

    name: str
    state: Literal["running", "waiting", "stopped"]
    pid: int | None
    seconds: float
    n_restarts: int
    exit_code: int | None


@dataclass
class _Kept:
    program: Program
    process: "subprocess.Popen[bytes]"
    started: float
    pause_s: float = _FIRST_PAUSE_S
    again_at: float | None = None
    n_restarts: int = 0
    exit_code: int | None = field(default=None)


class Supervisor:
    """Keeps programs running. All of it is to be called from one thread, which lives as long as they do.

    (The kernel ends a child when the *thread* that started it ends.)
    """

    def __init__(self, environment: Mapping[str, str], logs: Path) -> None:
        self._environment, self._logs = dict(environment), logs
        self._kept: list[_Kept] = []
        logs.mkdir(parents=True, exist_ok=True)
        _adopt_orphans()

    def start(self, program: Program, keep_on: Callable[[], bool] = lambda: True) -> None:
        """Start a program and wait until it is ready, or ``keep_on`` says no.

        Raises
        ------
        ChildFailed : it has ended at once, or is not ready in time; that is a mistake of its settings, most times, and
            starting it again would not mend it.
        """
        kept = _Kept(program, self._spawn(program), time.monotonic())
        self._kept.append(kept)
        deadline = kept.started + program.patience_s
        while keep_on() and not program.is_ready():
            if kept.process.poll() is not None:
                raise ChildFailed(f"{program.name} ended with exit code {kept.process.returncode}; {self._said(kept)}")
            if time.monotonic() > deadline:
                raise ChildFailed(f"{program.name} is not ready after {program.patience_s:g} s; {self._said(kept)}")
            time.sleep(_LOOK_S)

    def look(self) -> list[str]:
        """Start again what has died; what there is to say of it, in words."""
        now = time.monotonic()
        said = [words for kept in self._kept for words in self._look_at(kept, now)]
        _reap_orphans({kept.process.pid for kept in self._kept})
        return said

    def statuses(self) -> list[ProgramStatus]:
        """In the order of their start."""
        return [_status(kept, time.monotonic()) for kept in self._kept]

    def log(self, name: str) -> Path:
        """Where a program's output goes."""
        return self._logs / f"{name}.log"

    def stop_all(self, say: Callable[[str], None] = lambda words: None) -> None:
        """End the programs, the last started first, then what they left behind."""
        while self._kept:
            kept = self._kept.pop()
            say(f"stopping {kept.program.name}")
            end_group(kept.process)
        if orphans := list(_children()):
            say(f"stopping {len(orphans)} programs they left behind")
            _end_orphans(orphans)

    # ---- one program ------------------------------------------------------------------------------

    def _look_at(self, kept: _Kept, now: float) -> Iterator[str]:
        name = kept.program.name
        _keep_small(self.log(name))
        if kept.again_at is None and kept.process.poll() is not None:
            kept.exit_code = kept.process.returncode
            if now - kept.started > _STEADY_S:
                kept.pause_s = _FIRST_PAUSE_S
            kept.again_at = now + kept.pause_s
            yield f"{name} {_ended(kept.exit_code)} and is started again in {kept.pause_s:g} s; {self._said(kept, 1)}"
            kept.pause_s = min(2 * kept.pause_s, _LAST_PAUSE_S)
        elif kept.again_at is not None and now >= kept.again_at:
            kept.process, kept.started, kept.again_at = self._spawn(kept.program), now, None
            kept.n_restarts += 1
            yield f"{name} is started again (pid {kept.process.pid})"

    def _spawn(self, program: Program) -> "subprocess.Popen[bytes]":
        with open(self.log(program.name), "ab") as output:
            # A session of its own: Ctrl-C reaches only us, and we end the others in order.
            return subprocess.Popen(
                [sys.executable, "-m", *program.command],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=self._environment,
                start_new_session=True,
                preexec_fn=partial(_begin, program.niceness),
            )

    def _said(self, kept: _Kept, n_lines: int = _LAST_WORDS) -> str:
        path = self.log(kept.program.name)
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
        return f"its log {path} ends:{' ' if n_lines == 1 else chr(10)}" + "\n".join(lines[-n_lines:])


def _begin(niceness: int) -> None:
    die_with_parent()
    os.nice(niceness)


def _status(kept: _Kept, now: float) -> ProgramStatus:
    is_running = kept.again_at is None and kept.process.poll() is None
    seconds = now - kept.started if kept.again_at is None else max(kept.again_at - now, 0.0)
    return ProgramStatus(
        name=kept.program.name,
        state="running" if is_running else "waiting",
        pid=kept.process.pid if is_running else None,
        seconds=seconds,
        n_restarts=kept.n_restarts,
        exit_code=kept.exit_code,
    )


def _ended(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    try:
        return f"was ended by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"was ended by signal {-exit_code}"


def _keep_small(path: Path) -> None:
    """Begin a log anew that has grown long; the one before stays beside it.

    Its writer appends, so it goes on at the new beginning.
    """
    if path.exists() and path.stat().st_size > _MOST_LOG_BYTES:
        with open(path, "rb") as content, open(path.with_suffix(".log.1"), "wb") as kept:
            kept.write(content.read())
        os.truncate(path, 0)


# ---- what programs leave behind -----------------------------------------------------------------------


def _adopt_orphans() -> None:
    """Become the parent of whatever our children leave behind (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _children() -> Iterator[int]:
    """Our child processes, whoever started them; none where there is no /proc."""
    for path in Path("/proc/self/task").glob("*/children"):
        try:
            yield from map(int, path.read_text().split())
        except OSError:  # a thread that has ended
            continue


def _reap_orphans(ours: set[int]) -> None:
    """Take note of the end of adopted processes: they would stay in the table otherwise."""
    for pid in _children():
        if pid not in ours:
            _has_ended(pid)


def _has_ended(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def _end_orphans(pids: Sequence[int]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        waiting = [pid for pid in pids if not _has_ended(pid)]
        for pid in waiting:
            os.kill(pid, number)
        deadline = time.monotonic() + _ORPHANS_S
        while waiting and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
            waiting = [pid for pid in waiting if not _has_ended(pid)]
        # What those leave behind in turn has come to us by now.
        pids = list(_children())
        if not pids:
            return
