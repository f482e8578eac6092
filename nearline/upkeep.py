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
from storage.errors import NearlineError
from storage.files import file_sizes, to_path
from storage.names import parse_run_key, run_key
from storage.run_folder import RunFolder


def run_folder(run: str, root: Path | None) -> RunFolder:
    """The folder of a run named by its path or URL, or as experiment/number below a data folder."""
    is_path = run.startswith((".", "/")) or run.count("/") > 1
    if is_path or (root is None and (to_path(run) / "run.json").exists()):
        return RunFolder.open(run)
    experiment, number = parse_run_key(run)
    return RunFolder.open((root or Path("nearline-data")) / experiment / str(number))


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
    from sqlalchemy.exc import SQLAlchemyError

    from storage.catalog import Catalog, default_url

    if catalog is None and not (root / "catalog.sqlite").exists():
        return
    index = Catalog(catalog or default_url(root))
    try:
        for folder in folders:
            index.record(folder)
    except (SQLAlchemyError, NearlineError) as error:
        errors.print(f"the catalog is behind (`nearline catalog rebuild` brings it up): {error}", highlight=False)
    finally:
        index.close()


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
