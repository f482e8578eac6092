"""What the command line reads and shows: arguments into settings, results into tables."""

import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

import nearline
from nearline.prefect_server import is_healthy
from storage.errors import ProcessingBusy, ServiceUnavailable
from storage.names import parse_run_key

M = TypeVar("M", bound=BaseModel)


# ---- arguments ----------------------------------------------------------------------------------


def read_source(text: str) -> Any:
    """``eiger=tcp://host:port`` as settings."""
    from streaming.service import SourceSettings

    name, equals, endpoint = text.partition("=")
    if not equals or not endpoint.startswith("tcp://"):
        raise typer.BadParameter(f"{text!r} is not NAME=tcp://HOST:PORT, such as eiger=tcp://127.0.0.1:31001")
    return SourceSettings(name=name, endpoint=endpoint)


def read_sources(texts: list[str], online: list[str]) -> tuple[Any, ...]:
    """All sources; those named in ``online`` are kept in memory only."""
    sources = [read_source(text) for text in texts]
    names = [source.name for source in sources]
    for name in online:
        if name not in names:
            raise typer.BadParameter(f"--online {name}: the sources are {', '.join(names)}; name one with --source")
    return tuple(s.model_copy(update={"persistence": "online"}) if s.name in online else s for s in sources)


def validated(model: type[M], **values: Any) -> M:
    """A settings model from options; what it refuses becomes a usage error."""
    try:
        return model(**values)
    except ValidationError as error:
        raise typer.BadParameter("; ".join(f"{e['loc'][-1]}: {e['msg']}" for e in error.errors())) from None


def header_overrides(distance: float | None, wavelength: float | None, beam_center: str | None) -> dict[str, float]:
    """Header fields to replace, by their names in `storage.models.DetectorHeader`."""
    values = {"detector_distance": distance, "incident_wavelength": wavelength}
    overrides = {name: value for name, value in values.items() if value is not None}
    if beam_center:
        parts = re.split(r"[,\s]+", beam_center.strip())
        try:
            overrides["beam_center_x"], overrides["beam_center_y"] = (float(part) for part in parts)
        except ValueError:
            raise typer.BadParameter(f"{beam_center!r} is not X,Y in px, such as 1034.5,1081.2") from None
    return overrides


def recipe_from(recipe: Path | None, cell: str | None, space_group: str | None) -> Any:
    """The recipe named, or the preset with this cell."""
    from tasks.recipe import crystallography, load_recipe

    if recipe is not None:
        if cell:
            raise typer.BadParameter("give --recipe or --cell, not both; a recipe holds its cell under sample:")
        return load_recipe(recipe)
    return crystallography(read_unit_cell(cell, space_group))


def read_unit_cell(cell: str | None, space_group: str | None) -> Any:
    """The cell named, or None; six numbers say nothing of the symmetry, so they need a space group."""
    from tasks.unit_cell import read_cell

    if cell is None:
        if space_group:
            raise typer.BadParameter("--space-group needs a --cell")
        return None
    found = read_cell(cell, space_group)
    if space_group is None and not Path(cell).is_file():
        raise typer.BadParameter("a cell in numbers needs --space-group, e.g. 'P 43 21 2' ('P 1' for triclinic)")
    return found


# ---- runs ---------------------------------------------------------------------------------------


def open_run(run: str, service: str | None, root: Path | None) -> Any:
    """`nearline.open` for the command line."""
    return nearline.open(run, service=service, root=None if service else root)


def wait_for_run(run: str, service: str | None, root: Path | None, wait: float) -> None:
    """Return once the run exists; RunNotFound after ``wait`` s."""
    nearline.open(run, service=service, root=None if service else root, wait=wait)


def list_runs(experiment: str | None, service: str | None, root: Path | None) -> list[dict[str, Any]]:
    """Rows of the catalog, through the service or from the data folder."""
    from streaming import wire
    from streaming.client import Client, is_reachable
    from streaming.wire import DEFAULT_ADDRESS

    address = service or DEFAULT_ADDRESS
    if service or (root is None and is_reachable(address)):
        rows: list[dict[str, Any]] = Client(address).connection.ask_json(wire.ListRuns(id=0, experiment=experiment))
        return rows
    from storage.run_folder import find_runs
    from storage.stream_source import state_of

    folder = root or Path("nearline-data")
    found = [f for f in find_runs(folder) if experiment in (None, f.header.experiment)]
    return [
        f.header.model_dump(mode="json") | {"state": state_of(f).value, "folder": str(f.path.absolute())} for f in found
    ]


