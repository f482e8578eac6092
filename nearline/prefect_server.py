"""A Prefect server of our own on loopback: settings that suit many short tasks and no network."""

import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

from storage.errors import ServiceUnavailable

__all__ = ["client_environment", "is_healthy", "server_environment", "wait_until_healthy"]

# Batches and short polls: the defaults record a task seconds after it has ended and look for
# new work every ten.
_SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_READ_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_FLUSH_INTERVAL": "1",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_BATCH_SIZE": "200",
    "PREFECT_SERVER_SERVICES_EVENT_PERSISTER_READ_BATCH_SIZE": "200",
    "PREFECT_RUNNER_POLL_FREQUENCY": "1",
    "PREFECT_WORKER_QUERY_SECONDS": "1",
    # Our own log lines belong to the flow run's page.
    "PREFECT_LOGGING_EXTRA_LOGGERS": "nearline",
}


def server_environment(home: Path | None, port: int, database_url: str | None = None) -> dict[str, str]:
    """Environment of a server on that port, and of programs that use it.

    Parameters
    ----------
    home : folder of its database and settings; None for Prefect's own.
    database_url : as SQLAlchemy writes it; None for SQLite in ``home``.
    """
    address = f"http://127.0.0.1:{port}"
    places = {"PREFECT_HOME": home, "PREFECT_SERVER_DATABASE_CONNECTION_URL": database_url}
    return client_environment(f"{address}/api") | {"PREFECT_UI_URL": address} | _given(places)


def client_environment(api: str) -> dict[str, str]:
    """Environment of programs that use the server at that address."""
    return {**os.environ, **_SETTINGS, "PREFECT_API_URL": api}


def _given(places: Mapping[str, object]) -> dict[str, str]:
    return {name: str(value) for name, value in places.items() if value is not None}


def wait_until_healthy(port: int, timeout: float, check: Callable[[], None]) -> None:
    """Return once the server answers; ``check`` is called meanwhile and may raise."""
    deadline = time.monotonic() + timeout
    while not is_healthy(f"http://127.0.0.1:{port}/api"):
        check()
        if time.monotonic() > deadline:
            raise ServiceUnavailable(f"the Prefect server on port {port} did not answer in {timeout:g} s")
        time.sleep(0.25)


def is_healthy(api: str) -> bool:
    """Whether a server answers at an API address such as ``http://127.0.0.1:4200/api``."""
    try:
        with urllib.request.urlopen(f"{api}/health", timeout=3):
            return True
    except urllib.error.HTTPError:
        return True  # it answers, if only to ask for credentials
    except (urllib.error.URLError, OSError, ValueError):
        return False
