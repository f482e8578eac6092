"""What the commands that look after runs need: finding a run's folder, bars in bytes, results as tables."""

import getpass
import json
import os
import socket
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table

from nearline.show import StageBars, validated
from storage.errors import RunNotFound
from storage.files import file_sizes, is_local, to_path
from storage.names import parse_run_key, run_key
from storage.run_folder import RunFolder


def run_folder(run: str, root: Path | None) -> RunFolder:
    """The folder of a run named by its path or URL, or as experiment/number below a data folder."""
    return RunFolder.open(run_path(run, root))


def run_path(run: str, root: Path | None) -> Path:
    """Where that is; RunNotFound if there is no such folder."""
    is_path = run.startswith((".", "/")) or run.count("/") > 1
    path = to_path(run)
    if not is_path and (root is not None or not path.is_dir()):
        experiment, number = parse_run_key(run)
        path = (root or Path("nearline-data")) / experiment / str(number)
    if not is_local(path) or path.is_dir():
        return path
    raise RunNotFound(f"no run in {path}; give experiment/number and --root, or a run folder such as data/lyso-2026/17")


class ByteBar:
    """A progress bar for work that is measured in bytes; a context manager, called with bytes done and in all."""

    def __init__(self, what: str, console: Console) -> None:
        columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
        self._progress = Progress(*columns, console=console)
        self._what = what

    def __enter__(self) -> Self:
        self._progress.start()
        self._bar = self._progress.add_task(self._what, total=None)
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, done: int, total: int) -> None:
        self._progress.update(self._bar, completed=done, total=total)


def uploaded(console: Console, summary: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(summary.model_dump()))
        return
    removed = f"; {summary.n_removed} shards removed here" if summary.n_removed else ""
    console.print(
        f"[bold]{summary.run}[/bold] is at {summary.target}: {summary.n_files} files, {summary.n_bytes / 1e6:.1f} MB "
        f"sent, {summary.n_there} were there{removed}",
        highlight=False,
        soft_wrap=True,
    )


# ---- deleting -----------------------------------------------------------------------------------


def who() -> str:
    """The person at this terminal, as a deletion names them."""
    try:
        return f"{getpass.getuser()}@{socket.gethostname()}"
    except (KeyError, OSError):  # a container's user without a name
        return f"uid {os.getuid()}@{socket.gethostname()}"


def confirm_deletion(folder: RunFolder) -> None:
    """Ask, saying what would go; typer.Abort if the answer is not yes."""
    n_bytes = sum(file_sizes(folder.path).values())
    copies = [event.payload["to"] for event in folder.events("run_uploaded")]
    where = f"; copies are in {', '.join(copies)}" if copies else "; there is no copy that we know of"
    name = run_key(folder.header.experiment, folder.header.run)
    typer.confirm(f"delete the frames and results of {name}, {n_bytes / 1e9:.3f} GB{where}?", abort=True, err=True)


def note_in_catalog(root: Path, folders: Iterable[RunFolder], catalog: str | None, errors: Console) -> None:
    """Bring the rows of changed runs up to date, where there is a catalog; it is an index, and can wait."""
    from storage.catalog import note_runs

    if (why := note_runs(root, folders, catalog)) is not None:
        errors.print(why, highlight=False)


def apply_retention(
    root: Path,
    older_than: str,
    keep_last: int,
    experiment: str | None,
    only_uploaded: bool,
    dry_run: bool,
    catalog: str | None,
    errors: Console,
) -> Any:
    """Apply the rule that the options make to a data folder."""
    from storage.retention import RetentionPolicy, apply_policy, parse_age

    if not root.is_dir():
        raise typer.BadParameter(f"no data folder {root}; name it with --root")
    try:
        age = parse_age(older_than) if older_than else timedelta(0)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    policy = validated(
        RetentionPolicy, older_than=age, keep_last=keep_last, experiment=experiment, only_uploaded=only_uploaded
    )
    with StageBars(errors) as bars:
        result = apply_policy(
            root,
            policy,
            datetime.now(UTC),
            who(),
            dry_run=dry_run,
            progress=lambda done, total: bars.update("deleting", done, total),
        )
    note_in_catalog(root, [RunFolder.open(root / d.run) for d in result.deleted], catalog, errors)
    return result


def deleted(console: Console, result: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(result.model_dump()))
        return
    console.print(
        f"[bold]{result.run}[/bold] is deleted: {result.n_files} files, {result.n_bytes / 1e9:.3f} GB; "
        "its header, events and ledger stay",
        highlight=False,
    )


def retained(console: Console, result: Any, as_json: bool, *, dry_run: bool) -> None:
    if as_json:
        content = {
            "selected": result.selected,
            "deleted": [d.model_dump() for d in result.deleted],
            "refused": result.refused,
        }
        print(json.dumps(content))
        return
    table = Table("run", "files", "GB", "")
    sizes = {d.run: d for d in result.deleted}
    for name in result.selected:
        done = sizes.get(name)
        numbers = (str(done.n_files), f"{done.n_bytes / 1e9:.3f}") if done else ("", "")
        table.add_row(
            name, *numbers, "would be deleted" if dry_run else "deleted" if done else "[red]not deleted[/red]"
        )
    console.print(table if result.selected else "no run is to be deleted")
    for name, why in result.refused.items():
        console.print(f"[red]{name}:[/red] {why}", highlight=False, soft_wrap=True)


# ---- verifying ----------------------------------------------------------------------------------

_MOST_LINES = 50


def verified(console: Console, name: str, report: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"run": name, "is_sound": report.is_sound} | report.model_dump(mode="json")))
        return
    if report.findings:
        table = Table("file", "frame", "what", "what to do")
        for finding in report.findings[:_MOST_LINES]:
            frame = "" if finding.frame is None else str(finding.frame)
            table.add_row(finding.file, frame, finding.what, finding.remedy)
        console.print(table)
    for hole in report.holes[:_MOST_LINES]:
        part = hole.frames
        frames = f"frame {part.start}" if part.stop == part.start + 1 else f"frames {part.start}–{part.stop - 1}"
        console.print(f"{hole.data_source}: {frames} {part.state}: {part.cause or 'unknown'}", highlight=False)
    left_out = max(len(report.findings) - _MOST_LINES, 0) + max(len(report.holes) - _MOST_LINES, 0)
    if left_out:
        console.print(f"… and {left_out} more; --json lists all", highlight=False)
    rate = report.n_bytes / 1e6 / report.seconds if report.seconds else 0.0
    verdict = "[green]sound[/green]" if report.is_sound else f"[red]{len(report.findings)} findings[/red]"
    console.print(
        f"[bold]{name}[/bold]: {report.n_frames} frames and {report.n_files} files read, {report.n_bytes / 1e6:.1f} MB "
        f"at {rate:.0f} MB/s: {verdict}",
        highlight=False,
        soft_wrap=True,
    )
