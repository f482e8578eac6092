"""`nearline groups` and `nearline dead-letters`: consumer groups of a run, looked at and put right."""

import json
import re
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from nearline import show
from nearline.options import AsJson, Service

__all__ = ["dead_letters", "groups"]

groups = typer.Typer(no_args_is_help=True, help="Consumer groups of a run: where each is, and putting one elsewhere.")
dead_letters = typer.Typer(
    no_args_is_help=True,
    help="Frames that a group gave out too often in vain, or that cannot be read: look, try again, or give them up.",
)
console = Console()

RunName = Annotated[str, typer.Argument(metavar="RUN", help="experiment/number, such as lyso-2026/17.")]
Group = Annotated[str, typer.Option(help="The consumer group.")]
Source = Annotated[str | None, typer.Option(help="Data source; needed only if the run has several detectors.")]
Frames = Annotated[str | None, typer.Option(help="Only these frame indices, such as 1,5-9; by default all.")]

# More frames than a group can have set aside need not be listed one by one.
_MOST_FRAMES = 1_000_000


def read_frames(text: str) -> list[int]:
    """``1,5-9`` as frame indices, both ends included."""
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,15})(?:-(\d{1,15}))?", part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last or len(found) + last - first >= _MOST_FRAMES:
            raise typer.BadParameter(f"--frames {text[:60]!r} is not a list of frame indices such as 1,5-9")
        found += range(first, last + 1)
    return found


@groups.command("list")
def list_groups(run: RunName, source: Source = None, service: Service = None, as_json: AsJson = False) -> None:
    """List the groups: cursor, lag, members, what is not acknowledged, skipped or set aside."""
    stream = _stream(run, source, service)
    found = stream.groups
    if as_json:
        print(json.dumps(found))
        return
    table = Table("group", "cursor", "lag", "members", "unacknowledged", "dead letters", "skipped")
    for name, group in found.items():
        members = {one["member"] for one in group["unacknowledged"] if one["is_leased"]}
        counts = [group[key] for key in ("n_unacknowledged", "n_dead_letters", "n_skipped")]
        table.add_row(name, *(str(n) for n in (group["cursor"], group["lag"], len(members), *counts)))
    none = f"{_name(stream)} has no consumer groups; follow(group=…) makes one"
    console.print(table if found else none, highlight=False, soft_wrap=True)


@groups.command("seek")
def seek(
    run: RunName,
    group: Group,
    to: Annotated[str, typer.Option(help="Frame index to go on with, start, or end (what is there counts as done).")],
    source: Source = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    service: Service = None,
    as_json: AsJson = False,
) -> None:
    """Put a group on a frame: from there on all is delivered, also what was delivered before."""
    stream = _stream(run, source, service)
    known = _group(stream, group)
    index = _position(to, len(stream))
    if not yes:
        way = "back: what lies between is delivered again" if index < known["cursor"] else "ahead: the rest is left out"
        question = f"group {group} of {_name(stream)} is at frame {known['cursor']}; go to {index}, that is, {way}?"
        typer.confirm(question, abort=True, err=True)
    stream.seek(group, index)
    if as_json:
        print(json.dumps({"group": group, "from": known["cursor"], "to": index}))
    else:
        console.print(f"group {group} goes on at frame {index}", highlight=False)


@dead_letters.command("list")
def list_dead_letters(
    run: RunName,
    group: Annotated[str | None, typer.Option(help="Only this group.")] = None,
    source: Source = None,
    frames: Frames = None,
    service: Service = None,
    as_json: AsJson = False,
) -> None:
    """List the frames set aside: how often they were given out, to whom at last, and why they are here."""
    stream = _stream(run, source, service)
    found = {group: _group(stream, group)} if group else stream.groups
    chosen = None if frames is None else set(read_frames(frames))
    rows = [
        {"group": name, **letter}
        for name, content in found.items()
        for letter in content["dead_letters"]
        if chosen is None or letter["frame_index"] in chosen
    ]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("group", "frame", "given out", "last member", "why")
    for row in rows:
        table.add_row(row["group"], str(row["frame_index"]), str(row["delivery"]), row["member"], row["why"])
    console.print(table if rows else f"{_name(stream)} has no dead letters", highlight=False, soft_wrap=True)
    n_all = sum(content["n_dead_letters"] for content in found.values())
    if chosen is None and len(rows) < n_all:
        console.print(f"{n_all} in all; the first ones are shown", highlight=False)


@dead_letters.command()
def retry(
    run: RunName,
    group: Group,
    source: Source = None,
    frames: Frames = None,
    service: Service = None,
    as_json: AsJson = False,
) -> None:
    """Have them delivered again, counted anew."""
    _settle(_stream(run, source, service), group, "retry", frames, as_json)


@dead_letters.command()
def drop(
    run: RunName,
    group: Group,
    source: Source = None,
    frames: Frames = None,
    service: Service = None,
    as_json: AsJson = False,
) -> None:
    """Give them up in this group; the frames themselves stay stored."""
    _settle(_stream(run, source, service), group, "drop", frames, as_json)


def _settle(stream: Any, group: str, action: str, frames: str | None, as_json: bool) -> None:
    chosen = None if frames is None else read_frames(frames)
    _group(stream, group)
    settled = stream.settle_dead_letters(group, action, chosen)
    if as_json:
        print(json.dumps({"group": group, "action": action, "frames": settled}))
        return
    done = "are delivered again" if action == "retry" else "are given up"
    left_out = "" if chosen is None else f"; {len(set(chosen) - set(settled))} of those named were no dead letters"
    console.print(f"{len(settled)} frames {done} in group {group}{left_out}", highlight=False)


def _stream(run: str, source: str | None, service: str | None) -> Any:
    opened = show.open_run(run, service, None)
    return opened[source] if source else opened.detector


def _group(stream: Any, name: str) -> dict[str, Any]:
    found: dict[str, dict[str, Any]] = stream.groups
    if name not in found:
        known = ", ".join(found) or "none yet"
        raise typer.BadParameter(f"{_name(stream)} has no group {name!r}; it has: {known}")
    return found[name]


def _name(stream: Any) -> str:
    return f"{stream.run.name}/{stream.name}"


def _position(text: str, end: int) -> int:
    if text in ("start", "end"):
        return 0 if text == "start" else end
    if not re.fullmatch(r"\d{1,15}", text) or int(text) > end:
        raise typer.BadParameter(f"--to {text[:40]!r} is not start, end, or a frame index of 0 to {end}")
    return int(text)
