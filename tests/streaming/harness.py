"""Real services, in this process or in one that can be killed, and small frames for them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection as ConnectionOfPipe
from pathlib import Path
from typing import Any

import numpy as np

from storage.codec import encode
from streaming.client import Connection
from streaming.producer import Producer
from streaming.service import Service, ServiceSettings, SourceSettings, serve_until_signal
from streaming.simulator import DectrisStreamSender, default_detector
from streaming.wire import GetStatus
from tests.forked import FORKED

ANY_PORT = "tcp://127.0.0.1:*"
SHAPE = (64, 80)


def pixels(index: int, dtype: str = "uint16", shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    """Frame ``index``: follows from the index alone."""
    return np.random.default_rng(index).integers(0, 250, shape).astype(dtype)


def blob(index: int, dtype: str = "uint16", shape: tuple[int, ...] = SHAPE) -> bytes:
    return encode(pixels(index, dtype, shape))


def settings(root: Path, endpoint: str | None = None, **options: Any) -> ServiceSettings:
    sources = (SourceSettings(name="eiger", endpoint=endpoint),) if endpoint else ()
    fields = {"bind": ANY_PORT, "experiment": "lyso", "gap_timeout_s": 0.3, "buffer_bytes": 64 << 20} | options
    return ServiceSettings(root=root, **({"sources": sources} | fields))


@contextlib.contextmanager
def serving(root: Path, endpoint: str | None = None, **options: Any) -> Iterator[Service]:
    with Service(settings(root, endpoint, **options)) as service:
        yield service


class ServiceProcess:
    """A service in a process of its own; a context manager that kills what is left of it."""

    def __init__(self, root: Path, endpoint: str | None = None, **options: Any) -> None:
        here, there = FORKED.Pipe(duplex=False)
        content = settings(root, endpoint, **options).model_dump_json()
        self.process = FORKED.Process(target=_serve, args=(content, there), daemon=True)
        self.process.start()
        there.close()
        with here:
            self.address = _only_message(here)

    def rss_bytes(self) -> int:
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def stop(self) -> int | None:
        self.process.terminate()
        self.process.join(20)
        return self.process.exitcode

    def __enter__(self) -> "ServiceProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


def _serve(content: str, told: ConnectionOfPipe) -> None:
    serve_until_signal(ServiceSettings.model_validate_json(content), lambda service: told.send(service.address))


def _only_message(pipe: ConnectionOfPipe) -> str:
    try:
        return str(pipe.recv())
    except EOFError:
        raise AssertionError("the service did not start") from None


class ServiceProgram:
    """A service as a program, in an environment of its own, such as one with a disk that fails."""

    SCRIPT = """
import sys
from streaming.service import ServiceSettings, serve_until_signal
serve_until_signal(ServiceSettings.model_validate_json(sys.argv[1]), lambda s: print(s.address, flush=True))
"""

    def __init__(self, root: Path, env: dict[str, str], endpoint: str | None = None, **options: Any) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.SCRIPT, settings(root, endpoint, **options).model_dump_json()],
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            cwd=Path(__file__).parents[2],
        )
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        assert self.address, "the service did not start"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def stop(self) -> int:
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(20)

    def __enter__(self) -> "ServiceProgram":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()


def wait_for(what: Callable[[], Any], timeout: float = 15.0) -> Any:
    """The first true answer; AssertionError at the time-out."""
    deadline = time.monotonic() + timeout
    while not (answer := what()):
        assert time.monotonic() < deadline, f"still {answer!r} after {timeout} s"
        time.sleep(0.01)
    return answer


@contextlib.contextmanager
def connected(address: str) -> Iterator[Connection]:
    connection = Connection(address)
    try:
        yield connection
    finally:
        connection.close()


def status_of(address: str) -> dict[str, Any]:
    with connected(address) as connection:
        return json.loads(json.dumps(connection.ask_json(GetStatus(id=0))))


@contextlib.contextmanager
def producing(address: str, run: int = 1, data_source: str = "eiger", **options: Any) -> Iterator[Any]:
    """A producer with a run started."""
    with Producer(address, "lyso", data_source, **options) as producer:
        yield producer.run(run)


def record_run(address: str, indices: Any, run: int = 1, planned: int = 0) -> None:
    """A finished run with these frames."""
    with producing(address, run) as out:
        for index in indices:
            out.send(pixels(index), frame_index=index, meta={"delay": index / 10})
        out.finish(planned)


@contextlib.contextmanager
def detector(**options: Any) -> Iterator[DectrisStreamSender]:
    """A simulated detector on a free port."""
    with DectrisStreamSender(ANY_PORT, receiver_timeout=60, **options) as sender:
        yield sender


def arm(sender: DectrisStreamSender, n: int, dtype: str = "uint16", **options: Any) -> None:
    header = default_detector(SHAPE).model_copy(update={"frame_time": 0.1})
    sender.send_start(header, SHAPE, dtype, n, **({"header_detail": "basic"} | options))
