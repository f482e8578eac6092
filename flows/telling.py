"""Decisions as Prefect events: sent by the flow that made them, and once more by catch-up if they did not arrive."""

from collections.abc import Sequence
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from prefect.client.orchestration import SyncPrefectClient
from prefect.events import emit_event

from flows.decisions import Decision
from flows.relay_events import EVENTS_AT_ONCE
from storage.names import parse_run_key

__all__ = ["event_id", "tell_again", "tell_enough"]

_EVENT = "nearline.run.enough"


def event_id(decision: Decision) -> UUID:
    """The same whoever tells it: the server keeps one of them."""
    return uuid5(NAMESPACE_URL, f"{_EVENT}/{decision.run}/{decision.processing}/{decision.criterion}")


def tell_enough(decision: Decision) -> None:
    """Say from within a flow run that a run has enough; an automation may act on it. Waits for no server."""
    emit_event(_EVENT, _resource(decision), payload=_payload(decision), id=event_id(decision), occurred=decision.at)


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
