"""The Prefect flow that exports a run to NXmx."""

from pathlib import Path
from typing import Any

from prefect import flow

from flows.exports import export_stream
from flows.giving_way import give_way
from streaming.retrieval import open_run

__all__ = ["export_nexus"]


@flow(name="export-nexus", flow_run_name="export {run}", persist_result=False)
def export_nexus(
    run: str,
    output: str,
    data_source: str | None = None,
    processing: str | None = None,
    frames_per_file: int | None = None,
    overwrite: bool = False,
    service: str | None = None,
    root: str | None = None,
) -> dict[str, Any]:
    """Write a run's frames to an NXmx file, without recompressing them.

    Parameters
    ----------
    run : experiment/number, or the path of a run folder.
    output : path of the file to write.
    data_source : which detector; needed only if the run has several.
    processing : export only the hits of this processing.
    frames_per_file : write a master and data files of so many frames instead of one file.
    """
    give_way()
    opened = open_run(run, service=service, root=root)
    stream = opened[data_source] if data_source else opened.detector
    return export_stream(
        opened,
        stream,
        Path(output),
        processing=processing,
        frames_per_file=frames_per_file,
        overwrite=overwrite,
    )
