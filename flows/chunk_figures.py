"""What is remembered of a processed chunk, from its tables: for the page of a run, and for its report."""

from typing import Any

import numpy as np
import pyarrow as pa

from flows.run_warnings import N_RINGS, RING_WIDTH, ChunkFigures
from storage.geometry import Geometry
from storage.models import DetectorHeader
from storage.step_store import ChunkManifest, StepStore
from tasks.step_tables import scattering_vectors

__all__ = ["beam_shifts", "figures_of_chunk", "newest_table"]


def newest_table(store: StepStore, chunk: ChunkManifest, name: str) -> pa.Table | None:
    """The table of that name of the last step that makes one; None if none does."""
    found = (store.read(digest, name) for digest in reversed(chunk.steps.values()))
    return next((table for table in found if table is not None), None)


def figures_of_chunk(
    chunk: ChunkManifest,
    detector: DetectorHeader,
    *,
    crystals: pa.Table | None,
    quality: pa.Table | None,
    peaks: pa.Table | None,
    lag_frames: int = 0,
) -> ChunkFigures:
    """The figures that warnings rest on; a table that no step makes adds nothing.

    detector : as the processing took it.
    """
    return ChunkFigures(
        chunk.start, chunk.stop, chunk.n_frames, chunk.n_hits, chunk.n_indexed, lag_frames,
        n_reflections=_total(quality, "n_reflections"), n_saturated=_total(quality, "n_saturated"),
        **(_of_peaks(peaks, detector) if peaks is not None else {}),
        shifts=beam_shifts(crystals, detector) if crystals is not None else np.empty((0, 2)),
        geometry=chunk.geometry,
        seeks_lattices=crystals is not None,
    )  # fmt: skip


def beam_shifts(crystals: pa.Table, detector: DetectorHeader) -> np.ndarray:
    """(n, 2) px: where each crystal puts the beam centre against the assumed one."""
    shift = np.column_stack([crystals["shift_x"].to_numpy(), crystals["shift_y"].to_numpy()])
    moved: np.ndarray = shift * detector.detector_distance / [detector.pixel_size_x, detector.pixel_size_y]
    return moved


def _total(table: pa.Table | None, name: str) -> int:
    return int(table[name].to_numpy().sum()) if table is not None else 0


def _of_peaks(peaks: pa.Table, detector: DetectorHeader) -> dict[str, Any]:
    """Rings only where the geometry is known."""
    found: dict[str, Any] = {"n_peaks": len(peaks)}
    if len(peaks):
        found["background"] = float(np.median(peaks["background"].to_numpy()))
    if len(peaks) and detector.detector_distance and (detector.incident_wavelength or detector.incident_energy):
        # Of the frames only that the panels are on them matters here.
        shape = max([1, *(p.end[0] for p in detector.panels)]), max([1, *(p.end[1] for p in detector.panels)])
        q = np.linalg.norm(scattering_vectors(Geometry.from_header(detector, shape), peaks), axis=1)
        rings = np.bincount((q / RING_WIDTH).astype(int), minlength=N_RINGS)[:N_RINGS]
        found["rings"] = rings.astype(np.uint32)
    return found
