"""Who made the outputs behind an exported file: one NXprocess for each step of the recipe."""

from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from storage.nexus import NxmxWriter
from storage.step_store import ChunkManifest, StepStore

__all__ = ["StepHistory"]


class StepHistory:
    """What the step outputs of some chunks say of themselves, gathered chunk by chunk.

    An output may be older than the processing that used it, and made by another commit: its own record counts.
    """

    def __init__(self, run_folder: Path) -> None:
        self._store = StepStore(run_folder)
        self._made: dict[str, list[dict[str, Any]]] = {}
        self._params: dict[str, dict[str, Any]] = {}

    def add(self, chunk: ChunkManifest) -> None:
        """Take in who made each output of a chunk, and with which parameters, defaults included."""
        for step, digest in chunk.steps.items():
            record = self._store.record(digest) or {}
            self._params[step] = record.get("params", {})
            made = self._made.setdefault(step, [])
            if "made" in record:
                made.append(record["made"])

    def write(self, writer: NxmxWriter, recipe: Mapping[str, Any], recipe_digest: str) -> None:
        """Record the steps in their order; ``recipe`` as in the manifest of a processing."""
        for spec in recipe["steps"]:
            name, made = spec["name"], self._made.get(spec["name"], [])
            writer.add_process(
                "nearline",
                ", ".join(_each(made, "version")) or version("nearline"),
                max((m["at"] for m in made), default=datetime.now(UTC)),
                {**spec, "params": self._params.get(name) or spec["params"]},
                recipe=recipe,
                recipe_digest=recipe_digest,
                commits=_each(made, "commit"),
                environments=_each(made, "environment"),
            )


def _each(made: list[dict[str, Any]], fact: str) -> list[str]:
    """The different values of a fact, in order."""
    return sorted({str(m[fact]) for m in made if m.get(fact)})
