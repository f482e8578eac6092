"""The Prefect flow that processes a run: `run_processing` with a task per chunk and artifacts to look at.

Prefect records; it decides nothing. The results are the same without it.
"""

import base64
import io
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import httpx
from PIL import Image
from prefect import flow, runtime, task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import PrefectException

from flows.run_processing import ProcessRequest, Progress, run_processing
from storage.run_folder import ChunkCommit
from storage.step_store import Processing
from streaming.retrieval import Run
from tasks.recipe import Recipe, load_recipe

__all__ = ["process_run"]

log = logging.getLogger("nearline.process")

T = TypeVar("T")
_PICTURE_PX = 420


@flow(name="process-run", flow_run_name="process {run}", persist_result=False, validate_parameters=True)
def process_run(
    run: str,
    recipe: dict[str, Any] | str,
    data_source: str | None = None,
    service: str | None = None,
    root: str | None = None,
    n_threads: int | None = None,
) -> dict[str, Any]:
    """Follow a run, live or finished, and analyse each chunk as it is sealed.

    Parameters
    ----------
    run : experiment/number such as lyso-2026/17, or the path of a run folder.
    recipe : the recipe's content, or the path of its file.
    data_source : which detector; needed only if the run has several.
    service : address of the streaming service; by default the one on this machine.
    root : data folder to look in when no service answers.
    n_threads : threads over the frames of a chunk; by default one per core.
    """
    content = load_recipe(recipe).model_dump(mode="json")
    options = {} if n_threads is None else {"n_threads": n_threads}
    request = ProcessRequest(run=run, recipe=content, data_source=data_source, service=service, root=root, **options)
    flow_run = (str(runtime.flow_run.id), str(runtime.flow_run.ui_url))
    return run_processing(request, reporter=_Artifacts(), call=_as_task, flow_run=flow_run)


def _task_run_name() -> str:
    given = runtime.task_run.parameters
    return f"{given['stage']} {given['run']} chunk {given['chunk']}: frames {given['first']} to {given['last']}"


# Step outputs are content-addressed already; a second cache would only be able to disagree.
@task(name="chunk", task_run_name=_task_run_name, cache_policy=NO_CACHE, persist_result=False, retries=1)
def _chunk_task(stage: str, run: str, chunk: int, first: int, last: int, work: Callable[[], Any]) -> Any:
    return work()


def _as_task(stage: str, run: str, commit: ChunkCommit, work: Callable[[], T], /) -> T:
    # An export appends to an open file: doing it twice would not be the same.
    chunk_task = _chunk_task if stage == "process" else _chunk_task.with_options(retries=0)
    return cast(T, chunk_task(stage, run, commit.chunk, commit.start, commit.stop - 1, work))


class _Artifacts:
    """What the Prefect UI shows of a processing."""

    def __init__(self) -> None:
        self._key = ""
        self._progress: Any = None
        self._lines: list[str] = []

    def started(self, run: Run, processing: Processing, recipe: Recipe) -> None:
        self._key = _artifact_key(run.name, processing.name)
        self._title = f"{run.name} · {processing.name} · {recipe.name}"
        self._progress = _tell(create_progress_artifact, 0.0, key=f"{self._key}-progress", description=self._title)

    def chunk_done(self, progress: Progress) -> None:
        totals = progress.totals
        if progress.planned:
            self._show_progress(min(100.0 * (progress.chunk.stop / progress.planned), 100.0))
        self._lines.append(
            f"| {progress.chunk.chunk} | {progress.chunk.start}–{progress.chunk.stop - 1} | {progress.chunk.n_frames} "
            f"| {progress.chunk.n_hits} | {progress.chunk.n_indexed} | {progress.lag_frames} |"
        )
        text = [
            f"# {self._title}",
            f"**{totals.frames}** frames · hit rate **{100 * totals.hit_rate:.1f} %** of frames · "
            f"indexing rate **{100 * totals.indexing_rate:.1f} %** of hits · lag {progress.lag_frames} frames",
            "",
            "| chunk | frames | received | hits | indexed | lag |",
            "|---|---|---|---|---|---|",
            *self._lines[-20:],
        ]
        _write("\n".join(text), f"{self._key}-rates", "hit and indexing rate by chunk")

    def finished(self, summary: dict[str, Any]) -> None:
        self._show_progress(100.0)
        files = [f"| {name} | `{path}` |" for name, path in summary["files"].items()]
        pictures = [_embedded(Path(path)) for path in summary["pictures"]]
        text = [
            f"# {self._title}",
            f"**{summary['frames']}** frames, "
            f"**{summary['hits']}** hits ({100 * summary['hit_rate']:.1f} % of frames), "
            f"**{summary['indexed']}** indexed ({100 * summary['indexing_rate']:.1f} % of hits), "
            f"{summary['seconds']:.1f} s",
            "",
            "| file | path |",
            "|---|---|",
            *files,
            "",
            *pictures,
        ]
        _write("\n".join(text), f"{self._key}-summary", "what came out, with examples")

    def _show_progress(self, percent: float) -> None:
        if self._progress is not None:
            _tell(update_progress_artifact, self._progress, percent)


def _write(text: str, key: str, description: str) -> None:
    _tell(create_markdown_artifact, text, key=key, description=description)


def _tell(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Show something in the UI; a server that is away costs a picture, not the analysis."""
    try:
        return function(*args, **options)
    except (httpx.HTTPError, PrefectException, OSError) as error:
        log.warning("the Prefect server did not take an artifact: %s", error)
        return None


def _artifact_key(run: str, processing: str) -> str:
    """Prefect allows lowercase letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", f"{run}-{processing}".lower()).strip("-")


def _embedded(path: Path) -> str:
    """A small copy of a picture inside the text: the UI has no access to the data folder."""
    with Image.open(path) as picture:
        small = picture.convert("RGB")
        small.thumbnail((_PICTURE_PX, _PICTURE_PX))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=70)
    return f"![{path.stem}](data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()})"
