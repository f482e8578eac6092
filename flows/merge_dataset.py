"""The Prefect flow that merges the runs of a sample: `flows.merging`, with a page of statistics by shell."""

from pathlib import Path
from typing import Annotated, Any, Literal

from prefect import flow, runtime

from flows.giving_way import give_way
from flows.markdown_page import MarkdownPage
from flows.merged_files import shell_table
from flows.merging import MergeRequest, lines_about, merge_runs
from flows.parameters import OptionalProcessing, Root, ServiceAddress, described
from flows.reprocess_runs import Runs, Where

__all__ = ["merge_dataset"]

Output = Annotated[
    str | None, described("Folder", "Where the files are written; by default merged/ in the data folder")
]
Resolution = Annotated[
    float | None,
    described("d_min, Å", "Resolution to merge to; by default where the recipe or the detector ends", gt=0),
]
Scale = Annotated[bool, described("Scale", "Scale and B of each crystal; without, a plain mean")]
Partiality = Annotated[bool, described("Partiality", "Model partialities too, where that makes crystals more alike")]
Resolve = Annotated[bool, described("Resolve", "Tell indexings apart where the lattice has several")]
Polarisation = Annotated[
    float | None,
    described("Polarisation", "Horizontal fraction of the beam, for the correction; empty for none", ge=0, le=1),
]
Mates = Annotated[Literal["merged", "apart"], described("Friedel mates", "Merged, or apart for anomalous differences")]
Name = Annotated[str, described("File name", "What the files and the page are called by")]
Split = Annotated[
    str | None,
    described("Split by", "A column of the frames, such as laser, or a condition: a set of files for each value"),
]


def _flow_run_name() -> str:
    given = runtime.flow_run.parameters
    return f"merge {', '.join(given.get('runs') or [])} {given.get('where') or ''}".strip()[:200]


@flow(name="merge-dataset", flow_run_name=_flow_run_name, persist_result=False, validate_parameters=True)
def merge_dataset(
    runs: Runs,
    where: Where = None,
    processing: OptionalProcessing = None,
    d_min: Resolution = None,
    friedel_mates: Mates = "merged",
    scale: Scale = True,
    partiality: Partiality = True,
    resolve: Resolve = True,
    polarisation: Polarisation = 0.99,
    split: Split = None,
    output: Output = None,
    name: Name = "merged",
    service: ServiceAddress = None,
    root: Root = None,
) -> dict[str, Any]:
    """Merge the reflections of some runs into one set: MTZ, CrystFEL .hkl, statistics by shell and a picture.

    Crystals are indexed alike where the lattice leaves a choice, scaled together, and merged by asymmetric unit. The
    summary has the statistics and the files.
    """
    give_way()
    request = MergeRequest(
        runs=tuple(runs), where=where, processing=processing, d_min=d_min, friedel_mates=friedel_mates, scale=scale,
        partiality=partiality, resolve=resolve, polarisation=polarisation, split=split, name=name, service=service,
        root=root,
    )  # fmt: skip
    folder = Path(output) if output else Path(root or "nearline-data") / "merged"
    result = merge_runs(request, folder)
    statistics = result.statistics
    lines = [
        f"# Merged: {statistics.n_crystals} crystals of {len(result.inputs)} runs",
        f"{statistics.space_group}, d_min {statistics.d_min:.2f} Å, Friedel mates {statistics.friedel_mates}",
        shell_table(statistics),
        *(
            f"## {split}: {value}, {one.n_crystals} crystals\n\n{shell_table(one)}"
            for value, one in result.sets.items()
        ),
        "\n".join(f"* {line}" for line in lines_about(result)),
        "\n".join(f"* {run}: {name}" for run, name in result.inputs.items()),
        "\n".join(f"* left out {run}: {why}" for run, why in result.left_out.items()),
        "\n".join(f"* {kind}: `{path}`" for kind, path in result.files.items()),
    ]
    MarkdownPage(f"merge-{name}", f"merged from {len(result.inputs)} runs").show("\n\n".join(filter(None, lines)))
    return result.model_dump(mode="json")
