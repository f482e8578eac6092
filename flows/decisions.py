"""When is it enough? Stop criteria judged after each chunk, and what was decided, with all that it rests on.

A decision ends nothing by itself: it is written down beside the processing (``decisions.jsonl``), told to Prefect as
an event, and shown on the page. A script (`nearline.wait_until`) or an automation acts on it.
"""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import Field

from flows.criteria import Criterion, Quantity, read_criteria
from flows.forecasting import History, forecast
from flows.run_tally import (
    GrowingMerges,
    RunTally,
    cell_of,
    chosen_processing,
    runs_of_sample,
    usual_d_min,
    values_of,
)
from storage.errors import BadCriterion, NearlineError
from storage.files import append_line
from storage.models import Record
from storage.names import run_key
from storage.run_folder import RunFolder
from storage.step_store import Processing

__all__ = ["Decision", "Decisions", "Judge", "decisions_of"]

log = logging.getLogger("nearline.decisions")

_FILE = "decisions.jsonl"


class Decision(Record):
    """A criterion was met, at this chunk, for these values."""

    criterion: str
    at: datetime
    run: str = Field(description="experiment/number of the run whose chunk tipped the balance")
    processing: str
    chunk: int
    values: dict[str, float | None] = Field(description="of each quantity that the criterion names")
    inputs: list[dict[str, Any]] = Field(description="for each run: processing, chunks, digest of their step outputs")
    recipe_digest: str


class Judge:
    """Judges criteria over what is known of a processing, or for ``sample:`` of all runs of its sample.

    quantities besides those of the criteria may be asked for with `values`.
    """

    def __init__(self, processing: Processing, criteria: Sequence[Criterion]) -> None:
        self.processing, self.criteria = processing, tuple(criteria)
        self._quantities = {scope: _quantities(c for c in criteria if c.scope == scope) for scope in ("run", "sample")}
        every = [quantity for some in self._quantities.values() for quantity in some]
        self._is_merged = any(quantity.is_merged for quantity in every)
        self._d_min = usual_d_min(processing) if self._is_merged else None
        self.tally = self._new_tally(processing)
        self._others: dict[Path, RunTally] = {}
        self._history = {scope: History() for scope in self._quantities}
        self._merges = {scope: GrowingMerges(self._d_min) for scope in self._quantities}
        self._values: dict[str, dict[Quantity, float | None]] = {"run": {}, "sample": {}}

    def refresh(self) -> int:
        """Take in what has been processed meanwhile, here and, if that is asked for, in other runs; how many chunks."""
        n_new = self.tally.refresh()
        if self._quantities["sample"]:
            n_new += self._refresh_others()
        for scope, quantities in self._quantities.items():
            tallies = self._tallies(scope)
            self._values[scope] = values_of(tallies, quantities, self._merges[scope])
            self._history[scope].add(sum(tally.minutes for tally in tallies), self._values[scope])
        return n_new

    def is_met(self, criterion: Criterion) -> bool:
        return criterion.is_met(self._values[criterion.scope])

    def values(self, criterion: Criterion) -> dict[str, float | None]:
        """The values that a criterion rests on now."""
        known = self._values[criterion.scope]
        return {str(quantity): known.get(quantity) for quantity in criterion.quantities}

    def outlook(self, criterion: Criterion) -> str:
        """In words: is it enough, when will it be, or that nothing can be said."""
        if self.is_met(criterion):
            return "enough"
        found = forecast(criterion.tree, self._values[criterion.scope], self._history[criterion.scope])
        return str(found) if found is not None else "not enough yet"

    def inputs(self, criterion: Criterion) -> list[dict[str, Any]]:
        return [dict(tally.inputs) for tally in self._tallies(criterion.scope)]

    def _tallies(self, scope: str) -> list[RunTally]:
        return [self.tally, *self._others.values()] if scope == "sample" else [self.tally]

    def _new_tally(self, processing: Processing) -> RunTally:
        quantities = [quantity for some in self._quantities.values() for quantity in some]
        cell = cell_of(processing) if self._is_merged else None
        return RunTally(processing, quantities, cell, self._d_min)

    def _refresh_others(self) -> int:
        """The other runs of the same sample, each by the processing that stands for it."""
        me = RunFolder.open(self.processing.run)
        if me.header.sample is None:
            raise BadCriterion(
                f"run {run_key(me.header.experiment, me.header.run)} names no sample, so criteria of a sample cannot "
                "be judged; start runs with --sample"
            )
        for folder in runs_of_sample(me.path.parent, me.header.sample):
            if folder.path.resolve() == me.path.resolve() or folder.path in self._others:
                continue
            if (processing := chosen_processing(folder.path)) is not None:
                self._others[folder.path] = self._new_tally(processing)
        return sum(tally.refresh() for tally in self._others.values())


def _quantities(criteria: Iterable[Criterion]) -> tuple[Quantity, ...]:
    return tuple(dict.fromkeys(quantity for criterion in criteria for quantity in criterion.quantities))


class Decisions:
    """Judges a processing's stop criteria after each of its chunks.

    What cannot be judged is said so in the log, and stops nothing.

    tell : told of each decision, once; also if the processing was interrupted and taken up again.
    """

    def __init__(
        self,
        processing: Processing,
        recipe_digest: str,
        stop: Sequence[str],
        tell: Callable[[Decision], None] = lambda decision: None,
    ) -> None:
        self._criteria, self._tell, self._recipe_digest = read_criteria(stop), tell, recipe_digest
        self._judge = Judge(processing, self._criteria) if self._criteria else None
        self._met = {decision.criterion for decision in decisions_of(processing)} if self._criteria else set()

    def judge(self, chunk: int) -> dict[str, str]:
        """How each criterion stands now that a chunk is done, in words."""
        if self._judge is None:
            return {}
        try:
            self._judge.refresh()
            return {criterion.text: self._consider(criterion, self._judge, chunk) for criterion in self._criteria}
        except (NearlineError, OSError) as error:
            log.warning("stop criteria cannot be judged: %s", error)
            return {"stop criteria": f"cannot be judged: {error}"}

    def _consider(self, criterion: Criterion, judge: Judge, chunk: int) -> str:
        outlook = judge.outlook(criterion)
        if criterion.text in self._met:
            return "enough"
        log.info("%s: %s", criterion.text, outlook)
        if not judge.is_met(criterion):
            return outlook
        decision = Decision(
            criterion=criterion.text,
            at=datetime.now(UTC),
            run=judge.tally.run,
            processing=judge.processing.name,
            chunk=chunk,
            values=judge.values(criterion),
            inputs=judge.inputs(criterion),
            recipe_digest=self._recipe_digest,
        )
        # On the disk before anybody hears of it.
        append_line(judge.processing.folder / _FILE, decision.model_dump_json())
        self._met.add(criterion.text)
        self._tell(decision)
        return outlook


def decisions_of(processing: Processing) -> list[Decision]:
    """What has been decided of a processing, in order; a line that a crash has torn is left out."""
    path = processing.folder / _FILE
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    found = []
    for line in lines:
        try:
            found.append(Decision.model_validate(json.loads(line)))
        except ValueError:
            log.warning("a line of %s is torn; it is left out", path)
    return found
