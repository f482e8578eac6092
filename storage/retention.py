"""Deleting runs, one by one or by a rule, so that it stays known what was there.

A deleted run keeps its header, its events and the ledger; frames, tables and results go. The
event comes first and the files after it: a deletion that was interrupted is completed by the
next one.
"""

import fcntl
import logging
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path

from pydantic import Field

from storage.errors import NearlineError, ProcessingBusy, RunBusy
from storage.files import file_sizes, is_local, remove
from storage.models import Model, RunState
from storage.names import run_key
from storage.run_folder import RunFolder, claim_stream, find_runs
from storage.states import StreamLedger
from storage.stream_source import FolderSource, state_of

__all__ = [
    "Deleted", "Retained", "RetentionPolicy", "RunAge", "all_claimed", "apply_policy", "delete_run", "parse_age",
    "select_runs",
]  # fmt: skip

log = logging.getLogger("nearline.retention")

_KEPT = ("run.json", "events")
_KEPT_SUFFIXES = (".stream.json", ".chunks", ".claims")
_AGE = re.compile(r"(\d+(?:\.\d+)?)\s*(min|h|d|w)")
_UNITS = {"min": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class Deleted(Model):
    """What a deletion removed; nothing if it had been done before."""

    run: str
    n_files: int
    n_bytes: int


class RetentionPolicy(Model):
    """Which runs may go: those older than an age, but never the newest few of an experiment."""

    older_than: timedelta = Field(timedelta(0), description="since the run ended")
    keep_last: int = Field(0, ge=0, description="newest runs of each experiment that stay, whatever their age")
    experiment: str | None = Field(None, description="only this one")
    only_uploaded: bool = Field(False, description="only runs of which a whole copy was uploaded")


@dataclass(frozen=True)
class RunAge:
    """What a policy judges a run by."""

    experiment: str
    run: int
    started_at: datetime
    ended_at: datetime | None
    state: RunState
    is_uploaded: bool = False

    @property
    def name(self) -> str:
        return run_key(self.experiment, self.run)


@dataclass
class Retained:
    """What an application of a policy did, or would do."""

    selected: list[str] = field(default_factory=list)
    deleted: list[Deleted] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


def delete_run(folder: RunFolder, by: str, why: str) -> Deleted:
    """Remove a run's frames, tables and results; header, events and ledger stay.

    Raises
    ------
    RunBusy : the run is live.
    StreamOwned : one of its streams has a writer.
    ProcessingBusy : it is being processed.
    """
    state = state_of(folder)
    if not state.is_terminal:
        raise RunBusy(f"run {_key(folder)} in {folder.path} is {state}; let it end before it is deleted")
    with all_claimed(folder, f"deletion by {by}"):
        if state is not RunState.deleted:
            folder.add_event("run_deleted", _tombstone(folder, by, why))
        return _remove_payload(folder)


def select_runs(runs: Iterable[RunAge], policy: RetentionPolicy, now: datetime) -> list[RunAge]:
    """The runs that a policy lets go, oldest first. A run that has not ended is never among them."""
    by_experiment: dict[str, list[RunAge]] = defaultdict(list)
    for run in runs:
        if run.state is not RunState.deleted and policy.experiment in (None, run.experiment):
            by_experiment[run.experiment].append(run)
    chosen = []
    for mine in by_experiment.values():
        newest_first = sorted(mine, key=lambda run: (run.started_at, run.run), reverse=True)
        chosen += [run for run in newest_first[policy.keep_last :] if _may_go(run, policy, now)]
    return sorted(chosen, key=lambda run: (run.started_at, run.experiment, run.run))


def apply_policy(
    root: Path,
    policy: RetentionPolicy,
    now: datetime,
    by: str,
    *,
    dry_run: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Retained:
    """Delete what the policy lets go below a data folder, and complete deletions that were interrupted.

    A run that cannot be deleted is named with the reason, and the others go on.
    """
    result = Retained()
    folders = {_key(folder): folder for folder in find_runs(root)}
    ages: dict[str, RunAge] = {}
    for name, folder in folders.items():
        try:
            ages[name] = age_of(folder)
        except NearlineError as error:
            result.refused[name] = str(error)
    result.selected = [name for name, age in ages.items() if _is_unfinished(folders[name], age, policy)]
    result.selected += [run.name for run in select_runs(ages.values(), policy, now)]
    for n_done, name in enumerate([] if dry_run else result.selected, 1):
        try:
            result.deleted.append(delete_run(folders[name], by, f"retention: {_in_words(policy)}"))
        except (NearlineError, OSError) as error:
            result.refused[name] = str(error)
        if progress:
            progress(n_done, len(result.selected))
    return result


def age_of(folder: RunFolder) -> RunAge:
    """What a policy needs to know of a run."""
    header = folder.header
    ends = [event.at for event in folder.events("run_finished")]
    return RunAge(
        experiment=header.experiment,
        run=header.run,
        started_at=header.started_at,
        ended_at=ends[-1] if ends else None,
        state=folder.state,
        is_uploaded=any(folder.events("run_uploaded")),
    )


def parse_age(text: str) -> timedelta:
    """``30d``, ``12h``, ``6w`` or ``90min`` as a time; ValueError for anything else."""
    match = _AGE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"{text!r} is not an age; write a number and min, h, d or w, such as 30d")
    return timedelta(**{_UNITS[match[2]]: float(match[1])})


def _may_go(run: RunAge, policy: RetentionPolicy, now: datetime) -> bool:
    if run.ended_at is None or not run.state.is_terminal:
        return False
    return now - run.ended_at >= policy.older_than and (run.is_uploaded or not policy.only_uploaded)


def _is_unfinished(folder: RunFolder, age: RunAge, policy: RetentionPolicy) -> bool:
    """Whether a deletion was interrupted."""
    is_meant = policy.experiment in (None, age.experiment)
    return is_meant and age.state is RunState.deleted and any(_payload(folder))


def _in_words(policy: RetentionPolicy) -> str:
    words = [f"older than {policy.older_than}"] if policy.older_than else []
    words += [f"not among the last {policy.keep_last}"] if policy.keep_last else []
    return ", ".join([*words, *(["uploaded"] if policy.only_uploaded else [])])


def _tombstone(folder: RunFolder, by: str, why: str) -> dict[str, object]:
    """What stays known: who, why, where a copy is, and each stream's ledger with its frames as pruned."""
    ledgers = {}
    for name in folder.data_sources():
        try:
            ledgers[name] = _pruned(FolderSource(folder, name).ledger()).model_dump(mode="json")
        except NearlineError as error:  # a damaged stream must not keep a run from being deleted
            log.warning("the ledger of %s is not kept: %s", name, error)
    return {
        "by": by,
        "why": why,
        "state": state_of(folder).value,
        "n_bytes": sum(file_sizes(folder.path).values()),
        "copies": [event.payload["to"] for event in folder.events("run_uploaded")],
        "ledger": ledgers,
    }


def _pruned(ledger: StreamLedger) -> StreamLedger:
    ledger = ledger.without_memory()
    return ledger.model_copy(
        update={
            "received": ledger.received + ledger.late,
            "pruned": ledger.pruned + ledger.stored + ledger.incomplete + ledger.late,
            "stored": 0,
            "incomplete": 0,
            "late": 0,
            "ranges": [r for r in ledger.ranges if r.state not in ("incomplete", "late")],
            "is_terminal": True,
        }
    )


def _payload(folder: RunFolder) -> Iterator[Path]:
    """What of a run's folder a deletion removes."""
    for path in folder.path.iterdir():
        if path.name not in _KEPT and not path.name.endswith(_KEPT_SUFFIXES):
            yield path


def _remove_payload(folder: RunFolder) -> Deleted:
    n_files = n_bytes = 0
    for path in list(_payload(folder)):
        sizes = file_sizes(path)
        remove(path)
        n_files, n_bytes = n_files + len(sizes), n_bytes + sum(sizes.values())
    return Deleted(run=_key(folder), n_files=n_files, n_bytes=n_bytes)


@contextmanager
def all_claimed(folder: RunFolder, owner: str, *, processings: bool = True) -> Iterator[None]:
    """Hold all locks of a run: nobody writes it meanwhile, nor processes it. An object store has none.

    Raises
    ------
    StreamOwned, ProcessingBusy : somebody else has one.
    """
    with ExitStack() as held:
        if is_local(folder.path):
            for name in folder.data_sources():
                _, fd = claim_stream(folder.stream(name), owner)
                held.callback(os.close, fd)
            for claim in folder.path.glob("processed/*/claim") if processings else ():
                held.callback(os.close, _lock_processing(claim))
        yield


def _lock_processing(claim: Path) -> int:
    fd = os.open(claim, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise ProcessingBusy(f"processing {claim.parent.name} is at work in {claim.parent}; wait for it") from None
    return fd


def _key(folder: RunFolder) -> str:
    return run_key(folder.header.experiment, folder.header.run)
