"""The Prefect flow that exports a run to NXmx."""

from pathlib import Path
from typing import Annotated, Any

from prefect import flow

from flows.exports import export_stream
from flows.giving_way import give_way
from flows.parameters import DataSource, Root, RunName, ServiceAddress, described
from streaming.retrieval import open_run

__all__ = ["export_nexus"]

Output = Annotated[str, described("File", "Path of the NXmx file to write", examples=["/data/out/lyso_17.h5"])]
HitsOf = Annotated[
    str | None, described("Hits of", "Only the hits of this processing, such as p1; empty for all frames")
]
PerFile = Annotated[
    int | None, described("Frames per file", "A master and data files of so many frames; by default one file", ge=1)
]
Overwrite = Annotated[bool, described("Overwrite", "Replace a file that is there")]


@flow(name="export-nexus", flow_run_name="export {run}", persist_result=False, validate_parameters=True)
def export_nexus(
    run: RunName,
    output: Output,
    data_source: DataSource = None,
    processing: HitsOf = None,
    frames_per_file: PerFile = None,
    overwrite: Overwrite = False,
    service: ServiceAddress = None,
    root: Root = None,
) -> dict[str, Any]:
    """Write a run's frames to an NXmx file, without recompressing them."""
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
