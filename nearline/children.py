"""Processes that the demo starts, and is sure to end: none outlives it, not even its own violent death."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from storage.errors import NearlineError

__all__ = ["ChildFailed", "Children", "die_with_parent", "end_group", "free_port"]

_PATIENCE_S = 8.0
_PR_SET_PDEATHSIG = 1


class ChildFailed(NearlineError):
    """A process that should run has ended; the message ends with what it said last."""


class Children:
    """Starts processes with their output in log files, and ends them in the reverse order."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: list[tuple[str, subprocess.Popen[bytes]]] = []
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
        """Start a Python module's command, ``python -m …``, as the leader of its own process group."""
        with open(self.log(name), "wb") as log:
            # A group of its own: Ctrl-C reaches only us, and we end the others in order.
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=dict(environment),
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self._running.append((name, process))
        return process

    def log(self, name: str) -> Path:
        """Where a child's output goes."""
        return self._logs / f"{name}.log"

    def check(self, name: str) -> None:
        """Raise ChildFailed if that child has ended with an error."""
        for child, process in self._running:
            if child == name and process.poll() not in (None, 0):
                raise ChildFailed(
                    f"{name} ended with exit code {process.returncode}; its log {self.log(name)} ends:\n"
                    + self._last_words(name)
                )

    def stop_all(self) -> None:
        """End all children, the last started first; those that do not listen are killed."""
        while self._running:
            _, process = self._running.pop()
            end_group(process)

    def process(self, name: str) -> "subprocess.Popen[bytes]":
        """The process of that name."""
        return next(process for child, process in self._running if child == name)

    def stop(self, name: str) -> None:
        """End one child."""
        for entry in list(self._running):
            if entry[0] == name:
                self._running.remove(entry)
                end_group(entry[1])

    def _last_words(self, name: str, n_lines: int = 15) -> str:
        lines = self.log(name).read_text(errors="replace").splitlines()
        return "\n".join(lines[-n_lines:])


def free_port() -> int:
    """A TCP port on loopback that is free now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """End a process that leads its group, and what is left of the group; one that does not listen is killed."""
    for number, patience in ((signal.SIGTERM, _PATIENCE_S), (signal.SIGKILL, _PATIENCE_S)):
        if not _signal_group(process.pid, number):
            break
        deadline = time.monotonic() + patience
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        if process.poll() is not None:
            _signal_group(process.pid, signal.SIGKILL)  # what the leader left behind
            break
    process.wait()


def _signal_group(pid: int, number: int) -> bool:
    try:
        os.killpg(pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def die_with_parent() -> None:
    """Ask the kernel to end this child when its parent is gone, however that happens (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
