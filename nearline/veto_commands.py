"""`nearline veto`: frames of an ended run that nobody wants go, after a grace time in which that can be undone."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nearline.options import AsJson

__all__ = ["veto"]

console = Console()
errors = Console(stderr=True)


def veto(
    run: Annotated[str, typer.Argument(help="experiment/number, such as lyso-2026/17, or the path of a run folder.")],
    processing: Annotated[str | None, typer.Option(help="Whose results decide, such as p1; needed to mark.")] = None,
    condition: Annotated[str, typer.Option(help="Of the frames that stay, as in nearline query.")] = "results.hit",
    keep_fraction: Annotated[
        float, typer.Option(min=0.0, max=0.999, help="Of the others, kept as a random control sample.")
    ] = 0.01,
    grace: Annotated[str, typer.Option(help="How long it can be undone: 7d, 12h, 90min.")] = "7d",
    why: Annotated[str, typer.Option(help="The reason; it stays known.")] = "",
    undo: Annotated[bool, typer.Option("--undo", help="Take back a veto that was marked.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and change nothing.")] = False,
    despite_processing: Annotated[
        bool, typer.Option("--despite-processing", help="Also while another processing of the run is at work.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    root: Annotated[Path | None, typer.Option(envvar="NEARLINE_ROOT", help="Data folder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Veto the frames of an ended run on which a processing found nothing.

    The first call marks them, and nothing changes until the grace time is over; the next one then carries it out:
    hits, a random control sample and the sum of all that goes stay. Interrupted, the same command completes it.
    """
    from flows.veto_frames import VetoRequest, next_step, plan_for
    from nearline import upkeep
    from storage.retention import parse_age
    from storage.veto import find_veto, undo_veto

    try:
        parse_age(grace)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    folder = upkeep.run_folder(run, root)
    request = VetoRequest(
        run=str(folder.path.absolute()), processing=processing, condition=condition, keep_fraction=keep_fraction,
        grace=grace, by=upkeep.who(), why=why, despite_processing=despite_processing,
    )  # fmt: skip
    if undo:
        _show(undo_veto(folder, upkeep.who()), "undone", as_json)
        return
    found = find_veto(folder)
    if found is None and processing is None:
        raise typer.BadParameter(f"{run} has no veto yet; say with --processing whose results decide")
    plan, stage = found or (plan_for(request), "planned")
    if dry_run:
        _show(plan, stage, as_json)
        return
    if not yes:
        typer.confirm(_in_words(plan, stage) + "; go on?", abort=True, err=True)
    with errors.status("reducing what is kept") as status:
        step = next_step(request, lambda done, total: status.update(f"summing up frame {done} of {total}"))
    _show(step.plan, step.stage, as_json)


def _show(plan: Any, stage: str, as_json: bool) -> None:
    if as_json:
        print(json.dumps(plan.model_dump(mode="json", exclude={"chunks"}) | {"stage": stage}))
        return
    console.print(_in_words(plan, stage), highlight=False, soft_wrap=True)


def _in_words(plan: Any, stage: str) -> str:
    copies = f"; whole copies stay in {', '.join(plan.copies)}" if plan.copies else ""
    due = f", due {plan.due_at:%Y-%m-%d %H:%M} UTC" if stage in ("planned", "marked") else ""
    return (
        f"veto {plan.veto} ({stage}{due}): {plan.n_vetoed} of {plan.n_frames} frames, not {plan.condition} in "
        f"{plan.processing}; {len(plan.control)} others kept as control sample; "
        f"{plan.bytes_before / 1e9:.3f} GB become {plan.bytes_after / 1e9:.3f} GB{copies}"
    )
