"""`nearline explain` and `nearline provenance`: from a result back to its bytes, and what was made of what."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.tree import Tree

from nearline.options import AsJson, Root, Service
from nearline.show import StageBars

__all__ = ["refresh", "register"]

console = Console()
errors = Console(stderr=True)

RunName = Annotated[str, typer.Argument(help="experiment/number, such as lyso-2026/17, or the path of a run folder.")]
ProcessingName = Annotated[str | None, typer.Option(help="Whose results, such as p1; default the newest.")]
_MOST_VALUES = 24
_SHORT = 16


def register(app: typer.Typer) -> None:
    """Add the commands to the `nearline` command."""
    app.command()(explain)
    app.command()(provenance)


def refresh(
    root: Path,
    url: str | None,
    *,
    anew: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    left_out: Callable[[str], None] | None = None,
) -> int:
    """Bring the tables of provenance up to what the run folders say; how many runs were read for it."""
    from storage.catalog import default_url
    from storage.provenance_tables import ProvenanceTables

    tables = ProvenanceTables(url or default_url(root))
    try:
        return tables.refresh(
            root.absolute(),
            anew=anew,
            progress=progress,
            left_out=left_out or (lambda why: errors.print(f"left out: {why}", highlight=False, soft_wrap=True)),
        )
    finally:
        tables.close()


# ---- explain --------------------------------------------------------------------------------------


def explain(
    run: RunName,
    frame: Annotated[int, typer.Option(min=0, help="Index of the frame.")],
    peak: Annotated[int | None, typer.Option(min=0, help="One of its peaks, from 0.")] = None,
    reflection: Annotated[
        str | None, typer.Option(help="One of its reflections, by Miller indices: 3,-1,12.", metavar="H,K,L")
    ] = None,
    processing: ProcessingName = None,
    data_source: Annotated[str | None, typer.Option(help="Which detector; default the processing's.")] = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="Compute it again from the bytes, and compare; exit code 1 if it differs.")
    ] = False,
    recipe: Annotated[
        Path | None, typer.Option(help="With --replay: a recipe whose parameters are used instead.")
    ] = None,
    service: Service = None,
    root: Annotated[Path | None, typer.Option(envvar="NEARLINE_ROOT", help="Data folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Walk back from a frame, a peak or a reflection to bytes, parameters and code.

    Of a frame that is not there it says what happened to it, when and why. The bytes are read and checked.
    """
    from flows.explaining import explain as explain_
    from flows.replaying import replay as replay_
    from streaming.retrieval import open_run
    from tasks.recipe import load_recipe

    opened = open_run(run, service=service, root=root)
    found = explain_(
        opened, frame, peak=peak, reflection=_miller(reflection), processing=processing, data_source=data_source
    )
    again = replay_(opened, found, recipe=load_recipe(recipe) if recipe else None) if replay else None
    if as_json:
        content = found.model_dump(mode="json") | ({"replay": again.model_dump(mode="json")} if again else {})
        print(json.dumps(content, default=str))
    else:
        console.print(_explained(found), highlight=False)
        if again is not None:
            console.print(_replayed(again), highlight=False)
    if again is not None and not again.is_identical:
        raise typer.Exit(1)


def _miller(text: str | None) -> tuple[int, int, int] | None:
    if text is None:
        return None
    try:
        h, k, l = (int(word) for word in text.split(","))  # noqa: E741
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not three whole numbers; write them like 3,-1,12") from None
    return h, k, l


def _explained(found: Any) -> Tree:
    what = f"frame {found.frame}"
    if found.peak is not None:
        what = f"peak {found.peak} of {what}"
    if found.reflection is not None:
        what = f"reflection {','.join(map(str, found.reflection))} of {what}"
    tree = Tree(f"[bold]{what}[/bold] of {found.run}/{found.data_source}: {found.state}")
    if found.why:
        # What others wrote (causes, reasons, paths) may hold brackets, which are no styles.
        tree.add(f"[yellow]{escape(found.why)}[/yellow]")
    if found.values:
        _add(tree, "values", dict(list(found.values.items())[:_MOST_VALUES]))
    for step in reversed(found.steps):
        _add_step(tree, step)
    if found.geometry:
        tree.add(f"[bold]geometry[/bold]: {_text(found.geometry['words'])}, digest {found.geometry['digest'][:_SHORT]}")
    _add(tree, "processing", _told(found.processing))
    _add_bytes(tree, found)
    _add(tree, "received", found.received)
    return tree


def _add(tree: Tree, title: str, facts: dict[str, Any]) -> Tree | None:
    known = {name: value for name, value in facts.items() if value not in (None, "", {}, [])}
    if not known:
        return None
    branch = tree.add(f"[bold]{title}[/bold]")
    for name, value in known.items():
        branch.add(f"{name}: {_text(value)}")
    return branch


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return escape(text)


