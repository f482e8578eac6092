"""Process several data sources of a run at once: `run_processing` for each, in a thread of its own.

Each source has its processing, its claim, its page and its summary; they share nothing but the run and the cores.
"""

import contextvars
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

from storage.errors import ProcessingBusy, StreamNotFound
from storage.models import StreamHeader
from streaming.retrieval import Run

__all__ = ["Summaries", "process_sources"]

log = logging.getLogger("nearline.process")

_LOOK_AGAIN_S = 0.5
_MOST_SOURCES = 64

# By data source; None where somebody else is at it.
Summaries = dict[str, dict[str, Any] | None]


def process_sources(
    run: Run, sources: Sequence[str] | Literal["all"], process: Callable[[str], dict[str, Any]]
) -> Summaries:
    """Process data sources of a run side by side, live or finished; their summaries, by name.

    Parameters
    ----------
    sources : their names; ``all`` are the detectors of the run (`storage.models.StreamHeader`: frames, of no parent,
        not a channel, not in memory only), also those that a live run gets later.
    process : processes one source, by name, to its end.

    Raises
    ------
    StreamNotFound : the run has ended without a detector.
    The error of the first source in order that failed, once all have ended; the others' work stays, and is taken up
    again like any other.
    """
    under_way: dict[str, Future[dict[str, Any]]] = {}
    with ThreadPoolExecutor(_MOST_SOURCES, thread_name_prefix="source") as threads:
        for name in _detectors(run) if sources == "all" else dict.fromkeys(sources):
            # Prefect knows by context which flow run a task belongs to.
            under_way[name] = threads.submit(contextvars.copy_context().run, process, name)
    failed = {name: error for name, future in under_way.items() if (error := future.exception()) is not None}
    for name, error in failed.items():
        log.error("%s/%s: %s", run.name, name, error)
    for error in failed.values():
        if not isinstance(error, ProcessingBusy):
            raise error
    return {name: None if name in failed else future.result() for name, future in under_way.items()}


def _detectors(run: Run) -> Iterator[str]:
    """The detectors of a run whose frames are kept, each as soon as its header is known, until the run has ended."""
    known: set[str] = set()
    while True:
        is_over = run.state.is_terminal  # asked first: what comes before the end is seen
        for name in run.data_sources:
            if name not in known and "." not in name and _is_detector(run[name].header):
                known.add(name)
                yield name
        if is_over:
            break
        time.sleep(_LOOK_AGAIN_S)
    if not known:
        raise StreamNotFound(f"run {run.name} has ended without a detector; name the data sources to process")


def _is_detector(header: StreamHeader) -> bool:
    return header.kind == "frames" and header.parent is None and not header.is_online
