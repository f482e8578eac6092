"""A service's status as Prometheus metrics.

Names and units follow Prometheus' rules: base units, ``_total`` for what only grows. Labels are few: the
newest streams and the groups that lag most; how many were left out is a metric of its own.
"""

from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from streaming.status import HistogramStatus, ServiceStatus, StreamRow

__all__ = ["registry_of", "unreachable_registry"]

_MOST_STREAMS = 64
_MOST_GROUPS = 128
_MOST_SOURCES = 64

_COUNTERS = {
    "frames_received": "Frames that have arrived.",
    "bytes_received": "Bytes of frames that have arrived.",
    "frames_stored": "Frames written to a journal.",
    "bytes_stored": "Bytes of frames written to a journal.",
    "frames_delivered": "Frames sent to readers.",
    "bytes_delivered": "Bytes of frames sent to readers.",
    "requests": "Requests answered.",
    "requests_denied": "Requests refused for want of a token that allows them.",
}
_HISTOGRAMS = {
    "write": "One append to the journal.",
    "store": "From the arrival of a frame until it is stored.",
    "sync": "One sync of what was written.",
    "seal": "A chunk from complete to published.",
    "upload": "A shard from sealed to its object store.",
}
_STATES = (
    "received", "missing", "rejected", "pending", "buffered", "stored", "vetoed", "pruned", "duplicate", "late",
    "left_out",
)  # fmt: skip


def registry_of(status: ServiceStatus) -> CollectorRegistry:
    """A registry that holds this status and nothing else."""
    return _registry(_families(status))


def unreachable_registry() -> CollectorRegistry:
    """What is known of a service that does not answer."""
    return _registry([_gauge("up", "Whether the service answers.", 0)])


class _Fixed(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterable[Metric]:
        return self._families


def _registry(families: Iterable[Metric]) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(_Fixed(families))
    return registry


def _families(status: ServiceStatus) -> Iterator[Metric]:
    yield _gauge("up", "Whether the service answers.", 1)
    yield _gauge("healthy", "Whether nothing keeps the service from its work.", not status.problems())
    yield _gauge("uptime_seconds", "Since the service began.", status.uptime_s)
    yield _gauge("resident_memory_bytes", "Memory of the service's process.", status.memory_bytes)
    yield _gauge("clients", "Connections to the service.", status.clients)
    yield _gauge("buffer_used_bytes", "Memory that frames take, queued ones included.", status.buffer.used_bytes)
    yield _gauge("buffer_budget_bytes", "Memory that frames may take.", status.buffer.budget_bytes)
    yield _gauge("disk_free_bytes", "Room on the disk of the data folder.", status.disk.free_bytes)
    yield _gauge("disk_full", "Whether the disk refuses writes.", status.disk.is_full)
    yield _gauge("catalog_behind_runs", "Runs whose newest state is not in the catalog.", status.catalog.behind)
    yield _gauge("uploads_waiting_chunks", "Sealed chunks that wait for an object store.", status.uploads.waiting)
    yield _gauge("uploads_waiting_bytes", "Bytes of those chunks.", status.uploads.waiting_bytes)
    yield _counter("uploads_failed", "Uploads that failed and are tried again.", status.uploads.failed)
    yield _counter("rejected_messages", "Messages of clients that could not be read.", status.rejected_messages)
    for name, help_text in _COUNTERS.items():
        if name in status.metrics.counters:
            yield _counter(name, help_text, status.metrics.counters[name])
    for name, help_text in _HISTOGRAMS.items():
        if name in status.metrics.histograms:
            yield _histogram(f"{name}_seconds", help_text, status.metrics.histograms[name], status.metrics.bounds_s)
    yield from _sources(status)
    yield from _streams(status)
    yield from _groups(status)


def _sources(status: ServiceStatus) -> Iterator[Metric]:
    messages = CounterMetricFamily("nearline_source_messages", "Messages of a detector.", labels=["source"])
    bad = CounterMetricFamily("nearline_source_bad_messages", "Messages not understood.", labels=["source"])
    paused = GaugeMetricFamily("nearline_source_paused", "Whether the detector is not read now.", labels=["source"])
    for source in status.sources[:_MOST_SOURCES]:
        messages.add_metric([source.name], source.messages)
        bad.add_metric([source.name], source.bad_messages)
        paused.add_metric([source.name], source.is_paused)
    yield from (messages, bad, paused)


def _streams(status: ServiceStatus) -> Iterator[Metric]:
    labels = ["experiment", "run", "data_source"]
    frames = GaugeMetricFamily("nearline_stream_frames", "Frames of a stream by state.", labels=[*labels, "state"])
    announced = GaugeMetricFamily("nearline_stream_announced_frames", "Frames known to exist.", labels=labels)
    balanced = GaugeMetricFamily("nearline_stream_balanced", "Whether the ledger's sums hold.", labels=labels)
    live = GaugeMetricFamily("nearline_stream_live", "Whether the stream is being written.", labels=labels)
    sealing = GaugeMetricFamily("nearline_stream_sealing_chunks", "Complete chunks not yet published.", labels=labels)
    shown = _newest(status.streams)
    for stream in shown:
        names = [stream.experiment, str(stream.run), stream.data_source]
        for state in _STATES:
            frames.add_metric([*names, state], getattr(stream, state, 0))
        announced.add_metric(names, stream.announced)
        balanced.add_metric(names, stream.is_balanced)
        live.add_metric(names, not stream.is_terminal)
        sealing.add_metric(names, stream.sealing)
    yield from (frames, announced, balanced, live, sealing)
    yield _gauge("streams_not_shown", "Streams beyond those with labels.", len(status.streams) - len(shown))
    unbalanced = sum(not stream.is_balanced for stream in status.streams)
    yield _gauge("ledgers_unbalanced", "Streams, shown or not, whose sums do not hold.", unbalanced)


def _groups(status: ServiceStatus) -> Iterator[Metric]:
    labels = ["experiment", "run", "data_source", "group"]
    lag = GaugeMetricFamily("nearline_group_lag_frames", "Frames a group has not acknowledged.", labels=labels)
    leases = GaugeMetricFamily("nearline_group_leases", "Frames in members' hands.", labels=labels)
    dead = GaugeMetricFamily("nearline_group_dead_letters", "Frames set aside.", labels=labels)
    shown = sorted(status.groups, key=lambda group: -group.lag)[:_MOST_GROUPS]
    for group in shown:
        names = [group.experiment, str(group.run), group.data_source, group.group]
        lag.add_metric(names, group.lag)
        leases.add_metric(names, group.leases)
        dead.add_metric(names, group.dead_letters)
    yield from (lag, leases, dead)
    yield _gauge("groups_not_shown", "Groups beyond those with labels.", len(status.groups) - len(shown))


def _newest(streams: tuple[StreamRow, ...]) -> list[StreamRow]:
    """Those being written first, then the newest runs."""
    return sorted(streams, key=lambda s: (s.is_terminal, -s.run, s.name))[:_MOST_STREAMS]


def _gauge(name: str, help_text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"nearline_{name}", help_text, value=value)


def _counter(name: str, help_text: str, value: float) -> Metric:
    return CounterMetricFamily(f"nearline_{name}", help_text, value=value)


def _histogram(name: str, help_text: str, found: HistogramStatus, bounds_s: tuple[float, ...]) -> Metric:
    edges = [*(f"{bound:g}" for bound in bounds_s), "+Inf"]
    buckets = list(zip(edges, accumulate(found.counts), strict=True))
    return HistogramMetricFamily(f"nearline_{name}", help_text, buckets=buckets, sum_value=found.sum_s)
