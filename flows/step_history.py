"""Who made the outputs behind an exported file: one NXprocess for each step of the recipe."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from storage.nexus import NxmxWriter
from storage.step_store import ChunkManifest, StepStore

__all__ = ["StepHistory"]


@dataclass
class _Made:
    """Who made the outputs of one step: each fact once, however many chunks there are."""

    params: dict[str, Any] = field(default_factory=dict)
    last_at: str = ""
    facts: dict[str, set[str]] = field(default_factory=dict)

    def add(self, record: Mapping[str, Any]) -> None:
        self.params = record.get("params", {})
        made = record.get("made", {})
        self.last_at = max(self.last_at, made.get("at", ""))
        for fact in ("version", "commit", "environment"):
            if made.get(fact):
                self.facts.setdefault(fact, set()).add(str(made[fact]))

    def each(self, fact: str) -> list[str]:
        """The different values of a fact, in order."""
        return sorted(self.facts.get(fact, ()))


class StepHistory:
    """What the step outputs of some chunks say of themselves, gathered chunk by chunk.

    An output may be older than the processing that used it, and made by another commit: its own record counts.
    """

    def __init__(self, run_folder: Path) -> None:
        self._store = StepStore(run_folder)
        self._made: dict[str, _Made] = {}

    def add(self, chunk: ChunkManifest) -> None:
        """Take in who made each output of a chunk, and with which parameters, defaults included."""
        for step, digest in chunk.steps.items():
            self._made.setdefault(step, _Made()).add(self._store.record(digest) or {})

    def write(self, writer: NxmxWriter, recipe: Mapping[str, Any], recipe_digest: str) -> None:
        """Record the steps in their order; ``recipe`` as in the manifest of a processing."""
        for spec in recipe["steps"]:
            made = self._made.get(spec["name"]) or _Made()
            writer.add_process(
                "nearline",
                ", ".join(made.each("version")) or version("nearline"),
                made.last_at or datetime.now(UTC),
                {**spec, "params": made.params or spec["params"]},
                recipe=recipe,
                recipe_digest=recipe_digest,
                commits=made.each("commit"),
                environments=made.each("environment"),
            )
