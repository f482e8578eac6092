"""A service's own account of its condition, as `GetStatus` answers it: what status, health and metrics are made of.

Every field has a default: an older service leaves some out, a newer one sends more.
"""

from pydantic import Field

from storage.models import Record
from storage.names import run_key
from storage.states import StreamLedger

__all__ = [
    "BufferStatus",
    "CatalogStatus",
    "DiskStatus",
    "GroupRow",
    "ServiceStatus",
    "SourceRow",
    "StreamRow",
    "UploadStatus",
]


_MANY_RUNS_BEHIND = 10


class BufferStatus(Record):
    """Memory for frames."""

    used_bytes: int = 0
    budget_bytes: int = 0


class DiskStatus(Record):
    """The disk that holds the data folder."""

    free_bytes: int = 0
    total_bytes: int = Field(0, description="0 when the service does not tell")
    is_full: bool = Field(False, description="the last write was refused; frames wait in memory")


class SourceRow(Record):
    """One detector that is listened to."""

    name: str
    endpoint: str = ""
    messages: int = 0
    bad_messages: int = 0
    is_paused: bool = Field(False, description="not read now, because the buffer is full")


class StreamRow(StreamLedger):
    """The ledger of a stream that the service has open, without ranges."""

    experiment: str
    run: int
    sealing: int = Field(0, description="chunks that are complete and not yet published")

    @property
    def name(self) -> str:
        return f"{run_key(self.experiment, self.run)}/{self.data_source}"


class GroupRow(Record):
    """A consumer group of such a stream."""

    experiment: str
    run: int
    data_source: str
    group: str
    lag: int = Field(0, description="frames that can be read and are not acknowledged")
    leases: int = Field(0, description="frames in members' hands")
    members: int = 0
    dead_letters: int = 0

    @property
    def name(self) -> str:
        return f"{run_key(self.experiment, self.run)}/{self.data_source}:{self.group}"


class UploadStatus(Record):
    """Sealed chunks on their way to an object store."""

    waiting: int = 0
    waiting_bytes: int = 0
    failed: int = Field(0, description="attempts that failed, since the service began")
    error: str | None = Field(None, description="why the last attempt failed; None once one has succeeded")
    refused: dict[str, str] = Field(default_factory=dict, description="runs not tried again, each with the reason")


class CatalogStatus(Record):
    """The SQL index of runs."""

    behind: int = Field(0, description="runs whose newest state is not in it yet")
    error: str | None = Field(None, description="why it cannot be written; None when it can")


class OutboxStatus(Record):
    """Facts about runs for others to carry on, a `streaming.outbox.Outbox`."""

    told: int = Field(0, description="facts in it, since the data folder's first service")
    error: str | None = Field(None, description="why the last one could not be written; None when it could")


class HistogramStatus(Record):
    """A `streaming.metrics.Histogram`."""

    counts: tuple[int, ...] = ()
    sum_s: float = 0.0
    longest_s: float = 0.0


class MetricsStatus(Record):
    """A `streaming.metrics.ServiceMetrics`."""

    counters: dict[str, int] = Field(default_factory=dict)
    histograms: dict[str, HistogramStatus] = Field(default_factory=dict)
    bounds_s: tuple[float, ...] = ()


class ServiceStatus(Record):
    """The whole account."""

    address: str = ""
    root: str = ""
    version: str = ""
    pid: int = 0
    uptime_s: float = 0.0
    memory_bytes: int = Field(0, description="resident memory of the service's process; 0 when unknown")
    clients: int = 0
    rejected_messages: int = 0
    buffer: BufferStatus = BufferStatus()
    disk: DiskStatus = DiskStatus()
    sources: tuple[SourceRow, ...] = ()
    streams: tuple[StreamRow, ...] = ()
    groups: tuple[GroupRow, ...] = ()
    uploads: UploadStatus = UploadStatus()
    catalog: CatalogStatus = CatalogStatus()
    outbox: OutboxStatus = OutboxStatus()
    metrics: MetricsStatus = MetricsStatus()

    def problems(self) -> list[str]:
        """What keeps the service from doing its work, in words with a remedy; empty when it does."""
        found = []
        if self.disk.is_full:
            found.append(f"the disk of {self.root} is full: frames wait in memory; free some space")
        for source in self.sources:
            if source.is_paused:
                found.append(
                    f"the buffer is full ({_mib(self.buffer.used_bytes)} of {_mib(self.buffer.budget_bytes)} MiB) and "
                    f"source {source.name} is not read: the disk does not keep up, its detector may lose frames"
                )
        for stream in self.streams:
            found += [f"the ledger does not balance: {stream.name}: {words}" for words in stream.problems]
        # One or two are on their way at any time.
        if self.catalog.error or self.catalog.behind >= _MANY_RUNS_BEHIND:
            found.append(
                f"the catalog is behind by {self.catalog.behind} runs ({self.catalog.error or 'it is slow'}); "
                "frames are safe, and `nearline catalog rebuild` makes it anew"
            )
        return found

    def warnings(self) -> list[str]:
        """What somebody should look at before it becomes a problem."""
        found = []
        if not self.disk.is_full and self.disk.free_bytes < 0.05 * self.disk.total_bytes:
            found.append(f"the disk of {self.root} has {self.disk.free_bytes / 2**30:.1f} GiB left, less than 5 %")
        if self.uploads.error:
            found.append(
                f"{self.uploads.waiting} chunks wait for their object store: {self.uploads.error}; "
                "they are kept on this disk meanwhile"
            )
        if self.outbox.error:
            found.append(
                f"the outbox cannot be written: {self.outbox.error}; frames are safe, flows are started later "
                "(`nearline catch-up`)"
            )
        found += [f"run {run} is not uploaded: {why}" for run, why in self.uploads.refused.items()]
        found += [
            f"group {group.name} has set {group.dead_letters} frames aside; "
            f"`nearline dead-letters list {run_key(group.experiment, group.run)}` shows them"
            for group in self.groups
            if group.dead_letters
        ]
        found += [
            f"source {source.name} has sent {source.bad_messages} messages that could not be understood"
            for source in self.sources
            if source.bad_messages
        ]
        return found

    def counter(self, name: str) -> int:
        return self.metrics.counters.get(name, 0)


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / 2**20:.0f}"
