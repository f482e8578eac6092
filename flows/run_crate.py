"""A processing as a Workflow Run RO-Crate: what was computed by which workflow, for archives that know nothing of us.

RO-Crate 1.1 (https://w3id.org/ro/crate/1.1) with the profiles Process Run Crate and Workflow Run Crate 0.5
(https://w3id.org/ro/wfrun/workflow/0.5). The recipe is the workflow, its steps are the tools, the processing is the
action. Data stay where they are and are referred to by ``file:`` addresses; recipe and provenance lie in the crate.
"""

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows.prov_json import prov_json
from storage.files import replace
from storage.provenance import Provenance, provenance_of
from storage.run_folder import RunFolder
from storage.step_store import Manifest, Processing

__all__ = ["write_crate"]

_CONTEXT = ["https://w3id.org/ro/crate/1.1/context", "https://w3id.org/ro/terms/workflow-run/context"]
_SPECIFICATION = "https://w3id.org/ro/crate/1.1"
_PROFILES = {
    "https://w3id.org/ro/wfrun/process/0.5": ("Process Run Crate", "0.5"),
    "https://w3id.org/ro/wfrun/workflow/0.5": ("Workflow Run Crate", "0.5"),
    "https://w3id.org/workflowhub/workflow-ro-crate/1.0": ("Workflow RO-Crate", "1.0"),
}
_RECIPE, _PROVENANCE = "recipe.json", "provenance.json"
_COMPLETED, _ACTIVE = "http://schema.org/CompletedActionStatus", "http://schema.org/ActiveActionStatus"
_FORMATS = {
    ".h5": "application/x-hdf5", ".json": "application/json", ".html": "text/html", ".png": "image/png",
    ".stream": "text/plain", ".geom": "text/plain", ".cell": "text/plain", ".hkl": "text/plain",
}  # fmt: skip
_LANGUAGE = {"@id": "#recipe", "@type": "ComputerLanguage", "name": "Nearline recipe"}

Item = dict[str, Any]


def write_crate(folder: RunFolder, processing: Processing, target: Path) -> Path:
    """Write a crate of one processing into a folder, and return the path of its ``ro-crate-metadata.json``.

    Raises
    ------
    RunNotFound : the run has no such processing.
    """
    graph = provenance_of(folder.path, processing.name)
    name = f"{folder.header.experiment}/{folder.header.run}"
    target.mkdir(parents=True, exist_ok=True)
    manifest = processing.manifest
    replace(target / _RECIPE, json.dumps(manifest.recipe, indent=1).encode())
    replace(target / _PROVENANCE, json.dumps(prov_json(graph, name), indent=1).encode())
    items = _items(folder, processing, manifest, graph, name)
    metadata = target / "ro-crate-metadata.json"
    replace(metadata, json.dumps({"@context": _CONTEXT, "@graph": items}, indent=1, default=str).encode())
    return metadata


def _items(folder: RunFolder, processing: Processing, manifest: Manifest, graph: Provenance, name: str) -> list[Item]:
    frames = _frames(folder, graph)
    files = _files(folder, graph)
    steps = [_step(spec, manifest) for spec in manifest.recipe.get("steps", [])]
    people, software = _people(graph), _software(graph)
    action = _action(processing, manifest, frames, files, people, name)
    parts = [{"@id": _RECIPE}, {"@id": _PROVENANCE}, *({"@id": file["@id"]} for file in (*frames, *files))]
    root = {
        "@id": "./",
        "@type": "Dataset",
        "name": f"Processing {processing.name} of run {name}",
        "description": f"Run {name}, sample {folder.header.sample or 'unnamed'}, analysed by Nearline",
        "datePublished": datetime.now(UTC).date().isoformat(),
        "license": "not stated",
        "conformsTo": [{"@id": profile} for profile in _PROFILES],
        "hasPart": parts,
        "mainEntity": {"@id": _RECIPE},
        "mentions": {"@id": action["@id"]},
    }
    metadata = {
        "@id": "ro-crate-metadata.json",
        "@type": "CreativeWork",
        "conformsTo": {"@id": _SPECIFICATION},
        "about": {"@id": "./"},
    }
    provenance = {
        "@id": _PROVENANCE, "@type": "File", "name": "provenance of every chunk (PROV-JSON)",
        "encodingFormat": "application/json",
    }  # fmt: skip
    profiles = [
        {"@id": address, "@type": "CreativeWork", "name": title, "version": number}
        for address, (title, number) in _PROFILES.items()
    ]
    workflow = _workflow(manifest, steps)
    return [
        metadata, root, *profiles, workflow, _LANGUAGE, *steps, provenance, *frames, *files, *people, *software, action
    ]  # fmt: skip


