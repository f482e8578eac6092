"""What the commands that look after runs need: finding a run's folder, bars in bytes, results as tables."""

import json
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from storage.files import to_path
from storage.names import parse_run_key
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
