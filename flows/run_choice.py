"""Which runs are meant: by name, by a range of numbers, or by an SQL condition over what is known of runs."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from storage.errors import BadName, BadQuery, NearlineError, RunNotFound
from storage.models import RunState
from storage.names import parse_run_key
from storage.promotion import default_processing
from storage.run_folder import find_runs
from storage.stream_source import state_of
from streaming import wire
from streaming.client import Client, is_reachable
from streaming.condition import Condition
from streaming.retrieval import open_run
from streaming.wire import DEFAULT_ADDRESS

__all__ = ["RUN_COLUMNS", "ChosenRuns", "choose_runs"]

_TIME_LIMIT_S = 30.0
_MOST_RUNS = 100_000


@dataclass(frozen=True)
class ChosenRuns:
    """Runs by name, ``experiment/number`` or a folder, and those left out, with the reason."""

    names: list[str]
    left_out: dict[str, str]


class _KnownRun:
    """What a condition can ask of one run; what is expensive to know is read when asked for."""

    def __init__(self, row: dict[str, Any], service: str | None, root: str | None) -> None:
        self.row, self._service, self._root = row, service, root
        self.name = f"{row['experiment']}/{row['run']}"

    @cached_property
    def n_frames(self) -> int | None:
        """Frames of all primary data sources, as announced; None if the run cannot be read."""
        try:
            run = open_run(self.name, service=self._service, root=self._root)
            return sum(run[n].status.announced for n in run.data_sources if run[n].header.parent is None)
        except (NearlineError, OSError):
            return None

    @cached_property
    def _results(self) -> dict[str, Any]:
        """Summary of the default processing; empty if there is none."""
        try:
            found = default_processing(Path(self.row["folder"]))
            return {} if found is None else {"processing": found.name, **(found.summary or {})}
        except (NearlineError, OSError):
            return {}

    def result(self, name: str) -> Any:
        return self._results.get(name)


# Name → (Arrow type, value); results are those of the default processing.
_COLUMNS: dict[str, tuple[pa.DataType, Callable[[_KnownRun], Any]]] = {
    "experiment": (pa.string(), lambda run: run.row["experiment"]),
    "run": (pa.int64(), lambda run: run.row["run"]),
    "state": (pa.string(), lambda run: run.row["state"]),
    "sample": (pa.string(), lambda run: run.row.get("sample")),
    "started_at": (pa.timestamp("us", tz="UTC"), lambda run: run.row["started_at"]),
    "folder": (pa.string(), lambda run: run.row["folder"]),
    "n_frames": (pa.int64(), lambda run: run.n_frames),
    "processing": (pa.string(), lambda run: run.result("processing")),
    "recipe": (pa.string(), lambda run: run.result("recipe")),
    "hits": (pa.int64(), lambda run: run.result("hits")),
    "indexed": (pa.int64(), lambda run: run.result("indexed")),
    "hit_rate": (pa.float64(), lambda run: run.result("hit_rate")),
    "indexing_rate": (pa.float64(), lambda run: run.result("indexing_rate")),
}
RUN_COLUMNS = tuple(_COLUMNS)


def choose_runs(
    texts: Sequence[str] = (),
    where: str | None = None,
    *,
    service: str | None = None,
    root: str | None = None,
) -> ChosenRuns:
    """The runs that are meant, each once, in the order given; those of a condition by experiment and number.

    Parameters
    ----------
    texts : ``lyso/3``, a range ``lyso/3-9`` (both ends included), a whole experiment ``lyso/*``, or a run
        folder. Several may stand in one text, with spaces or commas.
    where : SQL condition over `RUN_COLUMNS`, such as ``sample = 'lysozyme' AND hit_rate > 0.1``; of the runs of
        ``texts``, or of all there are.

    Raises
    ------
    BadName : a text is no run and no range.
    BadQuery : the condition is not one, or asks for an unknown column.
    RunNotFound : nothing was chosen.
    """
    words = [word for text in texts for word in _words(text.strip())]
    if not words and where is None:
        raise RunNotFound("no runs were named; write lyso-2026/3, lyso-2026/3-9 or lyso-2026/*, or give a condition")
    known = _Known(service, root)
    named = [name for word in words for name in known.expand(word)]
    names = list(dict.fromkeys(named)) if words else known.all_names
    if where is not None:
        names = _matching(known, names, where)
    is_explicit = {word for word in words if not known.is_pattern(word)}
    left_out = {}
    for name in names:
        state = known.state(name)
        # A range or condition is about the past: a live run in it would hold up all that come after it.
        if name not in is_explicit and state is not None and not state.is_terminal:
            left_out[name] = f"it is still {state.value}; name it to follow it to its end"
        elif state is RunState.deleted:
            left_out[name] = "its frames were deleted"
    chosen = [name for name in names if name not in left_out]
    if not chosen:
        why = "; ".join(f"{name}: {reason}" for name, reason in left_out.items()) or "nothing matches"
        raise RunNotFound(f"no run of {', '.join(words) or 'all runs'}{f' WHERE {where}' if where else ''}: {why}")
    return ChosenRuns(chosen, left_out)


class _Known:
    """All runs of a service or data folder, looked up once, when needed."""

    def __init__(self, service: str | None, root: str | None) -> None:
        self._service, self._root = service, root

    @cached_property
    def runs(self) -> dict[str, _KnownRun]:
        found = [_KnownRun(row, self._service, self._root) for row in _list_runs(self._service, self._root)]
        return {run.name: run for run in sorted(found, key=lambda r: (r.row["experiment"], r.row["run"]))}

    @property
    def all_names(self) -> list[str]:
        return list(self.runs)

    def is_pattern(self, word: str) -> bool:
        return _range(word) is not None or word.endswith("/*")

    def expand(self, word: str) -> Iterable[str]:
        """Names that a word means."""
        if _is_path(word):
            return [word]
        if word.endswith("/*"):
            return [name for name, run in self.runs.items() if run.row["experiment"] == word[:-2]]
        found = _range(word)
        if found is None:
            return ["/".join(map(str, parse_run_key(word)))]
        experiment, first, last = found
        if first > last:
            raise BadName(f"{word!r} is a range that ends before it begins; write {experiment}/{last}-{first}")
        return [
            name
            for name, run in self.runs.items()
            if run.row["experiment"] == experiment and first <= run.row["run"] <= last
        ]

    def state(self, name: str) -> RunState | None:
        """None where nobody has looked, or nobody knows."""
        if "runs" not in self.__dict__ or name not in self.runs:
            return None
        return RunState(self.runs[name].row["state"])


def _matching(known: _Known, names: list[str], where: str) -> list[str]:
    condition = Condition(where)
    try:
        columns = {reference: _column(condition, reference) for reference in condition.columns}
        runs = [known.runs[name] for name in names if name in known.runs]
        table = pa.table({name: _values(name, runs) for name in dict.fromkeys(["run", *columns.values()])})
        return [runs[at].name for at in condition.matches(table, columns, time_limit_s=_TIME_LIMIT_S)]
    finally:
        condition.close()


def _column(condition: Condition, reference: tuple[str, ...]) -> str:
    name = ".".join(reference).lower()
    if name not in _COLUMNS:
        raise condition.refused(f"there is no column {name[:60]!r} of runs; there are {', '.join(_COLUMNS)}")
    return name


def _values(name: str, runs: list[_KnownRun]) -> pa.Array:
    kind, value = _COLUMNS[name]
    values = [value(run) for run in runs]
    if pa.types.is_timestamp(kind):
        return pa.array(values, pa.string()).cast(kind)
    return pa.array(values, kind)


def _list_runs(service: str | None, root: str | None) -> list[dict[str, Any]]:
    """Rows of all runs, from the service's catalog or the data folder."""
    if service or (root is None and is_reachable(DEFAULT_ADDRESS)):
        client = Client(service or DEFAULT_ADDRESS)
        rows: list[dict[str, Any]] = client.connection.ask_json(wire.ListRuns(id=0, experiment=None))
    else:
        rows = [
            folder.header.model_dump(mode="json")
            | {"state": state_of(folder).value, "folder": str(folder.path.absolute())}
            for folder in find_runs(Path(root or "nearline-data"))
        ]
    if len(rows) > _MOST_RUNS:
        raise BadQuery(f"{len(rows)} runs are more than {_MOST_RUNS}; name an experiment")
    return rows


def _words(text: str) -> list[str]:
    """The runs and ranges in a text; a path may have spaces in it."""
    return [text] if _is_path(text) else [word for word in re.split(r"[,\s]+", text) if word]


def _range(word: str) -> tuple[str, int, int] | None:
    """(experiment, first, last) of ``lyso/3-9``."""
    experiment, slash, numbers = word.rpartition("/")
    match = re.fullmatch(r"(\d{1,15})-(\d{1,15})", numbers)
    if not match or not slash or _is_path(word):
        return None
    return experiment, int(match[1]), int(match[2])


def _is_path(word: str) -> bool:
    """A path, URL or address, told by how it begins; or what lies in deeper folders than a run's name says."""
    is_folder = word.count("/") > 1 and Path(word, "run.json").exists()
    return is_folder or word.startswith((".", "/", "~", "tcp://", "s3://"))
