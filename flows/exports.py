"""Files written while a run is processed: NXmx and a CrystFEL stream, chunk by chunk."""

import logging
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from flows.run_tally import header_of
from flows.step_history import StepHistory
from storage.crystfel import CrystfelStreamWriter, StreamCrystal, StreamPeaks, StreamReflections, geometry_file
from storage.errors import RunNotFound
from storage.models import RunHeader, StreamHeader
from storage.nexus import DATA_PATH, MASK_PATH, NxmxWriter
from storage.step_store import Processing
from streaming.retrieval import Frame, Run, Stream, open_run
from tasks.process_chunk import ChunkResult
from tasks.recipe import Recipe
from tasks.step_tables import crystal_matrix
from tasks.unit_cell import UnitCell, cell_file_text, crystfel_lattice

__all__ = ["RunExporter", "cell_file_text", "export_stream"]

log = logging.getLogger("nearline.process")

_EMPTY = np.empty(0)


class RunExporter:
    """The files of one processing, open while chunks come in.

    The NXmx file gets its name at `close`; the CrystFEL stream grows where it is, whole frames at
    a time. A second attempt writes both anew from the kept step outputs. Each geometry snapshot has files of its own,
    since both formats have room for one geometry.
    """

    def __init__(
        self,
        run_folder: Path,
        processing: str,
        recipe: Recipe,
        header: StreamHeader,
        run_header: RunHeader,
        pixel_mask: np.ndarray | None,
    ) -> None:
        self._recipe, self._run_header, self._pixel_mask = recipe, run_header, pixel_mask
        self._processing = Processing(run_folder, processing)
        self.geometry = 0
        self.files: dict[str, Path] = {}
        self._open = self._new_files(header, 0)

    def add_chunk(self, frames: Sequence[Frame], result: ChunkResult) -> None:
        """Append one chunk's frames and what was found on them."""
        self._open.add_chunk(frames, result)

    def use_geometry(self, number: int, header: StreamHeader, start: int) -> None:
        """Finish the files of the geometry before, and go on with those of snapshot ``number`` from frame ``start``."""
        self._close_open()
        self.geometry = number
        self._open = self._new_files(header, start)

    def close(self) -> dict[str, Path]:
        """Finish the files and give them their names."""
        self._close_open()
        if self._recipe.export.report:
            self._write_report()
        return self.files

    def discard(self) -> None:
        """Leave no half-written file behind."""
        self._open.discard()

    def _new_files(self, header: StreamHeader, start: int) -> "_GeometryFiles":
        made = _GeometryFiles(
            self._processing, self._recipe, header, self._run_header, self._pixel_mask, self.geometry, start
        )
        self.files |= {self._file_name(kind): path for kind, path in made.files.items()}
        return made

    def _close_open(self) -> None:
        self._open.close()
        for kind in self._open.left_out:
            log.info("no %s file of %s: there is no frame for it", kind, self._processing)
            del self.files[self._file_name(kind)]

    def _file_name(self, kind: str) -> str:
        return f"{kind}_{self.geometry}" if self.geometry else kind

    def _write_report(self) -> None:
        # Here, because what it needs takes more than a second to load, which few recipes ask for.
        from flows.report import write_processing_report

        path = self._processing.folder / "report.html"
        try:
            write_processing_report(open_run(self._processing.run), self._processing, path)
        except Exception:  # a report that cannot be drawn is no reason to lose the processing that it is of
            log.exception("no report of %s", self._processing)
        else:
            self.files["report"] = path


