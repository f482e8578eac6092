"""The `nearline` command: thin shells over the packages; heavy imports only where they are needed."""

import json
import logging
import os
import sys
from contextlib import ExitStack
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

import nearline
from nearline import (
    automation_commands,
    cell_commands,
    decision_commands,
    detector_commands,
    experiment_commands,
    geometry_commands,
    group_commands,
    provenance_commands,
    report_commands,
    reprocess_commands,
    show,
    token_commands,
    tune_commands,
    veto_commands,
)
from nearline.logs import configure_logs
from nearline.options import AsJson, Folder, Logs, Root, Service
from storage.errors import NearlineError
from storage.names import parse_run_key

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="The data system of a beamline: frames go in once, one API serves them, flows analyse every chunk.\n\n"
    "Start with [bold]nearline demo[/bold], or with [bold]nearline serve[/bold] and, in another terminal, "
    "[bold]nearline simulate[/bold].",
)
console = Console()
errors = Console(stderr=True)

RunName = Annotated[str, typer.Argument(help="experiment/number, such as lyso-2026/17, or the path of a run folder.")]
Source = Annotated[str | None, typer.Option(help="Data source; needed only if the run has several detectors.")]
CellOption = Annotated[
    str | None,
    typer.Option(help="Unit cell: a .cell, PDB, mmCIF or MTZ file, or a,b,c,alpha,beta,gamma in Å and degrees."),
]
SpaceGroup = Annotated[str | None, typer.Option(help="Space group, e.g. 'P 43 21 2'; needed with a cell in numbers.")]


def main() -> None:
    """Entry point: our own errors become one sentence on standard error and exit code 1."""
    if _command() == "serve":
        from streaming.memory import begin_with_huge_pages

        begin_with_huge_pages()
    try:
        app()
    except NearlineError as error:
        errors.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except OSError as error:
        errors.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print("interrupted; the same command goes on where it stopped, where there was anything to keep")
        sys.exit(130)


def _command() -> str | None:
    return next((argument for argument in sys.argv[1:] if not argument.startswith("-")), None)


def _is_verbose() -> bool:
    return logging.getLogger("nearline").isEnabledFor(logging.DEBUG)


def _show_version(wanted: bool) -> None:
    if wanted:
        console.print(package_version("nearline"))
        raise typer.Exit


@app.callback()
def _options(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")] = False,
    _version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and stop.")
    ] = False,
) -> None:
    configure_logs(errors, is_verbose=verbose)


