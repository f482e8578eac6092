"""Where a report comes from: the account of frames, the detector, and what the processing was made with."""

from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import yaml

from flows.report.gathering import Gathered, RunPart
from flows.report.layout import Section, Table
from storage.geometry import wavelength_from_energy
from storage.states import StreamLedger

__all__ = ["ledger_section", "origin_section"]

_MOST_RANGES = 5


def ledger_section(found: Gathered) -> Section:
    head = ("run", "planned", "announced", "received", "stored", "missing", "late", "rejected", "vetoed", "balance")
    rows = [_ledger_row(part.run.name, part.ledger) for part in found.parts]
    words = [
        f"{part.run.name}: {sentence}" if len(found.parts) > 1 else sentence
        for part in found.parts
        for sentence in _causes(part.ledger)
    ]
    return Section("ledger", "Ledger", words or ["Every frame came."], [Table(rows, head)])


def _ledger_row(run: str, one: StreamLedger) -> tuple[str, ...]:
    numbers = (one.announced, one.received, one.stored, one.missing, one.late, one.rejected, one.vetoed)
    planned = f"{one.planned:,}" if one.planned else "unknown"
    return (run, planned, *(f"{n:,}" for n in numbers), "holds" if one.is_balanced else "DOES NOT HOLD")


def _causes(ledger: StreamLedger) -> Iterator[str]:
    """How many frames are in which state for which cause, and where the first of them are."""
    grouped: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for one in ledger.ranges:
        grouped.setdefault((one.state, one.cause or ""), []).append((one.start, one.stop))
    for (state, cause), ranges in grouped.items():
        n = sum(stop - start for start, stop in ranges)
        where = ", ".join(f"{a}" if b == a + 1 else f"{a} to {b - 1}" for a, b in ranges[:_MOST_RANGES])
        more = f" and {len(ranges) - _MOST_RANGES} more stretches" if len(ranges) > _MOST_RANGES else ""
        yield f"{n:,} frames {state}{f' ({cause})' if cause else ''}: {where}{more}."


def origin_section(found: Gathered) -> Section:
    part = found.parts[0]
    rows = [*_detector_rows(part), *_origin_rows(part)]
    folded = {"Recipe": yaml.safe_dump(_recipe(part), sort_keys=False, allow_unicode=True)}
    words = ["Recipe and detector of the first run; the others' stand in their own reports."] * (len(found.parts) > 1)
    return Section("how", "Detector and processing", words, [Table(rows)], folded=folded)


def _recipe(part: RunPart) -> dict[str, Any]:
    """As one would write it: without what was not said."""
    content = {k: v for k, v in part.manifest.recipe.items() if v not in (None, {}, [], "")}
    if isinstance(content.get("steps"), list):
        content["steps"] = [{k: v for k, v in step.items() if v not in (None, {}, [], "")} for step in content["steps"]]
    return content


def _detector_rows(part: RunPart) -> Iterator[tuple[str, str]]:
    d, shape = part.detector, part.header.image_shape
    yield (
        "data source",
        f"{part.header.data_source}, frames of {' × '.join(map(str, shape)) or '1'} {part.header.dtype}",
    )
    if d.description or d.serial_number:
        yield "detector", ", ".join(text for text in (d.description, d.serial_number) if text)
    if d.count_time or d.frame_time:
        yield "exposure", f"{1e3 * d.count_time:.4g} ms of every {1e3 * d.frame_time:.4g} ms"
    wavelength = d.incident_wavelength or (wavelength_from_energy(d.incident_energy) if d.incident_energy else 0.0)
    if wavelength:
        yield "wavelength", f"{wavelength:.5f} Å"
    if part.geometry is not None:
        yield "distance", f"{1e3 * d.detector_distance:g} mm"
        yield "beam centre", f"({d.beam_center_x:.2f}, {d.beam_center_y:.2f}) px"
        pixel = f"{1e6 * d.pixel_size_x:g} × {1e6 * d.pixel_size_y:g} µm"
        thickness = f"{1e3 * d.sensor_thickness:g} mm " if d.sensor_thickness else ""
        yield "sensor", f"{thickness}{d.sensor_material}, pixels of {pixel}"
    for snapshot in part.processing.geometries():
        yield "refined", snapshot.words


def _origin_rows(part: RunPart) -> Iterator[tuple[str, str]]:
    m, done = part.manifest, part.processing.summary or {}
    yield "processing", f"{m.processing}, begun {m.started_at:%Y-%m-%d %H:%M:%S} UTC{f' on {m.host}' if m.host else ''}"
    if "finished_at" in done:
        yield "finished", f"after {done.get('seconds', 0):,.1f} s"
    yield "chunks", f"{len(part.figures)} of {part.n_sealed} sealed ones"
    yield "recipe", f"{m.recipe.get('name', 'recipe')}, digest {m.recipe_digest}"
    yield "code", f"digest {m.code_digest}"
    yield "step outputs", f"digest {part.tally.inputs['digest']}"
    yield "versions", ", ".join(f"{name} {number}" for name, number in m.versions.items())
    yield "report", f"nearline {version('nearline')}"
    yield "folder", str(part.processing.folder)