class _GeometryFiles:
    """The NXmx file and the CrystFEL stream of the chunks of one geometry.

    geometry : number of the snapshot. start : first frame of the NXmx file, where it has one row per frame.
    """

    def __init__(
        self,
        processing: Processing,
        recipe: Recipe,
        header: StreamHeader,
        run_header: RunHeader,
        pixel_mask: np.ndarray | None,
        geometry: int,
        start: int,
    ) -> None:
        self._recipe, self._header = recipe, header
        self._history = StepHistory(processing.run)
        stem = f"{header.experiment}_{header.run}_{header.data_source}_{processing.name}"
        stem += f"_geometry{geometry}" if geometry else ""
        self.files: dict[str, Path] = {}
        self.left_out: list[str] = []
        self._n_rows = 0
        self._has_mask = pixel_mask is not None
        self._nexus: NxmxWriter | None = None
        self._stream: CrystfelStreamWriter | None = None
        if recipe.export.nexus != "none":
            path = processing.run / "nexus" / f"{stem}.h5"
            path.parent.mkdir(exist_ok=True)
            self._nexus = NxmxWriter(
                path,
                header,
                pixel_mask=pixel_mask,
                run_header=run_header,
                sample=run_header.sample or (recipe.sample.name if recipe.sample else None),
                start=start,
                keep_holes=recipe.export.nexus == "all",
                overwrite=True,
            )
            self.files["nexus"] = path
        if recipe.export.crystfel:
            self._open_stream(processing.folder, stem)

    def add_chunk(self, frames: Sequence[Frame], result: ChunkResult) -> None:
        """Append one chunk's frames and what was found on them."""
        hits = _hits(result)
        if self._nexus is not None:
            self._history.add(result.manifest)
        rows: dict[int, int] = {}
        for frame in frames:
            is_wanted = self._recipe.export.nexus == "all" or hits.get(frame.frame_index, False)
            if self._nexus is not None and is_wanted:
                rows[frame.frame_index] = self._nexus.append_parts(frame.frame_index, _blobs_of(frame), frame.times.utc)
        self._n_rows += len(rows)
        if self._stream is not None:
            self._write_stream(frames, result, hits, rows)

    def close(self) -> None:
        """Finish the files and give them their names; an NXmx file of no frames is left out."""
        if self._nexus is not None and not self._n_rows:
            self._nexus.discard()
            self.left_out.append("nexus")
        elif self._nexus is not None:
            self._history.write(self._nexus, self._recipe.model_dump(mode="json"), self._recipe.digest)
            self._nexus.close()
        if self._stream is not None:
            self._stream.close()

    def discard(self) -> None:
        """Leave no half-written file behind."""
        if self._nexus is not None:
            self._nexus.discard()
        if self._stream is not None:
            self._stream.close()

    def _open_stream(self, folder: Path, stem: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        nexus = self.files.get("nexus")
        has_mask = nexus is not None and self._has_mask
        geometry = geometry_file(
            self._header,
            data_path=DATA_PATH,
            mask_path=MASK_PATH if has_mask else None,
            bad=self._recipe.geometry.bad if self._recipe.geometry else (),
        )
        cell = self._recipe.sample.unit_cell if self._recipe.sample else None
        self.files["geometry"] = folder / f"{stem}.geom"
        self.files["geometry"].write_text(geometry)
        if cell is not None:
            self.files["cell"] = folder / f"{stem}.cell"
            self.files["cell"].write_text(cell_file_text(cell))
        self.files["crystfel_stream"] = folder / f"{stem}.stream"
        self._stream = CrystfelStreamWriter(
            self.files["crystfel_stream"],
            self._header,
            geometry_text=geometry,
            cell_text=cell_file_text(cell) if cell else None,
            audit_lines=[f"Generated by nearline {version('nearline')}", f"recipe {self._recipe.name}"],
            image_filename=str(nexus) if nexus else f"{self._header.experiment}/{self._header.run}",
            overwrite=True,
        )

    def _write_stream(
        self, frames: Sequence[Frame], result: ChunkResult, hits: dict[int, bool], rows: dict[int, int]
    ) -> None:
        """rows : of the frames in the NXmx file."""
        assert self._stream is not None
        peaks, crystals = _by_frame(result.table("peaks")), _by_frame(result.table("crystals"))
        quality, reflections = _by_frame(result.table("crystal_quality")), _by_frame(result.table("reflections"))
        cell = self._recipe.sample.unit_cell if self._recipe.sample else None
        for frame in frames:
            index = frame.frame_index
            found = crystals.get(index)
            self._stream.write_frame(
                index,
                hit=hits.get(index, False),
                peaks=_stream_peaks(peaks.get(index)),
                crystals=[
                    _stream_crystal(row, quality.get(index), reflections.get(index), cell)
                    for row in (found.to_pylist() if found is not None else [])
                ],
                row=rows.get(index, index),
            )


def export_stream(
    run: Run,
    stream: Stream,
    path: Path,
    *,
    processing: str | None = None,
    frames_per_file: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Write a finished or live run's frames so far to an NXmx file, their bytes as the detector sent them.

    Parameters
    ----------
    path : of the file; with ``frames_per_file`` of its master.
    processing : export only the hits of this processing, with the detector as its recipe has it, or its newest
        geometry snapshot; all frames without it, with the detector as it described itself.
    progress : called with (frames done, frames in all).

    Returns
    -------
    ``path`` and ``frames``, the number of frames written.

    Raises
    ------
    NotStored : the stream is in memory only.
    """
    stream.require_stored("exported")
    chosen = _chosen(run, processing) if processing else None
    wanted = _hits_of(chosen) if chosen else None
    status = stream.status
    path.parent.mkdir(parents=True, exist_ok=True)
    with NxmxWriter(
        path,
        header_of(chosen) if chosen else stream.header,
        pixel_mask=stream.pixel_mask,
        run_header=run.header,
        sample=run.header.sample,
        stop=status.watermark if wanted is None else None,
        keep_holes=wanted is None,
        frames_per_file=frames_per_file,
        overwrite=overwrite,
    ) as writer:
        n_written = 0
        for frame in stream[: status.watermark]:
            if wanted is None or frame.frame_index in wanted:
                writer.append_parts(frame.frame_index, _blobs_of(frame), frame.times.utc)
                n_written += 1
            progress(frame.frame_index + 1, status.watermark)
        if chosen is not None:
            _write_history(writer, chosen)
    return {"path": str(path), "frames": n_written}


def _chosen(run: Run, processing: str) -> Processing:
    found = run.processings
    if processing not in found:
        have = ", ".join(found) or "none yet"
        raise RunNotFound(f"run {run.name} has no processing {processing!r}; it has: {have}")
    return found[processing]


def _hits_of(processing: Processing) -> set[int]:
    table = processing.frames
    return set(table.filter(table["hit"])["frame_index"].to_pylist())


def _write_history(writer: NxmxWriter, processing: Processing) -> None:
    """The steps that chose the frames."""
    history, manifest = StepHistory(processing.run), processing.manifest
    for chunk in processing.chunks():
        history.add(chunk)
    history.write(writer, manifest.recipe, manifest.recipe_digest)


def _blobs_of(frame: Frame) -> dict[int, Any]:
    """The compressed bytes of each part that came, by its number."""
    return {raw.info.part: raw.blob for raw in frame.raw_parts}


def _hits(result: ChunkResult) -> dict[int, bool]:
    frames = result.frames
    if "hit" not in frames.column_names:
        return {}
    return dict(zip(frames["frame_index"].to_pylist(), frames["hit"].to_pylist(), strict=True))


def _by_frame(table: pa.Table | None) -> dict[int, pa.Table]:
    """A table cut into one piece per frame; it is sorted by frame_index."""
    if table is None or not len(table):
        return {}
    index = table["frame_index"].to_numpy()
    values, starts = np.unique(index, return_index=True)
    stops = [*starts[1:], len(index)]
    return {int(v): table.slice(int(a), int(b - a)) for v, a, b in zip(values, starts, stops, strict=True)}


def _stream_peaks(peaks: pa.Table | None) -> StreamPeaks:
    if peaks is None:
        return StreamPeaks.none()
    return StreamPeaks(*(peaks[name].to_numpy() for name in ("x", "y", "intensity")))


def _stream_crystal(
    row: dict[str, Any], quality: pa.Table | None, reflections: pa.Table | None, cell: UnitCell | None
) -> StreamCrystal:
    lattice, unique = crystfel_lattice(cell) if cell else ("triclinic", "*")
    mine = [q for q in quality.to_pylist() if q["crystal"] == row["crystal"]] if quality is not None else []
    measured = mine[0] if mine else {}
    resolution = measured.get("resolution")
    return StreamCrystal(
        A=crystal_matrix(row).T,  # CrystFEL's rows are our columns
        lattice_type=lattice,
        centering=cell.centring if cell else "P",
        unique_axis=unique,
        profile_radius=10 * measured.get("profile_radius", 2e-4),  # 1/Å to 1/nm
        resolution_limit=10 / resolution if resolution and np.isfinite(resolution) else None,
        reflections=_stream_reflections(reflections, row["crystal"]),
        n_saturated=measured.get("n_saturated", 0),
        n_implausible=measured.get("n_implausible", 0),
    )


def _stream_reflections(reflections: pa.Table | None, crystal: int) -> StreamReflections | None:
    if reflections is None:
        return None
    mine = reflections.filter(pa.array(reflections["crystal"].to_numpy() == crystal))
    names = ("h", "k", "l", "intensity", "sigma", "peak", "background", "x", "y")
    return StreamReflections(*(mine[name].to_numpy() for name in names))
