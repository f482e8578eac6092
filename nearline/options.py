"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["AsJson", "Root", "Service"]

Root = Annotated[Path, typer.Option(envvar="NEARLINE_ROOT", help="Data folder.")]
Service = Annotated[
    str | None,
    typer.Option(envvar="NEARLINE_SERVICE", help="Address of the service; by default the one on this machine."),
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, for scripts.")]
