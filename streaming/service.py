"""The service: connectors, recorder, server and what stands beside them put together, and its settings."""

import fcntl
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from storage.catalog import Catalog, CatalogWriter, default_url
from storage.errors import SourceBusy
from storage.kernels import use_compiled_kernels
from storage.models import Model
from storage.names import check_name
from storage.upload import Uploader
from streaming.connectors.eiger import EigerConnector
from streaming.live_stream import StreamKey
from streaming.memory import collect_rarely, keep_freed_memory, let_go_of_code
from streaming.metrics import ServiceMetrics, resident_bytes
from streaming.outbox import Outbox
from streaming.recorder import Recorder
from streaming.security import Authority, announce_key, check_bind, secure_server, service_folder
from streaming.server import Server
from streaming.wire import DEFAULT_ADDRESS

__all__ = ["DEFAULT_ADDRESS", "DEFAULT_DETECTOR", "Service", "ServiceSettings", "SourceSettings"]

log = logging.getLogger("nearline.service")

# A thread that makes a chunk's table holds the interpreter for milliseconds; those that frames wait for
# get it after this long (Python: 5 ms).
_SWITCH_S = 0.0005

DEFAULT_DETECTOR = "tcp://127.0.0.1:31001"


class SourceSettings(Model):
    """One detector to listen to."""

    name: str = Field("eiger", description="data source name under which its frames are stored")
    endpoint: str = Field(DEFAULT_DETECTOR, description="where the detector's stream v2 socket is bound")
    persistence: Literal["stored", "online"] = Field(
        "stored", description="online: its frames are in memory only, until newer ones need the room"
    )


class ServiceSettings(Model):
    """Everything `nearline serve` can be told."""

    root: Path = Field(Path("nearline-data"), description="data folder; runs are <root>/<experiment>/<run>/")
    bind: str = Field(DEFAULT_ADDRESS, description="address for clients; beyond loopback only if guarded")
    wants_tokens: bool = Field(False, description="let in only who shows a token of `nearline token create`")
    encrypts: bool = Field(False, description="speak CURVE: clients need the key of `nearline token key`")
    allows_insecure: bool = Field(False, description="listen beyond loopback even without tokens or encryption")
    experiment: str = Field("default", description="experiment of series that do not name one themselves")
    sources: tuple[SourceSettings, ...] = Field((SourceSettings(),), description="detectors to listen to")
    buffer_bytes: int = Field(512 << 20, gt=0, description="memory for frames, in bytes")
    gap_timeout_s: float = Field(2.0, gt=0, description="wait for a missing frame index, s")
    idle_timeout_s: float = Field(60.0, gt=0, description="end a run as aborted after so long without a message, s")
    catalog_url: str | None = Field(None, description="SQLAlchemy URL; SQLite in the data folder if left out")
    upload_to: str | None = Field(None, description="URL of a folder that every sealed chunk is sent to, e.g. s3://…")
    removes_uploaded: bool = Field(False, description="remove a run's local shards once it has ended and is uploaded")


