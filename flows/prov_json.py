"""Provenance as PROV-JSON (W3C member submission, 2013-04-24), which the `prov` package and others read.

https://www.w3.org/submissions/prov-json/
"""

import json
from typing import Any

from storage.provenance import Activity, Agent, Entity, Provenance, Relation

__all__ = ["prov_json"]

# The two ends of a relation, as PROV-JSON names them.
_ENDS = {
    "used": ("prov:activity", "prov:entity"),
    "wasGeneratedBy": ("prov:entity", "prov:activity"),
    "wasAssociatedWith": ("prov:activity", "prov:agent"),
    "wasDerivedFrom": ("prov:generatedEntity", "prov:usedEntity"),
    "actedOnBehalfOf": ("prov:delegate", "prov:responsible"),
}
_AGENT_TYPES = {"person": "prov:Person", "software": "prov:SoftwareAgent", "flow run": "prov:SoftwareAgent"}


def prov_json(graph: Provenance, run: str) -> dict[str, Any]:
    """The graph of a run as a PROV-JSON document.

    Parameters
    ----------
    run : experiment/number; ids are in the namespace ``urn:nearline:<experiment>/<number>/``.
    """
    document: dict[str, Any] = {
        "prefix": {"run": f"urn:nearline:{run}/", "nearline": "urn:nearline:terms/"},
        "activity": {_id(a.id): _activity(a) for a in graph.activities.values()},
        "entity": {_id(e.id): _entity(e) for e in graph.entities.values()},
        "agent": {_id(a.id): _agent(a) for a in graph.agents.values()},
    }
    for number, relation in enumerate(graph.relations):
        document.setdefault(relation.kind, {})[f"_:r{number}"] = _relation(relation)
    return document


def _id(name: str) -> str:
    return f"run:{name}"


def _activity(activity: Activity) -> dict[str, Any]:
    times = {"prov:startTime": activity.started_at, "prov:endTime": activity.ended_at}
    frames = {"nearline:start": activity.start, "nearline:stop": activity.stop}
    said = {name: time.isoformat() for name, time in times.items() if time is not None}
    said |= {name: str(number) for name, number in frames.items() if number is not None}
    return {"prov:type": activity.kind, **said, **_attributes(activity.attributes)}


def _entity(entity: Entity) -> dict[str, Any]:
    facts = {"nearline:digest": entity.digest, "prov:location": entity.location}
    return {"prov:type": entity.kind, **{k: v for k, v in facts.items() if v}, **_attributes(entity.attributes)}


def _agent(agent: Agent) -> dict[str, Any]:
    kind = _AGENT_TYPES.get(agent.kind)
    said: dict[str, Any] = {"prov:type": {"$": kind, "type": "prov:QUALIFIED_NAME"} if kind else agent.kind}
    return said | _attributes(agent.attributes)


def _relation(relation: Relation) -> dict[str, Any]:
    subject, object_ = _ENDS[relation.kind]
    role = {"prov:role": relation.role} if relation.role else {}
    return {subject: _id(relation.subject), object_: _id(relation.object), **role}


def _attributes(attributes: dict[str, Any]) -> dict[str, Any]:
    """What else is known; what PROV-JSON has no type for is written as JSON text."""
    return {f"nearline:{name}": _literal(value) for name, value in attributes.items() if value is not None}


def _literal(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool) else json.dumps(value, sort_keys=True, default=str)
