"""Processes to be killed and started again."""

import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from nearline.children import free_port
from streaming.client import is_reachable
from streaming.service import ServiceSettings, SourceSettings
from tests.forked import FORKED

from . import programs

__all__ = ["ServiceUnderFire", "spawn"]


def spawn(function: Callable[..., None], log: Path, *args: Any) -> BaseProcess:
    """A process that runs a function of `programs`; what it says goes to ``log``."""
    process = FORKED.Process(target=programs.run_logged, args=(log, function, *args), daemon=True)
    process.start()
    return process


class ServiceUnderFire:
    """A service at one address and folder that is killed and started again."""

    def __init__(self, root: Path, detectors: dict[str, str] | None = None, **options: Any) -> None:
        self.root, self.log = root, root.with_name(root.name + ".service.log")
        self.address = f"tcp://127.0.0.1:{free_port()}"
        sources = tuple(SourceSettings(name=name, endpoint=at) for name, at in (detectors or {}).items())
        fields = {"experiment": "lyso", "gap_timeout_s": 0.5, "idle_timeout_s": 60.0, "buffer_bytes": 64 << 20}
        settings = ServiceSettings(root=root, bind=self.address, sources=sources, **(fields | options))
        self._settings = settings.model_dump_json()
        self.process: BaseProcess | None = None

    def start(self) -> None:
        """Start it; `wait_until_there` says when it answers."""
        self.process = spawn(programs.serve, self.log, self._settings)

    def wait_until_there(self, timeout: float = 30.0) -> None:
        deadline = time.monotonic() + timeout
        while not is_reachable(self.address):
            assert self.process is not None
            assert self.process.is_alive(), f"the service ended by itself: {self.log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, "the service does not come up"
            time.sleep(0.01)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()

    def stop(self) -> int | None:
        """End it in order; its exit code."""
        assert self.process is not None
        self.process.terminate()
        self.process.join(30)
        return self.process.exitcode

    def rss_bytes(self) -> int:
        assert self.process is not None
        fields = Path(f"/proc/{self.process.pid}/status").read_text().split("VmRSS:")[1].split()
        return int(fields[0]) * 1024

    def __enter__(self) -> "ServiceUnderFire":
        self.start()
        self.wait_until_there()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
