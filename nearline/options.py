"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from nearline.logs import LogFormat

__all__ = ["AsJson", "Folder", "Logs", "Root", "Service"]

Root = Annotated[Path, typer.Option(envvar="NEARLINE_ROOT", help="Data folder.")]
Folder = Annotated[Path | None, typer.Option(envvar="NEARLINE_ROOT", help="Data folder, without a service.")]
Service = Annotated[
    str | None,
    typer.Option(envvar="NEARLINE_SERVICE", help="Address of the service; by default the one on this machine."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, for scripts.")]
Logs = Annotated[LogFormat, typer.Option(help="Log lines for people, or one JSON object a line for a collector.")]
