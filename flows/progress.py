"""How a processing goes, and who is told of it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from flows.run_warnings import ChunkFigures
from storage.geometry_snapshot import GeometrySnapshot
from storage.step_store import ChunkManifest, Processing
from streaming.retrieval import Run
from tasks.recipe import Recipe

__all__ = ["Progress", "Reporter", "Reporters", "RunTotals", "Silent"]


@dataclass
class RunTotals:
    """What has been processed so far; rates name their denominators."""

    frames: int = 0
    hits: int = 0
    indexed: int = 0
    chunks: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    steps_computed: int = 0
    steps_reused: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits over processed frames."""
        return self.hits / self.frames if self.frames else 0.0

    @property
    def indexing_rate(self) -> float:
        """Indexed frames over hits."""
        return self.indexed / self.hits if self.hits else 0.0

    def add(self, chunk: ChunkManifest) -> None:
        self.frames += chunk.n_frames
        self.hits += chunk.n_hits
        self.indexed += chunk.n_indexed
        self.chunks += 1
        n_computed = sum(chunk.seconds.get(name, 0.0) > 0 for name in chunk.steps)
        self.steps_computed += n_computed
        self.steps_reused += len(chunk.steps) - n_computed
        for name, seconds in chunk.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds


@dataclass(frozen=True)
class Progress:
    """A chunk has been done; for whoever shows it.

    figures : what is remembered of the chunk, the frames among it that have come since. lag_s : s since it was sealed.
    outlook : for each stop criterion, in words, whether or when it is enough.
    geometries : refined ones, in order.
    notes : what should be looked at, in words.
    task_runs : ids of the Prefect task runs that worked on the chunk, by group of steps.
    """

    run: str
    processing: str
    chunk: ChunkManifest
    totals: RunTotals
    figures: ChunkFigures
    lag_s: float
    planned: int
    pictures: tuple[Path, ...]
    geometries: tuple[GeometrySnapshot, ...] = ()
    notes: tuple[str, ...] = ()
    outlook: dict[str, str] = field(default_factory=dict)
    task_runs: dict[str, str] = field(default_factory=dict)


class Reporter(Protocol):
    """Told how a processing goes."""

    def started(self, run: Run, processing: Processing, recipe: Recipe) -> None: ...
    def chunk_done(self, progress: Progress) -> None: ...
    def finished(self, summary: dict[str, Any]) -> None: ...


class Silent:
    """A reporter that says nothing."""

    def started(self, run: Run, processing: Processing, recipe: Recipe) -> None:
        pass

    def chunk_done(self, progress: Progress) -> None:
        pass

    def finished(self, summary: dict[str, Any]) -> None:
        pass


class Reporters:
    """Several reporters, told in turn."""

    def __init__(self, reporters: Sequence[Reporter]) -> None:
        self._reporters = reporters

    def started(self, run: Run, processing: Processing, recipe: Recipe) -> None:
        for reporter in self._reporters:
            reporter.started(run, processing, recipe)

    def chunk_done(self, progress: Progress) -> None:
        for reporter in self._reporters:
            reporter.chunk_done(progress)

    def finished(self, summary: dict[str, Any]) -> None:
        for reporter in self._reporters:
            reporter.finished(summary)