def _add_step(tree: Tree, step: Any) -> None:
    branch = tree.add(f"[bold]step {step.name}[/bold] ({step.use}), output {step.digest[:_SHORT]}")
    _add(branch, "parameters", step.params)
    source, libraries = step.code.get("source", ""), {k: v for k, v in step.code.items() if k != "source"}
    if step.code:
        branch.add(f"code: source {source[:_SHORT]}, " + ", ".join(f"{k} {v}" for k, v in libraries.items()))
    if step.made:
        branch.add(f"made: {step.made.get('at')} by {_software(step.made)}")


def _told(processing: dict[str, Any]) -> dict[str, Any]:
    names = ("processing", "started_at", "host", "recipe_digest", "code_digest", "flow_run_url", "task_runs", "note")
    return {name: processing[name] for name in names if name in processing}


def _add_bytes(tree: Tree, found: Any) -> None:
    for place in found.bytes:
        part = f" part {place.part}" if len(found.bytes) > 1 else ""
        where = f"{place.file} at byte {place.offset}" if place.offset is not None else place.file
        verdict = "[green]read and verified[/green]" if place.is_verified else f"[red]{escape(place.problem)}[/red]"
        branch = tree.add(f"[bold]bytes{part}[/bold]: {place.length:,} in {escape(where)}, {verdict}")
        branch.add(f"digest {place.digest}, crc32c {place.crc32c}")
    _add(tree, "chunk", found.chunk)


def _replayed(again: Any) -> Tree:
    verdict = "[green]identical[/green]" if again.is_identical else "[red]differs[/red]"
    tree = Tree(f"[bold]replayed[/bold]: {verdict}")
    for check in again.tables:
        state = "identical" if check.is_identical else f"differs in {escape(', '.join(check.columns)) or 'its rows'}"
        tree.add(f"{check.step}/{check.table}: {check.n_rows} rows, {check.recorded[:_SHORT]}, {state}")
    for difference in again.differences:
        tree.add(f"[yellow]{difference.kind}[/yellow]: {_text(difference.what)}")
    for note in again.notes:
        tree.add(f"[dim]{_text(note)}[/dim]")
    return tree


# ---- provenance -----------------------------------------------------------------------------------


