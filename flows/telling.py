"""Decisions as Prefect events: sent by the flow that made them, and once more by catch-up if they did not arrive."""

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from prefect.client.orchestration import SyncPrefectClient
from prefect.events import emit_event

from flows.decisions import Decision, decisions_of
from flows.experiment import Experiment
from flows.flow_runs import Deed
from flows.relay_events import EVENTS_AT_ONCE
from storage.names import parse_run_key
from storage.step_store import Processing

__all__ = ["DecisionTeller", "event_id", "tell_again", "tell_enough"]

_EVENT = "nearline.run.enough"
# So long the flow that made a decision may take to tell it; a server forgets events after days, and so do we.
_UNTOLD_S, _FORGOTTEN_S = 30.0, 86_400.0


def event_id(decision: Decision) -> UUID:
    """The same whoever tells it: the server keeps one of them."""
    return uuid5(NAMESPACE_URL, f"{_EVENT}/{decision.run}/{decision.processing}/{decision.criterion}")


def tell_enough(decision: Decision) -> None:
    """Say from within a flow run that a run has enough; an automation may act on it. Waits for no server."""
    emit_event(_EVENT, _resource(decision), payload=_payload(decision), id=event_id(decision), occurred=decision.at)


class DecisionTeller:
    """Tells the server of an experiment's decisions whose event was lost: it was away when they were made.

    Parameters
    ----------
    patience_s : a decision is left so long to the flow that made it, 30 s at most.
    """

    def __init__(self, experiment: Experiment, patience_s: float) -> None:
        self._experiment, self._patience_s = experiment, min(_UNTOLD_S, patience_s)
        self._told: set[UUID] = set()

    def tell(self, client: SyncPrefectClient) -> Iterator[Deed]:
        """Send what the server does not have."""
        waiting = {event_id(decision): decision for decision in self._lately_decided()}
        new = [decision for known_as, decision in waiting.items() if known_as not in self._told]
        for decision in tell_again(client, new):
            yield Deed(decision.run, "told", f"the server did not know that it has enough: {decision.criterion}")
        self._told = set(waiting)

    def _lately_decided(self) -> Iterator[Decision]:
        now = datetime.now(UTC)
        for path in (self._experiment.root / self._experiment.experiment).glob("*/processed/*/decisions.jsonl"):
            if now.timestamp() - path.stat().st_mtime > _FORGOTTEN_S:
                continue
            processing = Processing(path.parents[2], path.parent.name)
            for decision in decisions_of(processing):
                if self._patience_s <= (now - decision.at).total_seconds() < _FORGOTTEN_S:
                    yield decision


def tell_again(client: SyncPrefectClient, decisions: Sequence[Decision]) -> list[Decision]:
    """Send those that the server does not have; which they were."""
    untold: list[Decision] = []
    for at in range(0, len(decisions), EVENTS_AT_ONCE):
        untold += _untold(client, decisions[at : at + EVENTS_AT_ONCE])
    for at in range(0, len(untold), EVENTS_AT_ONCE):
        client.request("POST", "/events", json=[_event(decision) for decision in untold[at : at + EVENTS_AT_ONCE]])
    return untold


def _untold(client: SyncPrefectClient, decisions: Sequence[Decision]) -> list[Decision]:
    wanted = {
        "id": {"id": [str(event_id(decision)) for decision in decisions]},
        "occurred": {"since": min(decision.at for decision in decisions).isoformat()},
    }
    answer = client.request("POST", "/events/filter", json={"filter": wanted, "limit": len(decisions)})
    there = {event["id"] for event in answer.json()["events"]}
    return [decision for decision in decisions if str(event_id(decision)) not in there]


def _event(decision: Decision) -> dict[str, Any]:
    return {
        "id": str(event_id(decision)),
        "occurred": decision.at.isoformat(),
        "event": _EVENT,
        "resource": _resource(decision),
        "payload": _payload(decision),
    }


def _resource(decision: Decision) -> dict[str, str]:
    experiment, number = parse_run_key(decision.run)
    return {
        "prefect.resource.id": f"nearline.run.{experiment}.{number}",
        "prefect.resource.name": decision.run,
        "nearline.experiment": experiment,
    }


def _payload(decision: Decision) -> dict[str, Any]:
    return {"name": decision.run, **decision.model_dump(mode="json")}
