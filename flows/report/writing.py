"""Which runs a report is of, and its page."""

import base64
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from pydantic import Field

from flows.report.examples import example_pictures, mask_of
from flows.report.gathering import Gathered, gather
from flows.report.layout import Section
from flows.report.numbers import ReportFigures, figures_of
from flows.report.sections import sections_of
from flows.run_choice import choose_runs
from flows.run_tally import chosen_processing
from storage.errors import BadName, RunNotFound
from storage.files import replace
from storage.models import Model, Record
from storage.step_store import Processing
from streaming.retrieval import Run, open_run

__all__ = ["ReportRequest", "ReportResult", "write_processing_report", "write_report"]

Progress = Callable[[str, int, int], None]

_PAGE = Path(__file__).with_name("page.html")


class ReportRequest(Model):
    """Which runs a report is of."""

    runs: tuple[str, ...] = Field((), description="runs, ranges (lyso-2026/3-9), whole experiments, or run folders")
    sample: str | None = Field(None, description="only runs of this sample; of all experiments where no run is named")
    processing: str | None = Field(None, description="whose results; by default each run's promoted or newest")
    service: str | None = None
    root: str | None = None


class ReportResult(Record):
    """A report as it was written."""

    path: str
    pictures: tuple[str, ...] = Field((), description="PNG files, where they were asked for")
    left_out: dict[str, str] = Field(default_factory=dict, description="runs that are not in it, with the reason")
    figures: ReportFigures


def write_report(
    request: ReportRequest,
    path: Path | None = None,
    pictures: Path | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> ReportResult:
    """Write the report of one run, live or finished, or of several of a sample, as one HTML file.

    Parameters
    ----------
    path : of the file; by default ``report-<run>-<processing>.html`` here.
    pictures : folder for the pictures as PNG files, too.

    Raises
    ------
    RunNotFound : no run was chosen, none is processed, or its folder is not visible here.
    BadRecipe : the runs were indexed with different cells.
    """
    pairs, left_out = _choose(request)
    path = path or Path(_file_name(request, pairs))
    result = _write(pairs, path, pictures, progress)
    return result.model_copy(update={"left_out": left_out})


def write_processing_report(run: Run, processing: Processing, path: Path) -> None:
    """Write the report of one processing as it is now."""
    _write([(run, processing)], path, None, lambda stage, done, total: None)


# ---- runs -------------------------------------------------------------------------------------------------


def _choose(request: ReportRequest) -> tuple[list[tuple[Run, Processing]], dict[str, str]]:
    where = f"sample = '{request.sample.replace(chr(39), 2 * chr(39))}'" if request.sample is not None else None
    if not request.runs and where is None:
        raise BadName("name a run, such as lyso-2026/17, or a sample")
    # A folder as one types it, data/lyso/3, is also a name of three parts.
    texts = [str(Path(text).absolute()) if Path(text, "run.json").is_file() else text for text in request.runs]
    chosen = choose_runs(texts, where, service=request.service, root=request.root)
    pairs, left_out = [], dict(chosen.left_out)
    for name in chosen.names:
        run = open_run(name, service=request.service, root=request.root)
        if run.visible_folder is None:
            left_out[run.name] = f"its folder {run.folder} is not visible here; ask on its machine"
            continue
        processing = chosen_processing(run.visible_folder.path, request.processing)
        if processing is None:
            left_out[run.name] = "it is not processed; nearline process does that"
        else:
            pairs.append((run, processing))
    if not pairs:
        raise RunNotFound("nothing to report: " + "; ".join(f"{run}: {why}" for run, why in left_out.items()))
    return pairs, left_out


def _file_name(request: ReportRequest, pairs: Sequence[tuple[Run, Processing]]) -> str:
    run, processing = pairs[0]
    if len(pairs) == 1:
        return f"report-{run.name.replace('/', '-')}-{processing.name}.html"
    return f"report-{run.header.experiment}-{len(pairs)}-runs.html"


# ---- the page ---------------------------------------------------------------------------------------------------


def _write(
    pairs: Sequence[tuple[Run, Processing]], path: Path, folder: Path | None, progress: Progress
) -> ReportResult:
    found = gather(pairs, progress)
    mask = mask_of(found.parts[0])
    examples = example_pictures(found, mask)
    figures = figures_of(found)
    sections = sections_of(found, figures, mask=mask, examples=examples)
    every = [picture for section in sections for picture in section.pictures]
    files = []
    for n_done, picture in enumerate(every, 1):
        # Drawn here, and kept for the page.
        content = picture.png
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            files.append(folder / f"{picture.name}.png")
            replace(files[-1], content)
        progress("pictures drawn", n_done, len(every))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, _page(found, figures, sections).encode())
    return ReportResult(path=str(path), pictures=tuple(map(str, files)), figures=figures)


def _page(found: Gathered, figures: ReportFigures, sections: Sequence[Section]) -> str:
    # Names of runs, samples and columns are whatever a user has written: none of them is markup.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode()
    return environment.from_string(_PAGE.read_text(encoding="utf-8")).render(
        title=_title(found, figures),
        subtitle=_subtitle(found, figures),
        tiles=_tiles(figures),
        warnings=figures.warnings,
        quiet="Nothing is out of the ordinary." if figures.n_frames else "Nothing is processed yet.",
        sections=sections,
        notes=figures.notes,
        footer=f"Written by Nearline at {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC from the tables of its processings; "
        "nothing was computed again but the merge.",
    )


def _title(found: Gathered, figures: ReportFigures) -> str:
    if len(found.parts) == 1:
        part = found.parts[0]
        return f"{part.run.name} · {part.processing.name} · {figures.recipe}"
    return f"{len(found.parts)} runs of {figures.sample or found.parts[0].run.header.experiment} · {figures.recipe}"


def _subtitle(found: Gathered, figures: ReportFigures) -> str:
    first = found.parts[0].run.header
    parts = [f"sample {figures.sample}"] if figures.sample else []
    parts.append(f"begun {first.started_at:%Y-%m-%d %H:%M} UTC")
    if first.comment:
        parts.append(first.comment)
    parts.append(_state(found))
    return " · ".join(parts)


def _state(found: Gathered) -> str:
    if found.is_whole:
        return "all of it is processed"
    n_open = sum(not part.is_whole for part in found.parts)
    return "still growing: as far as it is processed now" if len(found.parts) == 1 else f"{n_open} runs still growing"


def _tiles(f: ReportFigures) -> list[tuple[str, str, str]]:
    """The numbers that everybody asks for first: name, value, what it is of."""
    tiles = [("frames", f"{f.n_frames:,}", "processed")]
    if f.hit_rate is not None:
        tiles.append(("hit rate", f"{100 * f.hit_rate:.1f} %", f"{f.n_hits:,} hits of {f.n_frames:,} frames"))
    if f.indexing_rate is not None:
        tiles.append(
            ("indexing rate", f"{100 * f.indexing_rate:.1f} %", f"{f.n_indexed:,} indexed of {f.n_hits:,} hits")
        )
    if f.n_crystals is not None:
        tiles.append(("crystals", f"{f.n_crystals:,}", "lattices on all frames"))
    if f.resolution is not None:
        tiles.append(("resolution", f"{f.resolution:.2f} Å", "median of crystals"))
    if f.merging is not None:
        tiles.append(("completeness", f"{100 * f.merging.completeness:.1f} %", f"to {f.merging.d_min:.2f} Å"))
        if f.merging.cc_half is not None:
            how = "crystals scaled together" if f.scaling is not None else "not scaled"
            tiles.append(("CC½", f"{f.merging.cc_half:.3f}", f"overall, {how}"))
    return tiles