def provenance(
    run: Annotated[str | None, typer.Argument(help="The run; not needed with --made-by and --made-from.")] = None,
    processing: ProcessingName = None,
    prov: Annotated[Path | None, typer.Option(help="Write it as PROV-JSON to this file.")] = None,
    crate: Annotated[Path | None, typer.Option(help="Write a Workflow Run RO-Crate into this folder.")] = None,
    made_by: Annotated[
        str | None, typer.Option(help="In all runs: what a git commit (its first characters) has made.")
    ] = None,
    made_from: Annotated[
        str | None, typer.Option(help="In all runs: what came of an entity (frames, recipe, output) by its digest.")
    ] = None,
    root: Root = Path("nearline-data"),
    catalog: Annotated[str | None, typer.Option(help="SQLAlchemy URL of the catalog; default SQLite in ROOT.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what was made of a run, of what, by whom; or write it down for other programs.

    --made-by and --made-from ask the tables beside the catalog, once they have taken in what is new in the run
    folders.
    """
    if made_by or made_from:
        _search(made_by, made_from, catalog, root, as_json)
        return
    if run is None:
        raise typer.BadParameter("which run? give experiment/number, or --made-by or --made-from")
    from flows.prov_json import prov_json
    from nearline import upkeep
    from storage.provenance import provenance_of

    folder = upkeep.run_folder(run, root if "/" in run and not Path(run).is_dir() else None)
    name = f"{folder.header.experiment}/{folder.header.run}"
    graph = provenance_of(folder.path, processing)
    if prov is not None:
        prov.write_text(json.dumps(prov_json(graph, name), indent=1))
        errors.print(f"{prov} is written", highlight=False, soft_wrap=True)
    if crate is not None:
        _write_crate(folder, processing, crate)
    if as_json:
        print(json.dumps(graph.as_records(), default=str))
    elif prov is None and crate is None:
        console.print(_tree(graph, name), highlight=False)


def _write_crate(folder: Any, processing: str | None, crate: Path) -> None:
    from flows.run_crate import write_crate
    from storage.errors import RunNotFound
    from storage.step_store import find_processings

    found = find_processings(folder.path)
    if not found or (processing is not None and processing not in found):
        raise RunNotFound(f"{folder.path} has no processing {processing or ''}; it has: {', '.join(found) or 'none'}")
    chosen = found[processing] if processing else next(reversed(found.values()))
    errors.print(f"{write_crate(folder, chosen, crate)} is written", highlight=False, soft_wrap=True)


def _tree(graph: Any, name: str) -> Tree:
    tree = Tree(f"[bold]{name}[/bold]")
    _add_recordings(tree, graph)
    for activity in graph.activities.values():
        if activity.kind == "processing":
            _add_processing(tree, graph, activity)
    if not any(a.kind == "processing" for a in graph.activities.values()):
        tree.add("not processed yet; `nearline process` does it")
    return tree


def _add_recordings(tree: Tree, graph: Any) -> None:
    recordings = [a for a in graph.activities.values() if a.kind == "recording"]
    for source in sorted({a.id.partition("/")[0] for a in recordings}):
        mine = [a for a in recordings if a.id.startswith(f"{source}/")]
        n_frames = sum(a.attributes["n_frames"] for a in mine)
        size = sum(a.attributes["size_bytes"] for a in mine)
        tree.add(f"[bold]{source}[/bold]: {n_frames} frames in {len(mine)} chunks that were analysed, {size:,} bytes")


def _add_processing(tree: Tree, graph: Any, activity: Any) -> None:
    times = " to ".join(f"{t:%Y-%m-%d %H:%M:%S}" for t in (activity.started_at, activity.ended_at) if t is not None)
    branch = tree.add(f"[bold]processing {activity.id}[/bold] ({times} UTC)")
    for relation in graph.related("used", subject=activity.id):
        entity = graph.entities[relation.object]
        if entity.kind == "recipe":
            branch.add(f"recipe {entity.attributes.get('name')}, digest {entity.digest[:_SHORT]}")
    for relation in graph.related("wasAssociatedWith", subject=activity.id):
        branch.add(_agent(graph.agents[relation.object]))
    _add_outputs(branch, graph, activity.id)
    for relation in graph.related("wasGeneratedBy", object=f"{activity.id}/export"):
        entity = graph.entities[relation.subject]
        size = entity.attributes.get("size_bytes")
        branch.add(f"file {entity.location}, {size or 0:,} bytes, blake3 {entity.digest[:_SHORT] or 'not taken'}")


def _agent(agent: Any) -> str:
    facts = agent.attributes
    if agent.kind == "flow run":
        return f"Prefect flow run {facts.get('flow_run_id')} {facts.get('url') or ''}"
    return _software(facts)


def _software(facts: dict[str, Any]) -> str:
    commit = f", commit {facts['commit'][:12]}" if facts.get("commit") else ""
    place = f"python {facts.get('python')}, environment {str(facts.get('environment'))[:12]}"
    who = f"{facts.get('user')} on {facts.get('host')} (pid {facts.get('pid')})"
    return f"{facts.get('program')} {facts.get('version')}{commit}, {place}, by {who}"


def _add_outputs(branch: Tree, graph: Any, processing: str) -> None:
    made: dict[str, list[bool]] = {}
    for chunk in (a for a in graph.activities.values() if a.kind == "chunk" and a.id.startswith(f"{processing}/")):
        for relation in graph.related("used", subject=chunk.id):
            if relation.role == "reused output":
                made.setdefault(graph.entities[relation.object].attributes["step"], []).append(False)
        for relation in graph.related("wasGeneratedBy", object=chunk.id):
            made.setdefault(relation.role or "", []).append(True)
    for step, outputs in made.items():
        n_reused = outputs.count(False)
        branch.add(f"step {step}: {len(outputs)} outputs" + (f", {n_reused} of them from before" if n_reused else ""))


def _search(made_by: str | None, made_from: str | None, catalog: str | None, root: Path, as_json: bool) -> None:
    from storage.catalog import default_url
    from storage.provenance_tables import ProvenanceTables, run_of

    if not root.is_dir():
        raise typer.BadParameter(f"no data folder {root}; name it with --root")
    with StageBars(errors) as bars:
        refresh(root, catalog, progress=lambda done, total: bars.update("looking for what is new", done, total))
    tables = ProvenanceTables(catalog or default_url(root))
    rows = tables.made_by(made_by) if made_by else tables.made_from(made_from or "")
    tables.close()
    if as_json:
        print(json.dumps([row.model_dump(mode="json") | {"name": run_of(row)} for row in rows]))
        return
    for row in rows:
        step = row.attributes.get("step") or ""
        console.print(f"{run_of(row)}  {row.kind} {step}  {row.location}", highlight=False, soft_wrap=True)
    if not rows:
        what = f"made by {made_by}" if made_by else f"made from {made_from}"
        console.print(f"nothing in {root} was {what}", highlight=False, soft_wrap=True)