@app.command()
def serve(
    root: Root = Path("nearline-data"),
    source: Annotated[
        list[str] | None,
        typer.Option(help="A detector, NAME=tcp://HOST:PORT (DECTRIS stream v2). May be given several times."),
    ] = None,
    online: Annotated[
        list[str] | None,
        typer.Option(help="Keep this source in memory only, until newer frames need the room. Repeat for others."),
    ] = None,
    bind: Annotated[str, typer.Option(help="Address for clients.")] = "tcp://127.0.0.1:5600",
    experiment: Annotated[str, typer.Option(help="Experiment of series that name none themselves.")] = "default",
    buffer: Annotated[float, typer.Option(help="Memory for frames, GiB.")] = 0.5,
    gap_timeout: Annotated[float, typer.Option(help="Wait for a missing frame index, s.")] = 2.0,
    idle_timeout: Annotated[
        float, typer.Option(help="End a run as aborted after so long without a message, s.")
    ] = 60.0,
    catalog: Annotated[str | None, typer.Option(help="SQLAlchemy URL of the catalog; default SQLite in ROOT.")] = None,
    upload_to: Annotated[
        str | None, typer.Option(help="Also send every sealed chunk there: s3://bucket/prefix, or a folder.")
    ] = None,
    remove_uploaded: Annotated[
        bool, typer.Option("--remove-uploaded", help="Remove a run's shards here once it has ended and is up there.")
    ] = False,
    tokens: Annotated[
        bool, typer.Option("--tokens", help="Let in only who shows a token (`nearline token create`).")
    ] = False,
    encrypt: Annotated[
        bool, typer.Option("--encrypt", help="Speak CURVE: clients need the key (`nearline token key`).")
    ] = False,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond loopback without --tokens or --encrypt, at your own risk.")
    ] = False,
    http: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Also serve /health, /metrics and /runs on this port of loopback."),
    ] = None,
    log_format: Logs = "text",
) -> None:
    """Run the streaming service: buffer detector frames, write them, serve them.

    Stop it with Ctrl-C: it seals what it has. After a crash, start it again on the same ROOT: it
    keeps every stored frame and goes on with the run.
    """
    from streaming.service import DEFAULT_DETECTOR, ServiceSettings, serve_until_signal

    configure_logs(errors, log_format=log_format, is_verbose=_is_verbose())
    settings = ServiceSettings(
        root=root,
        bind=bind,
        experiment=experiment,
        sources=show.read_sources(source or [f"eiger={DEFAULT_DETECTOR}"], online or []),
        buffer_bytes=int(buffer * (1 << 30)),
        gap_timeout_s=gap_timeout,
        idle_timeout_s=idle_timeout,
        catalog_url=catalog,
        upload_to=upload_to,
        removes_uploaded=remove_uploaded,
        wants_tokens=tokens,
        encrypts=encrypt,
        allows_insecure=insecure,
    )

    def ready(service: Any) -> None:
        if http is not None:
            from nearline.web.child import WebChild

            beside.enter_context(
                WebChild(
                    ["--service", service.address, "--port", str(http), "--log-format", log_format],
                    server_key=service.public_key,
                )
            )
        if log_format == "json":
            return  # the service logs the same
        listening = ", ".join(f"{s.name} at {s.endpoint}" for s in settings.sources)
        errors.print(f"serving [bold]{root}[/bold] on {service.address}; listening to {listening}", highlight=False)
        errors.print("frames come from a detector, `nearline simulate` or `nearline replay FILES`; Ctrl-C stops")

    with ExitStack() as beside:
        serve_until_signal(settings, ready)