def run_list(console: Console, rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("run", "started", "state", "sample")
    for row in rows:
        name = f"{row['experiment']}/{row['run']}"
        table.add_row(name, row["started_at"][:19], row["state"], row.get("sample") or "")
    console.print(table if rows else "no runs here; `nearline serve` takes them, --root names another data folder")


def run_info(console: Console, run: Any, as_json: bool) -> None:
    from storage.promotion import default_processing, read_promotion

    found = run.processings
    processings = {name: p.summary or {} for name, p in found.items()}
    default, promotion = default_processing(run.folder), read_promotion(run.folder)
    if as_json:
        content = {
            "run": run.header.model_dump(mode="json"),
            "state": run.state.value,
            "folder": str(run.folder),
            "streams": {name: run[name].header.model_dump(mode="json") for name in run.data_sources},
            "processings": processings,
            "default_processing": default.name if default else None,
            "promotion": promotion.model_dump(mode="json") if promotion else None,
        }
        print(json.dumps(content))
        return
    console.print(f"[bold]{run.name}[/bold]  {run.state.value}  {run.folder}", highlight=False, soft_wrap=True)
    table = Table("data source", "frames", "planned", "shape", "dtype", "from")
    for name in run.data_sources:
        header = run[name].header
        shape = " × ".join(str(n) for n in header.shape) or "table"
        table.add_row(name, str(len(run[name])), str(header.planned or ""), shape, header.dtype, header.parent or "")
    console.print(table)
    if processings:
        table = Table("processing", "frames", "hits", "indexed", "recipe")
        for name, summary in processings.items():
            values = [str(summary.get(key, "…")) for key in ("frames", "hits", "indexed", "recipe")]
            table.add_row(f"{name} (default)" if default is not None and name == default.name else name, *values)
        console.print(table)
    if promotion is not None:
        by, why = promotion.by and f" by {promotion.by}", promotion.why and f": {promotion.why}"
        console.print(f"{promotion.processing} was promoted on {promotion.at:%Y-%m-%d %H:%M}{by}{why}", highlight=False)


def ledgers(console: Console, run: Any, as_json: bool) -> bool:
    """Show every primary stream's ledger; whether all balance."""
    found = run.ledger()
    is_balanced = all(ledger.is_balanced for ledger in found.values())
    if as_json:
        content = {name: x.model_dump(mode="json") | {"problems": x.problems} for name, x in found.items()}
        print(json.dumps({"run": run.name, "state": run.state.value, "is_balanced": is_balanced, "ledger": content}))
        return is_balanced
    fields = (
        "planned",
        "announced",
        "received",
        "buffered",
        "stored",
        "incomplete",
        "missing",
        "rejected",
        "late",
        "duplicate",
        "vetoed",
        "pruned",
        "left_out",
    )
    table = Table("frames", *found)
    for field in (*fields, "pending"):
        table.add_row(field, *(str(getattr(ledger, field)) for ledger in found.values()))
    console.print(table)
    for name, ledger in found.items():
        if ledger.is_terminal and ledger.planned > ledger.announced:
            console.print(
                f"{name}: {ledger.planned - ledger.announced} of the {ledger.planned} planned frames were never "
                "announced: not taken, or lost at the end",
                highlight=False,
            )
        for part in ledger.ranges:
            frames = f"frame {part.start}" if part.stop == part.start + 1 else f"frames {part.start}–{part.stop - 1}"
            console.print(f"{name}: {frames} {part.state}{f': {part.cause}' if part.cause else ''}", highlight=False)
        for problem in ledger.problems:
            console.print(f"[red]does not balance:[/red] {problem}", highlight=False)
    if is_balanced:
        console.print(f"[green]the ledger balances[/green]; run {run.name} is {run.state.value}")
    return is_balanced


def read_status(service: str | None) -> dict[str, Any]:
    """A service's own account of its condition."""
    from streaming import wire
    from streaming.client import Connection, is_reachable
    from streaming.wire import DEFAULT_ADDRESS

    address = service or DEFAULT_ADDRESS
    if not is_reachable(address):
        raise ServiceUnavailable(f"nothing listens at {address}; start a service with `nearline serve`")
    connection = Connection(address)
    try:
        content: dict[str, Any] = connection.ask_json(wire.GetStatus(id=0))
    finally:
        connection.close()
    return content


# ---- long work ----------------------------------------------------------------------------------


class StageBars:
    """A progress bar for each stage of a long piece of work."""

    def __init__(self, console: Console) -> None:
        columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
        self._progress = Progress(*columns, TimeElapsedColumn(), console=console)
        self._bars: dict[str, Any] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def update(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage is; a stage without a total is a message."""
        if total <= 0:
            self._progress.console.print(stage, highlight=False)
            return
        if stage not in self._bars:
            self._bars[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._bars[stage], completed=done, total=total)


def series_sent(console: Console, sent: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps({name: getattr(sent, name) for name in _SENT_FIELDS}, default=str))
        return
    rate = sent.n_frames / sent.seconds if sent.seconds else 0.0
    console.print(
        f"sent {sent.n_frames} frames, {sent.n_bytes / 1e6:.1f} MB, in {sent.seconds:.1f} s ({rate:.1f} frames/s)",
        highlight=False,
    )


_SENT_FIELDS = ("endpoint", "n_series", "n_frames", "n_bytes", "seconds", "series_unique_ids")


def run_with_prefect(request: Any) -> dict[str, Any]:
    """Process as a Prefect flow."""
    api = os.environ.get("PREFECT_API_URL", "")
    if api and not is_healthy(api):
        raise ServiceUnavailable(
            f"the Prefect server at {api} does not answer; start it, correct PREFECT_API_URL, or add --no-prefect"
        )
    from flows.process_run import process_run

    values = {name: getattr(request, name) for name in type(request).model_fields}
    summary: dict[str, Any] | None = process_run(**values)
    if summary is None:
        raise ProcessingBusy(f"somebody else processes {request.run} with this recipe; wait for it, or use another")
    return summary


def run_with_bar(request: Any, console: Console) -> dict[str, Any]:
    """Process with no server, showing a bar."""
    from flows.run_processing import run_processing

    # The bar says it all; the log lines are for a flow run's page.
    logging.getLogger("nearline.process").setLevel(logging.WARNING)
    with StageBars(console) as bars:
        return run_processing(request, reporter=_BarReporter(bars.update))


@contextmanager
def quiet_process_log() -> Iterator[None]:
    """No log lines of chunks: a bar says it all."""
    log = logging.getLogger("nearline.process")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


class _BarReporter:
    def __init__(self, update: Callable[[str, int, int], None]) -> None:
        self._update = update

    def started(self, run: Any, processing: Any, recipe: Any) -> None:
        self._update(f"{run.name}: processing {processing.name} with recipe {recipe.name}", 0, 0)

    def chunk_done(self, progress: Any) -> None:
        totals = progress.totals
        if progress.planned:
            self._update("frames processed", progress.chunk.stop, progress.planned)
        self._update(
            f"to frame {progress.chunk.stop - 1}: {totals.hits} hits ({100 * totals.hit_rate:.1f} %), "
            f"{totals.indexed} indexed ({100 * totals.indexing_rate:.1f} % of hits)",
            0,
            0,
        )

    def finished(self, summary: dict[str, Any]) -> None:
        pass


def processing_summary(console: Console, summary: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary, default=str))
        return
    console.print(
        f"[bold]{summary['experiment']}/{summary['run']}[/bold] processed as {summary['processing']}: "
        f"{summary['frames']} frames, {summary['hits']} hits ({100 * summary['hit_rate']:.1f} % of frames), "
        f"{summary['indexed']} indexed ({100 * summary['indexing_rate']:.1f} % of hits), {summary['seconds']:.1f} s",
        highlight=False,
    )
    for words in (*summary.get("geometries", ()), *summary.get("notes", ())):
        console.print(f"  {words}", highlight=False, soft_wrap=True)
    for name, path in summary["files"].items():
        console.print(f"  {name:16} {path}", highlight=False, soft_wrap=True)
    if summary["flow_run_url"]:
        console.print(f"  {'flow run':16} {summary['flow_run_url']}", highlight=False, soft_wrap=True)


def newest_run(experiment: str, root: Path) -> int:
    """The highest run number of an experiment in a data folder, 0 if it has none."""
    parse_run_key(f"{experiment}/0")
    return max((int(p.name) for p in (root / experiment).glob("[0-9]*") if p.name.isdecimal()), default=0)
