"""`nearline relay`: what carries news of runs to Prefect."""

import signal
import threading
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nearline.logs import configure_logs
from nearline.options import Logs, Root

__all__ = ["relay"]


def relay(
    root: Root = Path("nearline-data"),
    once: Annotated[bool, typer.Option("--once", help="Carry what is there, and stop.")] = False,
    log_format: Logs = "text",
) -> None:
    """Carry news of runs (started, chunk sealed, finished, ledger imbalance) to the Prefect server as events.

    The server is that of PREFECT_API_URL. While it is away the news waits in the data folder, and frames
    flow on. Stop it with Ctrl-C; it goes on where it was, and tells nothing twice.
    """
    from flows.relay_events import relay_events

    configure_logs(Console(stderr=True), log_format=log_format)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    relay_events(root.absolute(), stop, once=once)