@app.command()
def simulate(
    size: Annotated[str, typer.Option(help="512, 1M, 4M, 9M, 16M, or SLOWxFAST in px.")] = "4M",
    frames: Annotated[int, typer.Option(help="Frames per series.")] = 300,
    rate: Annotated[float, typer.Option(help="Frames per second; 0 as fast as possible.")] = 30.0,
    repeat: Annotated[int, typer.Option(help="Series to send.")] = 1,
    hit_fraction: Annotated[float, typer.Option(help="Share of frames that show a crystal.")] = 0.3,
    dtype: Annotated[str, typer.Option(help="uint16 or uint32.")] = "uint16",
    bind: Annotated[str, typer.Option(help="Where the detector's stream is.")] = "tcp://127.0.0.1:31001",
    experiment: Annotated[str | None, typer.Option(help="Experiment to file the series under.")] = None,
    run: Annotated[int | None, typer.Option(help="Run number to ask for; default the next free one.")] = None,
    sample: Annotated[str | None, typer.Option(help="Name of the sample.")] = None,
    cell: Annotated[str | None, typer.Option(help="a,b,c,alpha,beta,gamma; default lysozyme.")] = None,
    space_group: Annotated[str | None, typer.Option(help="Space group of that cell.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed, other frames.")] = 0,
    bijvoet: Annotated[float, typer.Option(help="Relative rms difference between Bijvoet mates.")] = 0.0,
    truth: Annotated[Path | None, typer.Option(help="Write what is really on each frame to this Parquet file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Be a DECTRIS detector (stream v2) that takes stills of a protein crystal, with known truth."""
    from streaming.simulator import SimulatorSettings
    from streaming.simulator import simulate as simulate_series
    from tasks.unit_cell import read_cell

    options: dict[str, Any] = {}
    if cell:
        unit_cell = read_cell(cell, space_group)
        options = {"cell": unit_cell.parameters, "space_group": unit_cell.space_group}
    settings = show.validated(
        SimulatorSettings,
        size=size,
        n_frames=frames,
        rate=rate,
        repeat=repeat,
        hit_fraction=hit_fraction,
        dtype=dtype,
        bind=bind,
        experiment=experiment,
        run=run,
        sample=sample,
        seed=seed,
        bijvoet=bijvoet,
        truth=truth,
        **options,
    )
    with show.StageBars(errors) as bars:
        sent = simulate_series(settings, bars.update)
    show.series_sent(console, sent, as_json)


@app.command()
def replay(
    files: Annotated[list[Path], typer.Argument(help="miniCBF (.cbf, .gz, .bz2) or HDF5/NXmx files, or a folder.")],
    rate: Annotated[float, typer.Option(help="Frames per second; 0 as fast as possible.")] = 10.0,
    bind: Annotated[str, typer.Option(help="Where the replay's stream is.")] = "tcp://127.0.0.1:31001",
    experiment: Annotated[str | None, typer.Option(help="Experiment to file the series under.")] = None,
    run: Annotated[int | None, typer.Option(help="Run number to ask for; default the next free one.")] = None,
    sample: Annotated[str | None, typer.Option(help="Name of the sample.")] = None,
    distance: Annotated[float | None, typer.Option(help="Detector distance, m, where the files are wrong.")] = None,
    wavelength: Annotated[float | None, typer.Option(help="Wavelength, Å, where the files are wrong.")] = None,
    beam_center: Annotated[str | None, typer.Option(help="Beam centre X,Y in px, where the files are wrong.")] = None,
    as_json: AsJson = False,
) -> None:
    """Send files as a detector would (DECTRIS stream v2), for a service to take them in."""
    from streaming.replay import replay as replay_files
    from streaming.simulator import SenderSettings

    settings = show.validated(SenderSettings, bind=bind, rate=rate, experiment=experiment, run=run, sample=sample)
    overrides = show.header_overrides(distance, wavelength, beam_center)
    with show.StageBars(errors) as bars:
        sent = replay_files(files, settings, overrides=overrides, progress=bars.update)
    show.series_sent(console, sent, as_json)


@app.command()
def process(
    run: RunName,
    recipe: Annotated[Path | None, typer.Option(help="Recipe file, YAML or TOML.")] = None,
    cell: CellOption = None,
    space_group: SpaceGroup = None,
    source: Source = None,
    service: Service = None,
    root: Folder = None,
    threads: Annotated[int | None, typer.Option(help="Threads over frames; default one per core.")] = None,
    prefect: Annotated[
        bool | None,
        typer.Option(
            "--prefect/--no-prefect",
            help="Record in a Prefect server (PREFECT_API_URL); default: if that variable is set.",
        ),
    ] = None,
    wait: Annotated[float, typer.Option(help="Wait so long for the run to begin, s.")] = 0.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Stop criterion, judged after each chunk, such as 'n_indexed >= 1000'; may be repeated."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Analyse a run, live or finished: bin, find peaks, index, integrate, export, chunk by chunk.

    Without --recipe the crystallography preset is used; give it a --cell to index with.
    """
    from flows.run_processing import ProcessRequest

    content = show.recipe_from(recipe, cell, space_group).model_dump(mode="json")
    show.wait_for_run(run, service, root, wait)
    options: dict[str, Any] = {"n_threads": threads} if threads else {}
    options |= {"stop": tuple(stop)} if stop else {}
    request = ProcessRequest(
        run=run, recipe=content, data_source=source, service=service, root=str(root) if root else None, **options
    )
    has_server = bool(os.environ.get("PREFECT_API_URL"))
    if prefect and not has_server:
        raise typer.BadParameter(
            "--prefect needs the server's address in PREFECT_API_URL, e.g. http://127.0.0.1:4200/api"
        )
    use_prefect = has_server if prefect is None else prefect
    summary = show.run_with_prefect(request) if use_prefect else show.run_with_bar(request, errors)
    show.processing_summary(console, summary, as_json)


@app.command()
def export(
    run: RunName,
    output: Annotated[Path, typer.Option("--output", "-o", help="NXmx file to write.")],
    source: Source = None,
    processing: Annotated[str | None, typer.Option(help="Only the hits of this processing, e.g. p1.")] = None,
    frames_per_file: Annotated[int | None, typer.Option(help="A master and data files of so many frames.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace a file that is there.")] = False,
    service: Service = None,
    root: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Write a run's frames to a NeXus (NXmx) file, byte for byte as the detector compressed them."""
    from flows.exports import export_stream

    if not output.absolute().parent.is_dir():
        raise typer.BadParameter(f"no folder {output.absolute().parent} to write {output.name} into; make it first")
    opened = show.open_run(run, service, root)
    stream = opened[source] if source else opened.detector
    with show.StageBars(errors) as bars:
        result = export_stream(
            opened,
            stream,
            output,
            processing=processing,
            frames_per_file=frames_per_file,
            overwrite=overwrite,
            progress=lambda done, total: bars.update("exporting", done, total),
        )
    if as_json:
        print(json.dumps(result))
    else:
        console.print(f"{result['frames']} frames in {result['path']}", highlight=False, soft_wrap=True)


@app.command()
def runs(
    experiment: Annotated[str | None, typer.Argument(help="Only this experiment.")] = None,
    service: Service = None,
    root: Folder = None,
    as_json: AsJson = False,
) -> None:
    """List runs."""
    show.run_list(console, show.list_runs(experiment, service, root), as_json)


@app.command("start-run")
def start_run(
    experiment: Annotated[str, typer.Argument(help="Experiment, such as lyso-2026.")],
    sample: Annotated[str | None, typer.Option(help="Name of the sample.")] = None,
    run: Annotated[int | None, typer.Option(help="Run number; default the next free one.")] = None,
    service: Service = None,
    as_json: AsJson = False,
) -> None:
    """Open a run that takes every detector series of the experiment until `nearline stop-run`; prints its name."""
    number = nearline.start_run(experiment, run, sample=sample, service=service)
    print(json.dumps({"experiment": experiment, "run": number}) if as_json else f"{experiment}/{number}")


@app.command("stop-run")
def stop_run(
    run: Annotated[str, typer.Argument(help="experiment/number, as `nearline start-run` has printed it.")],
    aborted: Annotated[str | None, typer.Option(help="Why, when this is not a regular end.")] = None,
    service: Service = None,
    as_json: AsJson = False,
) -> None:
    """End such a run; returns when its last chunk is sealed."""
    experiment, number = parse_run_key(run)
    nearline.stop_run(experiment, number, aborted=aborted, service=service)
    state = show.open_run(run, service, None).state.value
    print(json.dumps({"run": run, "state": state}) if as_json else f"{run} has ended: {state}")


@app.command()
def info(
    run: RunName,
    service: Service = None,
    root: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Show a run: its state, data sources, detector and processings."""
    show.run_info(console, show.open_run(run, service, root), as_json)


@app.command()
def ledger(
    run: RunName,
    service: Service = None,
    root: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Account for every frame of a run; exit code 2 if the sums do not balance."""
    if not show.ledgers(console, show.open_run(run, service, root), as_json):
        raise typer.Exit(2)


@app.command()
def query(
    run: RunName,
    condition: Annotated[
        str | None, typer.Argument(help="SQL condition, such as 'n_peaks > 20 AND laser'; without one, list columns.")
    ] = None,
    source: Source = None,
    columns: Annotated[
        str | None, typer.Option(help="Columns to show, separated by commas; by default those of the condition.")
    ] = None,
    processing: Annotated[str | None, typer.Option(help="Whose results, e.g. p1; by default the newest.")] = None,
    limit: Annotated[int | None, typer.Option(min=0, help="Most rows to show; default 50 on a screen.")] = None,
    service: Service = None,
    root: Folder = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV on standard output.")] = False,
    as_json: AsJson = False,
) -> None:
    """Find frames by an SQL condition over frame table, metadata, results and annotations."""
    from nearline import queries

    opened = show.open_run(run, service, root)
    stream = opened[source] if source else opened.detector
    if condition is None:
        queries.list_columns(console, stream, processing, as_json)
        return
    wanted = [name.strip() for name in columns.split(",") if name.strip()] if columns else None
    selection = stream.where(condition, columns=wanted, processing=processing)
    shown = 50 if limit is None and not (as_csv or as_json) else limit
    queries.show_selection(console, selection, shown, as_json=as_json, as_csv=as_csv)


@app.command()
def annotate(
    run: RunName,
    values: Annotated[
        list[str] | None, typer.Argument(metavar="NAME=VALUE…", help="Such as laser=true delay_ps=3.")
    ] = None,
    frames: Annotated[str | None, typer.Option(help="START:STOP (without STOP), one index, or 3,5,8.")] = None,
    from_time: Annotated[str | None, typer.Option("--from", help="Frames from this time, ISO 8601 with zone.")] = None,
    to_time: Annotated[str | None, typer.Option("--to", help="Frames before this time, ISO 8601 with zone.")] = None,
    table: Annotated[
        Path | None, typer.Option("--csv", help="A table with a column frame_index, or start and stop, or from and to.")
    ] = None,
    source: Annotated[str | None, typer.Option(help="Whose frame indices; default all data sources.")] = None,
    by: Annotated[str | None, typer.Option(help="Who says so; default the user.")] = None,
    is_list: Annotated[bool, typer.Option("--list", help="Show what was said so far.")] = False,
    service: Service = None,
    root: Folder = None,
    as_json: AsJson = False,
) -> None:
    """Say something of frames afterwards: laser on, a delay, a position. Later values win, earlier ones are kept."""
    from nearline import queries

    opened = show.open_run(run, service, root)
    if not is_list:
        said = queries.read_values(values or [])
        where = {"from_time": from_time, "to_time": to_time, "data_source": source, "by": by}
        where["frames"] = None if frames is None else queries.read_frames_option(frames)
        number = queries.annotate_run(opened, said, table, where)
        if as_json:
            print(json.dumps({"batch": number}))
        else:
            console.print(f"kept as batch {number} of {opened.name}; use it in `nearline query`", highlight=False)
        return
    queries.list_annotations(console, opened, as_json)


catalog_app = typer.Typer(no_args_is_help=True, help="The index of runs; every fact in it is in the run folders.")
app.add_typer(catalog_app, name="catalog")
experiment_commands.register(app)
app.add_typer(token_commands.app, name="token")
reprocess_commands.add_to(app)
app.add_typer(group_commands.groups, name="groups")
app.add_typer(group_commands.dead_letters, name="dead-letters")
automation_commands.register(app)
provenance_commands.register(app)
cell_commands.register(app)
decision_commands.register(app)
detector_commands.register(app)
geometry_commands.register(app)
tune_commands.register(app)
report_commands.register(app)


@catalog_app.command("rebuild")
def rebuild_catalog(
    root: Root = Path("nearline-data"),
    catalog: Annotated[str | None, typer.Option(help="SQLAlchemy URL of the catalog; default SQLite in ROOT.")] = None,
) -> None:
    """Make the catalog anew from the run folders."""
    from storage.catalog import Catalog, default_url

    if not root.is_dir():
        raise typer.BadParameter(f"no data folder {root}; name it with --root")
    index = Catalog(catalog or default_url(root))
    with show.StageBars(errors) as bars:
        rebuilt = index.rebuild(root.absolute(), lambda done, total: bars.update("runs", done, total))
    index.close()
    with show.StageBars(errors) as bars:
        n_known = provenance_commands.refresh(
            root, catalog, anew=True, progress=lambda done, total: bars.update("provenance", done, total)
        )
    for why in rebuilt.left_out:
        errors.print(f"left out: {why}", highlight=False, soft_wrap=True)
    console.print(f"{rebuilt.n_runs} runs in the catalog of {root}, {n_known} with their provenance")


@app.command()
def status(
    service: Service = None,
    once: Annotated[
        bool, typer.Option("--once", help="Show it once, with the rates of half a second, and stop.")
    ] = False,
    interval: Annotated[float, typer.Option(min=0.1, max=3600.0, help="Look so often, s.")] = 1.0,
    as_json: AsJson = False,
) -> None:
    """Watch a running service: sources, streams, groups, times, rates. Ctrl-C stops; in a pipe it shows once."""
    from nearline.status_view import live_status
    from streaming.status import ServiceStatus

    if as_json:
        print(json.dumps(show.read_status(service)))
        return
    is_once = once or not console.is_terminal
    live_status(
        lambda: ServiceStatus.model_validate(show.read_status(service)),
        console,
        interval_s=0.5 if is_once else interval,
        n_looks=2 if is_once else None,
    )


@app.command()
def doctor(
    root: Root = Path("nearline-data"),
    service: Service = None,
    as_json: AsJson = False,
) -> None:
    """Look whether this machine can run Nearline: packages, disk, ports, keys, a round trip. Exit code 1 if not."""
    from dataclasses import asdict

    from nearline.doctor import Place, examine, show_checks

    checks = examine(Place(root, service))
    if as_json:
        found = list(checks)
        print(json.dumps([asdict(check) for check in found]))
        raise typer.Exit(1 if any(check.state == "fail" for check in found) else 0)
    raise typer.Exit(0 if show_checks(console, checks) else 1)


@app.command()
def web(
    service: Service = None,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8600,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    certificate: Annotated[Path | None, typer.Option(help="TLS certificate (PEM), for HTTPS.")] = None,
    certificate_key: Annotated[Path | None, typer.Option(help="Its key (PEM).")] = None,
    insecure_bind: Annotated[
        bool, typer.Option("--insecure-bind", help="Listen beyond loopback although tokens or TLS are missing.")
    ] = False,
    log_format: Logs = "text",
    end_with_parent: Annotated[bool, typer.Option("--end-with-parent", hidden=True)] = False,
) -> None:
    """Serve /health, /metrics (Prometheus) and /runs of a service over HTTP.

    Where the service wants a token, so does this: Authorization: Bearer TOKEN.
    """
    from nearline.web.serve import WebSettings, serve_web
    from streaming.wire import DEFAULT_ADDRESS

    configure_logs(errors, log_format=log_format, is_verbose=_is_verbose())
    settings = WebSettings(
        service=service or DEFAULT_ADDRESS,
        host=host,
        port=port,
        certificate=certificate,
        certificate_key=certificate_key,
        is_insecure_allowed=insecure_bind,
        ends_with_parent=end_with_parent,
    )
    scheme = "https" if certificate else "http"
    logging.getLogger("nearline.web").info(
        "%s://%s:%d: /health, /metrics, /runs of %s", scheme, host, port, settings.service
    )
    serve_web(settings)


@app.command()
def demo(
    real: Annotated[Path | None, typer.Option(help="Use the files in this folder instead of the simulator.")] = None,
    cell: CellOption = None,
    space_group: SpaceGroup = None,
    folder: Annotated[Path, typer.Option(help="Where the demo keeps data and the Prefect database.")] = Path(
        "build/demo"
    ),
    frames: Annotated[int, typer.Option(help="Frames to simulate.")] = 300,
    rate: Annotated[float, typer.Option(help="Frames per second.")] = 20.0,
    size: Annotated[str, typer.Option(help="Detector to simulate: 512, 1M, 4M, 9M, 16M, or SLOWxFAST in px.")] = "4M",
    keep: Annotated[bool, typer.Option("--keep", help="Leave server and service up until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Watch a run travel the whole way: detector, service, Zarr, Prefect flow, NeXus.

    Exit code 0 only if every frame is accounted for and the results agree with the truth.
    """
    from nearline.demo import DemoSettings, run_demo

    if not real and (cell or space_group):
        raise typer.BadParameter("--cell and --space-group go with --real; the simulated crystal is lysozyme")
    if real and not real.exists():
        raise typer.BadParameter(f"no folder or file {real}; --real takes CBF or NeXus files")
    settings = show.validated(
        DemoSettings,
        folder=folder.absolute(),
        real=real,
        cell=cell,
        space_group=space_group,
        n_frames=frames,
        rate=rate,
        size=size,
        keep=keep,
    )
    is_good = run_demo(settings, errors if as_json else console, as_json=as_json)
    raise typer.Exit(0 if is_good else 1)


@app.command()
def upload(
    run: RunName,
    target: Annotated[str, typer.Argument(help="s3://bucket/prefix, or a folder; the run goes below it.")],
    remove_local: Annotated[
        bool, typer.Option("--remove-local", help="Afterwards remove the frames here, of a run that has ended.")
    ] = False,
    root: Annotated[Path | None, typer.Option(envvar="NEARLINE_ROOT", help="Data folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Copy a run to an object store or another data folder; what is there already is not sent again.

    The store's address and credentials come from the environment (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID …).
    """
    from nearline import upkeep
    from storage.files import to_path
    from storage.upload import upload_run

    with upkeep.ByteBar("uploading", errors) as bar:
        summary = upload_run(upkeep.run_folder(run, root), to_path(target), remove_local=remove_local, progress=bar)
    upkeep.uploaded(console, summary, as_json)


Catalog = Annotated[str | None, typer.Option(help="SQLAlchemy URL of the catalog; default SQLite in the data folder.")]


@app.command()
def delete(
    run: RunName,
    why: Annotated[str, typer.Option(help="The reason; it stays known.")] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    root: Annotated[Path | None, typer.Option(envvar="NEARLINE_ROOT", help="Data folder.")] = None,
    catalog: Catalog = None,
    as_json: AsJson = False,
) -> None:
    """Delete the frames and results of a run that has ended; header, events and ledger stay.

    Copies elsewhere are not touched. Interrupted, the same command completes it.
    """
    from nearline import upkeep
    from storage.retention import delete_run

    folder = upkeep.run_folder(run, root)
    if not yes:
        upkeep.confirm_deletion(folder)
    result = delete_run(folder, upkeep.who(), why)
    upkeep.note_in_catalog(folder.path.parent.parent, [folder], catalog, errors)
    upkeep.deleted(console, result, as_json)


@app.command()
def retain(
    root: Root = Path("nearline-data"),
    older_than: Annotated[str, typer.Option(help="Only runs that ended so long ago: 30d, 12h, 6w.")] = "",
    keep_last: Annotated[int, typer.Option(help="Keep the newest so many runs of each experiment.")] = 0,
    experiment: Annotated[str | None, typer.Option(help="Only this experiment.")] = None,
    only_uploaded: Annotated[bool, typer.Option("--only-uploaded", help="Only runs that were uploaded whole.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be deleted, and delete nothing.")] = False,
    catalog: Catalog = None,
    as_json: AsJson = False,
) -> None:
    """Delete runs by a rule, as `nearline delete` does; exit code 2 if one that was chosen could not be deleted.

    Runs that have not ended are never chosen. Deletions that were interrupted are completed.
    """
    from nearline import upkeep

    if not (older_than or keep_last):
        raise typer.BadParameter("say which runs may go: --older-than, --keep-last, or both")
    result = upkeep.apply_retention(
        root.absolute(), older_than, keep_last, experiment, only_uploaded, dry_run, catalog, errors
    )
    upkeep.retained(console, result, as_json, dry_run=dry_run)
    raise typer.Exit(2 if result.refused else 0)


@app.command()
def verify(
    run: RunName,
    root: Annotated[Path | None, typer.Option(envvar="NEARLINE_ROOT", help="Data folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Read everything of a run and compare it with its checksums; exit code 2 if anything is damaged or gone.

    Frames that never came are listed with their cause; they are no damage.
    """
    from nearline import upkeep
    from storage.verify import verify_run

    folder = upkeep.run_path(run, root)
    with upkeep.ByteBar("verifying", errors) as bar:
        report = verify_run(folder, bar)
    upkeep.verified(console, run, report, as_json)
    raise typer.Exit(0 if report.is_sound else 2)


app.command()(veto_commands.veto)


if __name__ == "__main__":
    main()
