"""Runs opened and stopped by whoever steers the experiment: a scan engine, a control system, a person.

Between `start_run` and `stop_run` all detector series of an experiment are one run.
"""

import math
import uuid
from typing import Any

from streaming import wire
from streaming.client import Connection

__all__ = ["start_run", "stop_run"]


def start_run(
    experiment: str,
    run: int | None = None,
    *,
    service: str,
    sample: str | None = None,
    user_data: dict[str, Any] | None = None,
) -> int:
    """Open a run that takes every detector series of the experiment from now on; its number.

    Raises
    ------
    BadName : a run of this experiment is open already, or that number is taken.
    """
    request = wire.StartRun(
        id=0,
        experiment=experiment,
        run=run,
        sample=sample,
        user_data=user_data or {},
        request_key=uuid.uuid4().hex,
        is_open=True,
    )
    return int(_ask(service, request)["run"])


def stop_run(experiment: str, run: int, *, service: str, aborted: str | None = None) -> None:
    """End such a run; returns when its last chunk is sealed.

    Parameters
    ----------
    aborted : why, when this is not a regular end.
    """
    _ask(service, wire.StopRun(id=0, experiment=experiment, run=run, aborted=aborted))


def _ask(service: str, request: Any) -> Any:
    connection = Connection(service)
    try:
        if isinstance(request, wire.StartRun):
            return connection.ask_json(request)
        return connection.ask(request, timeout=math.inf)
    finally:
        connection.close()
