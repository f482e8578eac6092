"""`nearline status`: a service's condition as tables of 80 columns, with rates between two looks."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from storage.errors import ServiceUnavailable
from streaming.status import ServiceStatus, StreamRow

__all__ = ["Sample", "live_status", "render_status"]

_MOST_ROWS = 12


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at a service."""

    taken_at: float
    status: ServiceStatus


def live_status(
    look: Callable[[], ServiceStatus],
    console: Console,
    *,
    interval_s: float = 1.0,
    n_looks: int | None = None,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Show the status again and again, until Ctrl-C or ``n_looks``; a service that is away is waited for."""
    before, now = None, Sample(clock(), look())
    with Live(render_status(now, None), console=console, auto_refresh=False) as live:
        n_done = 1
        while n_looks is None or n_done < n_looks:
            sleep(interval_s)
            n_done += 1
            try:
                before, now = now, Sample(clock(), look())
            except ServiceUnavailable as error:
                live.update(Group(Text(str(error), style="red"), render_status(now, None)), refresh=True)
                continue
            live.update(render_status(now, before), refresh=True)


def render_status(now: Sample, before: Sample | None) -> RenderableType:
    """Everything worth knowing at a glance; rates need an earlier sample of the same service."""
    if before is not None and before.status.pid != now.status.pid:
        before = None  # restarted: its counters began anew
    parts: list[RenderableType] = [_summary(now, before)]
    status = now.status
    parts += [Text(f"problem: {words}", style="bold red") for words in status.problems()]
    parts += [Text(f"warning: {words}", style="yellow") for words in status.warnings()]
    parts += [table(now, before) for table, rows in _TABLES if rows(status)]
    return Group(*parts)


def _summary(now: Sample, before: Sample | None) -> RenderableType:
    status, disk = now.status, now.status.disk
    used, budget = status.buffer.used_bytes, status.buffer.budget_bytes
    room = Text("FULL", style="bold red") if disk.is_full else Text(f"{_size(disk.free_bytes)} free")
    grid = Table.grid(padding=(0, 2))
    grid.add_row("service", Text(status.address, style="bold"), "up", _duration(status.uptime_s))
    grid.add_row("data", Text(status.root, overflow="ellipsis", no_wrap=True), "disk", room)
    grid.add_row(
        "buffer", f"{_size(used)} of {_size(budget)} ({_percent(used, budget)})", "memory", _size(status.memory_bytes)
    )
    rates = [(name, _rate(now, before, *counters)) for name, counters in _TRAFFIC.items()]
    if any(text != "–" for _, text in rates):
        grid.add_row(*(cell for row in rates for cell in row))
    return grid


_TRAFFIC = {"in": ("frames_received", "bytes_received"), "out": ("frames_delivered", "bytes_delivered")}


def _sources(now: Sample, before: Sample | None) -> Table:
    table = _table("source", "messages", "/s", "bad", "state")
    earlier = {s.name: s.messages for s in before.status.sources} if before else {}
    for source in now.status.sources:
        state = Text("paused: buffer full", style="bold red") if source.is_paused else Text("listening")
        rate = _per_second(source.messages, earlier.get(source.name), now, before)
        table.add_row(source.name, str(source.messages), rate, _bad(source.bad_messages), state)
    return table


def _streams(now: Sample, before: Sample | None) -> Table:
    table = _table("stream", "stored", "/s", "missing", "to seal", "state")
    earlier = {s.name: s.stored for s in before.status.streams} if before else {}
    rows = sorted(now.status.streams, key=lambda s: (s.is_terminal, -s.run, s.name))
    for stream in rows[:_MOST_ROWS]:
        rate = _per_second(stream.stored, earlier.get(stream.name), now, before)
        expected = max(stream.planned, stream.announced)
        stored = str(stream.stored) if stream.stored == expected else f"{stream.stored} of {expected}"
        missing = _bad(stream.missing + stream.rejected)
        table.add_row(_end_of(stream.name), stored, rate, missing, str(stream.sealing or ""), _state(stream))
    _say_rest(table, len(rows))
    return table


def _groups(now: Sample, before: Sample | None) -> Table:
    table = _table("group", "lag", "leased", "members", "dead")
    rows = sorted(now.status.groups, key=lambda g: -g.lag)
    for group in rows[:_MOST_ROWS]:
        dead = _bad(group.dead_letters)
        table.add_row(_end_of(group.name, 40), str(group.lag), str(group.leases), str(group.members), dead)
    _say_rest(table, len(rows))
    return table


def _latencies(now: Sample, before: Sample | None) -> Table:
    table = _table("time for", "median", "99 %", "longest", "count")
    metrics = now.status.metrics
    for name, found in metrics.histograms.items():
        if n := sum(found.counts):
            middle, high = (_quantile(found.counts, metrics.bounds_s, q) for q in (0.5, 0.99))
            table.add_row(name, f"≤ {middle}", f"≤ {high}", _seconds(found.longest_s), str(n))
    return table


_TABLES: tuple[tuple[Callable[[Sample, Sample | None], Table], Callable[[ServiceStatus], object]], ...] = (
    (_sources, lambda status: status.sources),
    (_streams, lambda status: status.streams),
    (_groups, lambda status: status.groups),
    (_latencies, lambda status: any(sum(h.counts) for h in status.metrics.histograms.values())),
)


def _table(first: str, *others: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", expand=False)
    table.add_column(first, no_wrap=True)
    for name in others:
        is_text = name == "state"
        table.add_column(name, justify="left" if is_text else "right", no_wrap=True)
    return table


def _say_rest(table: Table, n_rows: int) -> None:
    if n_rows > _MOST_ROWS:
        table.add_row(Text(f"… and {n_rows - _MOST_ROWS} more", style="dim"))


def _state(stream: StreamRow) -> Text:
    if not stream.is_balanced:
        return Text("UNBALANCED", style="bold red")
    return Text("ended", style="dim") if stream.is_terminal else Text("live", style="green")


def _end_of(name: str, width: int = 24) -> str:
    """A long name's end: run and data source tell more than the experiment's beginning."""
    return name if len(name) <= width else f"…{name[1 - width :]}"


def _bad(n: int) -> Text:
    return Text(str(n), style="red" if n else "")


def _per_second(now_n: int, before_n: int | None, now: Sample, before: Sample | None) -> str:
    if before is None or before_n is None or now.taken_at <= before.taken_at or now_n < before_n:
        return "–"
    return f"{(now_n - before_n) / (now.taken_at - before.taken_at):.1f}"


def _rate(now: Sample, before: Sample | None, frames: str, n_bytes: str) -> str:
    if before is None or frames not in now.status.metrics.counters:
        return "–"
    a, b = before.status, now.status
    seconds = max(now.taken_at - before.taken_at, 1e-9)
    megabytes = (b.counter(n_bytes) - a.counter(n_bytes)) / seconds / 1e6
    return f"{(b.counter(frames) - a.counter(frames)) / seconds:.1f} frames/s, {megabytes:.1f} MB/s"


def _quantile(counts: tuple[int, ...], bounds_s: tuple[float, ...], q: float) -> str:
    """The upper edge of the bucket that holds a quantile."""
    wanted, seen = q * sum(counts), 0
    for count, bound in zip(counts, bounds_s, strict=False):
        seen += count
        if seen >= wanted:
            return _seconds(bound)
    return "more"


def _seconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = int(seconds // 60)
    days, hours = minutes // 1440, minutes // 60 % 24
    return f"{days} d {hours} h" if days else f"{hours} h {minutes % 60} min" if hours else f"{minutes} min"


def _size(n_bytes: int) -> str:
    for unit, size in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if n_bytes >= size:
            return f"{n_bytes / size:.1f} {unit}"
    return f"{n_bytes / 1024:.0f} KiB"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f} %" if whole else "–"
