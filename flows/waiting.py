"""Waiting for enough data: what `nearline.wait_until` and `nearline wait` do."""

import time
from collections.abc import Callable
from pathlib import Path

from pydantic import Field

from flows.criteria import Criterion, read_criterion
from flows.decisions import Judge
from flows.run_tally import chosen_processing
from storage.errors import NotEnough, RunNotFound
from storage.models import Record
from storage.step_store import Processing
from streaming.retrieval import Run

__all__ = ["Waited", "wait_until"]

_LOOK_S = 0.5


class Waited(Record):
    """What a criterion rests on, now."""

    is_met: bool
    criterion: str
    run: str
    processing: str
    n_chunks: int
    values: dict[str, float | None]
    outlook: str = Field(description="in words: enough, or when it will be")


def wait_until(
    run: Run,
    criterion: str,
    *,
    processing: str | None = None,
    timeout: float | None = None,
    every_s: float = _LOOK_S,
    tell: Callable[[Waited], None] = lambda waited: None,
) -> Waited:
    """Return once a stop criterion is met by what has been processed of a run.

    Parameters
    ----------
    run : live or finished; it may be that nobody has begun to process it.
    criterion : such as ``completeness > 0.98`` or ``sample: n_indexed >= 5000``.
    processing : whose results; by default the promoted one, else the newest.
    timeout : s; None to wait until it is met, or can no more be.
    tell : told whenever there is something new.

    Raises
    ------
    BadCriterion : it cannot be read, or asks for something that no step makes.
    NotEnough : the processing has finished, or the time is over, and it is not met; the message gives the values.
    RunNotFound : the run's folder cannot be seen here.
    """
    wanted = read_criterion(criterion)
    folder = run.visible_folder
    if folder is None:
        raise RunNotFound(f"the folder {run.folder} of run {run.name} is not visible here; wait on its machine")
    deadline = None if timeout is None else time.monotonic() + timeout
    chosen = _wait_for_processing(folder.path, processing, deadline, every_s, run.name)
    judge, last = Judge(chosen, [wanted]), None
    while True:
        # Before the look: what is added meanwhile is looked at once more.
        is_over = chosen.is_finished
        n_new = judge.refresh()
        found = _waited(judge, wanted)
        if n_new or last is None:
            tell(found)
        last = found
        if found.is_met:
            return found
        if is_over and wanted.scope == "run":
            raise NotEnough(f"processing {chosen.name} of {run.name} has finished, and {_in_words(found)}")
        if deadline is not None and time.monotonic() > deadline:
            raise NotEnough(f"after {timeout:g} s {_in_words(found)}; {found.outlook}")
        time.sleep(every_s)


def _wait_for_processing(
    folder: Path, name: str | None, deadline: float | None, every_s: float, run: str
) -> Processing:
    while (found := chosen_processing(folder, name)) is None:
        if deadline is not None and time.monotonic() > deadline:
            raise NotEnough(f"nobody has begun to process {run}; `nearline process {run}` does")
        time.sleep(every_s)
    return found


def _waited(judge: Judge, criterion: Criterion) -> Waited:
    return Waited(
        is_met=judge.is_met(criterion),
        criterion=criterion.text,
        run=judge.tally.run,
        processing=judge.processing.name,
        n_chunks=len(judge.tally),
        values=judge.values(criterion),
        outlook=judge.outlook(criterion),
    )


def _in_words(found: Waited) -> str:
    known = ", ".join(f"{name} is {'unknown' if v is None else f'{v:.6g}'}" for name, v in found.values.items())
    return f"{found.criterion!r} is not met: {known}"