def _workflow(manifest: Manifest, steps: list[Item]) -> Item:
    return {
        "@id": _RECIPE,
        "@type": ["File", "SoftwareSourceCode", "ComputationalWorkflow"],
        "name": manifest.recipe.get("name") or "recipe",
        "identifier": manifest.recipe_digest,
        "version": manifest.recipe_digest[:12],
        "encodingFormat": "application/json",
        "programmingLanguage": {"@id": _LANGUAGE["@id"]},
        "hasPart": [{"@id": step["@id"]} for step in steps],
    }


def _step(spec: dict[str, Any], manifest: Manifest) -> Item:
    use, name = spec["use"], spec.get("name") or spec["use"]
    package = use.partition(":")[0].partition(".")[0] if ":" in use else "nearline"
    version = manifest.versions.get(package)
    return {
        "@id": f"#step/{name}",
        "@type": "SoftwareApplication",
        "name": use,
        "description": json.dumps(spec.get("params") or {}, sort_keys=True),
        **({"softwareVersion": version} if version else {}),
    }


def _action(
    processing: Processing, manifest: Manifest, frames: list[Item], files: list[Item], people: list[Item], name: str
) -> Item:
    ended = (processing.summary or {}).get("finished_at")
    return {
        "@id": f"#processing/{processing.name}",
        "@type": "CreateAction",
        "name": f"Processing {processing.name} of run {name}",
        "description": "every chunk of the run, worked on by the steps of the recipe in turn",
        "instrument": {"@id": _RECIPE},
        "startTime": _time(manifest.started_at),
        **({"endTime": _time(datetime.fromisoformat(ended))} if ended else {}),
        "actionStatus": _COMPLETED if ended else _ACTIVE,
        "object": _links(one["@id"] for one in frames),
        "result": _links([*(one["@id"] for one in files), _PROVENANCE]),
        **({"agent": _links(one["@id"] for one in people)} if people else {}),
        **({"sameAs": manifest.flow_run_url} if manifest.flow_run_url else {}),
    }


def _links(ids: Iterable[str]) -> Item | list[Item]:
    """One alone stands for itself, as RO-Crate 1.1 recommends."""
    links = [{"@id": one} for one in ids]
    return links[0] if len(links) == 1 else links


def _time(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds")


def _frames(folder: RunFolder, graph: Provenance) -> list[Item]:
    """The streams of frames that were analysed, as folders of chunks."""
    sources = {e.attributes["data_source"] for e in graph.entities.values() if e.kind == "frames"}
    return [
        {
            "@id": folder.stream(source).zarr.absolute().as_uri() + "/",
            "@type": "Dataset",
            "name": f"frames of {source} (Zarr v3)",
            "description": "digests of the chunks are in provenance.json",
        }
        for source in sorted(sources)
    ]


def _files(folder: RunFolder, graph: Provenance) -> list[Item]:
    found = []
    for entity in graph.entities.values():
        if entity.kind == "file" and entity.location is not None:
            path = folder.path.absolute() / entity.location
            size = entity.attributes.get("size_bytes")
            found.append(
                {
                    "@id": path.as_uri(),
                    "@type": "File",
                    "name": path.name,
                    "encodingFormat": _FORMATS.get(path.suffix, "application/octet-stream"),
                    **({"contentSize": str(size)} if size is not None else {}),
                    **({"identifier": f"blake3:{entity.digest}"} if entity.digest else {}),
                }
            )
    return found


def _people(graph: Provenance) -> list[Item]:
    people = (agent for agent in graph.agents.values() if agent.kind == "person")
    return [{"@id": f"#{agent.id}", "@type": "Person", "name": agent.attributes["name"]} for agent in people]


def _software(graph: Provenance) -> list[Item]:
    """The processes that computed, with commit, environment, host: one for each."""
    return [
        {
            "@id": f"#{agent.id}",
            "@type": "SoftwareApplication",
            "name": agent.attributes.get("program", "nearline"),
            "softwareVersion": agent.attributes.get("version") or "unknown",
            "description": json.dumps(agent.attributes, sort_keys=True),
        }
        for agent in graph.agents.values()
        if agent.kind == "software"
    ]
