"""The service: connectors, recorder and server put together, and its settings."""

import logging
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

from pydantic import Field

from storage.catalog import Catalog, default_url
from storage.errors import SourceBusy
from storage.models import Model
from storage.names import check_name
from streaming.connectors.eiger import EigerConnector
from streaming.recorder import Recorder, StreamKey
from streaming.server import Server
from streaming.wire import DEFAULT_ADDRESS

__all__ = ["DEFAULT_ADDRESS", "DEFAULT_DETECTOR", "Service", "ServiceSettings", "SourceSettings"]

log = logging.getLogger("nearline.service")

DEFAULT_DETECTOR = "tcp://127.0.0.1:31001"


class SourceSettings(Model):
    """One detector to listen to."""

    name: str = Field("eiger", description="data source name under which its frames are stored")
    endpoint: str = Field(DEFAULT_DETECTOR, description="where the detector's stream v2 socket is bound")


class ServiceSettings(Model):
    """Everything `nearline serve` can be told."""

    root: Path = Field(Path("nearline-data"), description="data folder; runs are <root>/<experiment>/<run>/")
    bind: str = Field(DEFAULT_ADDRESS, description="address for clients; loopback, since there are no tokens yet")
    experiment: str = Field("default", description="experiment of series that do not name one themselves")
    sources: tuple[SourceSettings, ...] = Field((SourceSettings(),), description="detectors to listen to")
    buffer_bytes: int = Field(2 << 30, gt=0, description="memory for frames, in bytes")
    gap_timeout_s: float = Field(2.0, gt=0, description="wait for a missing frame index, s")
    idle_timeout_s: float = Field(60.0, gt=0, description="end a run as aborted after so long without a message, s")
    catalog_url: str | None = Field(None, description="SQLAlchemy URL; SQLite in the data folder if left out")


class Service:
    """A running service; a context manager that starts and stops all of it."""

    def __init__(self, settings: ServiceSettings) -> None:
        _require_loopback(settings.bind)
        check_name(settings.experiment, "experiment")
        self.settings = settings
        settings.root.mkdir(parents=True, exist_ok=True)
        self._catalog = Catalog(settings.catalog_url or default_url(settings.root))
        self.recorder = Recorder(
            settings.root.absolute(),
            self._catalog,
            budget_bytes=settings.buffer_bytes,
            gap_timeout_s=settings.gap_timeout_s,
            idle_timeout_s=settings.idle_timeout_s,
            on_change=self._changed,
        )
        try:
            self._server = Server(self.recorder, settings.bind, self.status, f"nearline pid {os.getpid()}")
        except BaseException:
            self._catalog.close()
            raise
        self._connectors = [
            EigerConnector(self.recorder, s.name, s.endpoint, settings.experiment) for s in settings.sources
        ]
        self._started = time.monotonic()

    @property
    def address(self) -> str:
        """Where clients connect; with the port that was chosen if the settings said ``:*`` or ``:0``."""
        return self._server.address

    def __enter__(self) -> "Service":
        try:
            self.recorder.start()
        except BaseException:
            self._server.discard()
            self._catalog.close()
            raise
        self._server.start()
        for connector in self._connectors:
            connector.start()
        log.info("serving %s on %s", self.settings.root.absolute(), self.address)
        return self

    def __exit__(self, *_: object) -> None:
        for connector in self._connectors:
            connector.stop()
        self.recorder.stop()
        self._server.stop()
        self._catalog.close()
        log.info("stopped")

    def status(self) -> dict[str, Any]:
        """The service's condition, as `nearline status` shows it."""
        buffer = self.recorder.buffer
        return {
            "address": self.address,
            "root": str(self.settings.root.absolute()),
            "pid": os.getpid(),
            "uptime_s": round(time.monotonic() - self._started, 1),
            "buffer": {"used_bytes": buffer.used_bytes, "budget_bytes": buffer.budget_bytes},
            "disk": {
                "free_bytes": shutil.disk_usage(self.settings.root).free,
                "is_full": self.recorder.is_disk_full,
            },
            "rejected_messages": self.recorder.n_rejected_messages,
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
                | {"experiment": s.header.experiment, "run": s.header.run}
                for s in self.recorder.streams()
            ],
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
        stop.wait()


def _require_loopback(bind: str) -> None:
    host = bind.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    if not (host == "localhost" or host == "::1" or host.startswith("127.")):
        raise SourceBusy(
            f"refusing to listen on {bind}: without tokens and encryption only loopback is safe; "
            "use tcp://127.0.0.1:PORT and an ssh tunnel"
        )