class Service:
    """A running service; a context manager that starts and stops all of it."""

    def __init__(self, settings: ServiceSettings) -> None:
        check_bind(settings.bind, settings.wants_tokens, settings.encrypts, settings.allows_insecure)
        check_name(settings.experiment, "experiment")
        keep_freed_memory()
        self.settings, self._root = settings, settings.root.absolute()
        settings.root.mkdir(parents=True, exist_ok=True)
        self.metrics = ServiceMetrics()
        self._stack = ExitStack()
        self._stack.enter_context(_only_service(self._root))
        self._catalog = Catalog(settings.catalog_url or default_url(settings.root))
        self._stack.callback(self._catalog.close)
        with _closing_on_error(self._stack):
            self._assemble(settings)
        self._started = time.monotonic()

    def _assemble(self, settings: ServiceSettings) -> None:
        self._catalog_writer = CatalogWriter(self._catalog)
        self._stack.callback(self._catalog_writer.close)
        self._uploader = None
        if settings.upload_to:
            self._uploader = Uploader(settings.upload_to, remove_local=settings.removes_uploaded)
            self._stack.callback(self._uploader.close)
        self._outbox = Outbox(self._root, lambda: self.address)
        self._stack.callback(self._outbox.stop)
        self.recorder = Recorder(
            self._root,
            self._catalog_writer,
            budget_bytes=settings.buffer_bytes,
            gap_timeout_s=settings.gap_timeout_s,
            idle_timeout_s=settings.idle_timeout_s,
            uploader=self._uploader,
            outbox=self._outbox,
            metrics=self.metrics,
            on_change=self._changed,
        )
        state_folder = service_folder(self._root)
        self._authority = Authority(state_folder, is_required=settings.wants_tokens)
        self.public_key: str | None = None

        def secure(socket: Any) -> None:
            if settings.encrypts:
                self.public_key = secure_server(socket, state_folder).decode()

        self._server = Server(
            self.recorder,
            self._catalog,
            settings.bind,
            self.status,
            f"nearline pid {os.getpid()}",
            admit=self._authority.admit,
            secure=secure,
        )
        announce_key(state_folder, self._server.address, self.public_key.encode() if self.public_key else None)
        self._connectors = [
            EigerConnector(self.recorder, s.name, s.endpoint, settings.experiment, s.persistence)
            for s in settings.sources
        ]

    @property
    def address(self) -> str:
        """Where clients connect; with the port that was chosen if the settings said ``:*`` or ``:0``."""
        return self._server.address

    def __enter__(self) -> "Service":
        with _closing_on_error(self._stack):
            try:
                self.recorder.start()
            except BaseException:
                self._server.discard()
                raise
        self._outbox.start()
        if self._uploader is not None:
            self._uploader.resume(self._root)
        # Numba takes a while to import; the first frames are checked without it.
        self._kernels = threading.Thread(target=_load_kernels, name="kernels", daemon=True)
        self._kernels.start()
        self._stack.callback(self._kernels.join)
        self._server.start()
        for connector in self._connectors:
            connector.start()
        log.info("serving %s on %s", self._root, self.address)
        return self

    def __exit__(self, *_: object) -> None:
        for connector in self._connectors:
            connector.stop()
        self.recorder.stop()
        self._server.stop()
        self._stack.close()
        log.info("stopped")

    def await_kernels(self) -> None:
        """Wait until everything is loaded that the service will use."""
        self._kernels.join()

    def status(self) -> dict[str, Any]:
        """The service's condition, as `nearline status` shows it: a `streaming.status.ServiceStatus`."""
        buffer, disk = self.recorder.buffer, shutil.disk_usage(self._root)
        return {
            "address": self.address,
            "root": str(self._root),
            "version": version("nearline"),
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self._started, 1),
            "memory_bytes": resident_bytes(),
            "clients": self._server.n_clients,
            "rejected_messages": self.recorder.n_rejected_messages,
            "buffer": {"used_bytes": buffer.used_bytes, "budget_bytes": buffer.budget_bytes},
            "disk": {"free_bytes": disk.free, "total_bytes": disk.total, "is_full": self.recorder.disk.is_full},
            "sources": [
                {
                    "name": c.data_source,
                    "endpoint": c.endpoint,
                    "messages": c.n_messages,
                    "bad_messages": c.n_bad_messages,
                    "is_paused": c.is_paused,
                }
                for c in self._connectors
            ],
            "streams": [
                s.ledger().model_dump(mode="json", exclude={"ranges"})
                | {"experiment": s.header.experiment, "run": s.header.run, "sealing": len(s.to_seal)}
                for s in self.recorder.streams()
            ],
            "groups": self._server.group_rows(),
            "uploads": self._upload_status(),
            "catalog": self._catalog_writer.status(),
            "outbox": self._outbox.status(),
            "metrics": self.metrics.as_dict(),
        }

    def _upload_status(self) -> dict[str, Any]:
        if self._uploader is None:
            return {}
        status = self._uploader.status()
        return {
            "waiting": status["chunks"],
            "waiting_bytes": status["bytes"],
            "error": status["error"],
            "refused": status["refused"],
        }

    def _changed(self, key: StreamKey) -> None:
        # The recorder may speak before the server exists.
        server = getattr(self, "_server", None)
        if server is not None:
            server.changed(key)


def serve_until_signal(settings: ServiceSettings, ready: Any = None) -> None:
    """Run a service until SIGINT or SIGTERM, then end it in order; ``ready(service)`` is called when it serves."""
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    with Service(settings) as service:
        if ready:
            ready(service)
        service.await_kernels()
        collect_rarely()
        sys.setswitchinterval(_SWITCH_S)
        stop.wait()


def _load_kernels() -> None:
    if use_compiled_kernels():
        let_go_of_code("llvmlite")


@contextmanager
def _only_service(root: Path) -> Iterator[None]:
    """Hold the data folder for one service: two would each have half of a consumer group's state.

    Raises
    ------
    SourceBusy : another one has it; the kernel lets go of it when that process ends, however it does.
    """
    path = service_folder(root) / "lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise SourceBusy(
            f"another service runs on the data folder {root}; stop it, or give this one a folder of its own with --root"
        ) from error
    try:
        yield
    finally:
        os.close(fd)


@contextmanager
def _closing_on_error(stack: ExitStack) -> Iterator[None]:
    try:
        yield
    except BaseException:
        stack.close()
        raise
