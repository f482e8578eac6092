"""The web process as a child of the service: started again when it dies, gone when its parent is."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Self

__all__ = ["WebChild", "end_with_parent"]

log = logging.getLogger("nearline.web")

_FIRST_WAIT_S = 0.5
_LONGEST_WAIT_S = 30.0
# A child that lived so long had started well: the next wait is short again.
_WELL_S = 30.0
_PATIENCE_S = 5.0


class WebChild:
    """Keeps `nearline web` running beside a service; a context manager.

    The child holds the reading end of a pipe as its standard input. The kernel closes the other end with
    this process, however that ends, and the child then stops.

    Parameters
    ----------
    arguments : what follows ``nearline web``.
    server_key : public key of a service that encrypts.
    """

    def __init__(self, arguments: list[str], server_key: str | None = None) -> None:
        self._command = [sys.executable, "-m", "nearline.cli", "web", "--end-with-parent", *arguments]
        self._environment = dict(os.environ)
        if server_key is not None:
            self._environment["NEARLINE_SERVER_KEY"] = server_key
        self._stopping = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._keep_running, name="web-child", daemon=True)

    @property
    def pid(self) -> int | None:
        """The child's process now; None while there is none."""
        child = self._child
        return child.pid if child is not None and child.poll() is None else None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._stopping.set()
            if self._child is not None:
                _end(self._child)
        self._thread.join()

    def _keep_running(self) -> None:
        wait_s = _FIRST_WAIT_S
        while True:
            with self._lock:
                if self._stopping.is_set():
                    return
                began = time.monotonic()
                self._child = child = subprocess.Popen(self._command, stdin=subprocess.PIPE, env=self._environment)
            code = child.wait()
            if child.stdin:
                child.stdin.close()
            if self._stopping.is_set():
                return
            wait_s = _FIRST_WAIT_S if time.monotonic() - began > _WELL_S else min(2 * wait_s, _LONGEST_WAIT_S)
            log.error("the web process has ended with code %d; it is started again in %.1f s", code, wait_s)
            self._stopping.wait(wait_s)


def end_with_parent() -> None:
    """In the child: end this process in order when standard input ends."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="parent", daemon=True).start()


def _end(child: "subprocess.Popen[bytes]") -> None:
    child.terminate()
    try:
        child.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
