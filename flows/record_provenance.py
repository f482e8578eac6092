"""Tells the provenance of a processing as it goes: a `Reporter` beside the others."""

from typing import TYPE_CHECKING, Any

from storage.provenance import ProvenanceRecorder
from storage.step_store import Processing
from streaming.retrieval import Run
from tasks.recipe import Recipe
from tasks.steps import STEPS
from tasks.user_steps import user_step

if TYPE_CHECKING:
    from flows.progress import Progress

__all__ = ["ProvenanceReporter", "modules_of"]


class ProvenanceReporter:
    """Writes ``provenance/`` in the run folder."""

    def __init__(self, flow_run: str | None = None) -> None:
        self._flow_run = flow_run
        self._recorder: ProvenanceRecorder | None = None

    def started(self, run: Run, processing: Processing, recipe: Recipe) -> None:
        self._recorder = ProvenanceRecorder(run.folder, processing, flow_run=self._flow_run)
        self._recorder.started(modules_of(recipe))

    def chunk_done(self, progress: "Progress") -> None:
        if self._recorder is not None:
            self._recorder.chunk_done(progress.chunk, progress.task_runs)

    def finished(self, summary: dict[str, Any]) -> None:
        if self._recorder is not None:
            self._recorder.exported(summary.get("files", {}))
            self._recorder.finished(summary)


def modules_of(recipe: Recipe) -> dict[str, dict[str, str]]:
    """For each step of a recipe, the source digest of each module it is computed with."""
    steps = {s.name: user_step(s.use) if ":" in s.use else STEPS[s.use] for s in recipe.steps}
    return {name: step.modules for name, step in steps.items()}
