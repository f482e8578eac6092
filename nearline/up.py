"""`nearline up`: all that an experiment needs on one machine, brought up, looked after and taken down again.

A Prefect server (if the experiment file names none that is there already), the streaming service, the relay, a
worker for each of the three work pools, and the catch-up. Each is a process of its own that could as well be
started by hand or by systemd (``deployments/one-machine``): this only keeps them running.
"""

import fcntl
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from flows.deploying import default_api, deploy, flow_run_counts
from flows.experiment import Experiment, serve_arguments
from nearline.prefect_server import client_environment, is_healthy, server_environment
from nearline.show import read_status
from nearline.status_view import Sample, render_status
from nearline.supervisor import Program, ProgramStatus, Supervisor
from storage.errors import NearlineError, ServiceUnavailable, SourceBusy
from streaming.client import is_reachable
from streaming.status import ServiceStatus

__all__ = ["Up", "running_pid", "up"]

_LOOK_S = 0.5
_COUNT_S = 5.0
_STATUS_S = 1.0
_MOST_SAID = 6
# What can wait leaves the cores to frames and live analysis.
_GIVES_WAY = 15
_STYLES = {"running": "green", "waiting": "bold red", "stopped": "dim"}


def up(experiment: Experiment, console: Console, *, as_json: bool = False) -> None:
    """Bring all of it up, show how it is until told to stop (Ctrl-C, SIGTERM), and take it down.

    Raises
    ------
    SourceBusy : another `nearline up` looks after this data folder, or a service is at this address already.
    ServiceUnavailable : the Prefect server that the file names does not answer.
    ChildFailed : a program did not come up; the message ends with what it said last.
    """
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    folder = experiment.root / ".up"
    with _only_one(folder):
        view = _Lines(as_json, console) if as_json or not console.is_terminal else _Screen(console)
        Up(experiment, folder, view, stop).run()


def running_pid(root: Path) -> int | None:
    """The process that looks after a data folder; None if nobody does."""
    path = root / ".up" / "lock"
    try:
        with open(path, "rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(path.read_text() or 0) or None
    except FileNotFoundError:
        pass
    return None


@contextmanager
def _only_one(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a+b") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SourceBusy(
                f"`nearline up` runs already for {folder.parent} (pid {running_pid(folder.parent)}); "
                "`nearline down` ends it"
            ) from None
        os.truncate(lock.fileno(), 0)
        lock.write(str(os.getpid()).encode())
        lock.flush()
        yield


@dataclass
class UpStatus:
    """How everything is, for whoever shows it."""

    experiment: str
    ui: str
    service: str
    logs: str
    programs: list[ProgramStatus] = field(default_factory=list)
    flow_runs: dict[str, int] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)
    sample: Sample | None = None
    before: Sample | None = None

    def as_json(self) -> dict[str, Any]:
        names = ("experiment", "ui", "service", "logs", "flow_runs")
        return {name: getattr(self, name) for name in names} | {"programs": [asdict(p) for p in self.programs]}


class Up:
    """One experiment's programs; ``stop`` ends them."""

    def __init__(self, experiment: Experiment, folder: Path, view: "View", stop: threading.Event) -> None:
        self._experiment, self._view, self._stop = experiment, view, stop
        prefect, self._address = experiment.deployment.prefect, experiment.deployment.service.address
        named = prefect.api or os.environ.get("PREFECT_API_URL")
        self._api = named or default_api(prefect.port)
        # One that runs on that port already is used, and left alone at the end.
        self._starts_server = named is None and not is_healthy(self._api)
        if named is None:
            home = Path(prefect.home) if prefect.home else None
            environment = server_environment(home, prefect.port, prefect.database_url)
        else:
            environment = client_environment(named)
        environment |= {"NEARLINE_SERVICE": self._address}
        self._supervisor = Supervisor(environment, folder / "logs")
        ui = environment.get("PREFECT_UI_URL") or self._api.removesuffix("/api")
        self._status = UpStatus(experiment.experiment, ui, self._address, str(folder / "logs"))
        self._counted_at = self._sampled_at = 0.0

    def run(self) -> None:
        """Until told to stop."""
        with self._view:
            try:
                self._start()
                while not self._stop.is_set():
                    self._look()
                    self._stop.wait(_LOOK_S)
            finally:
                self._supervisor.stop_all(self._say)
                self._look_at_programs()
        self._view.finished()

    # ---- starting -----------------------------------------------------------------------------

    def _start(self) -> None:
        if is_reachable(self._address):
            raise SourceBusy(
                f"a service is at {self._address} already; stop it, or name another deployment.service.address"
            )
        if self._starts_server:
            self._begin(self._prefect_server())
        elif not is_healthy(self._api):
            raise ServiceUnavailable(
                f"the Prefect server at {self._api} does not answer; start it, or correct deployment.prefect.api "
                "or PREFECT_API_URL"
            )
        # Frames first: what is analysed can wait.
        self._begin(
            Program("service", ("nearline.cli", "serve", *serve_arguments(self._experiment)), self._has_service)
        )
        if self._stop.is_set():
            return
        changes = deploy(self._experiment, self._api)
        n_changed = sum(change.action in ("created", "updated") for change in changes)
        self._say(f"deployed {self._experiment.experiment}: {n_changed} of {len(changes)} things changed")
        for program in self._programs():
            self._begin(program)
        if not self._stop.is_set():
            self._say(f"everything is up: {self._status.ui}")

    def _begin(self, program: Program) -> None:
        if self._stop.is_set():
            return
        self._say(f"starting {program.name}")
        self._supervisor.start(program, lambda: not self._stop.is_set())
        self._look_at_programs()

    def _prefect_server(self) -> Program:
        port = str(self._experiment.deployment.prefect.port)
        command = ("prefect", "server", "start", "--host", "127.0.0.1", "--port", port)
        return Program("prefect", command, lambda: is_healthy(self._api), patience_s=180.0)

    def _has_service(self) -> bool:
        return is_reachable(self._address)

    def _programs(self) -> Iterator[Program]:
        experiment = self._experiment
        yield Program("relay", ("nearline.cli", "relay", "--root", str(experiment.root)))
        pools, host = experiment.deployment.pools, socket.gethostname()
        for pool, niceness in ((pools.live, 0), (pools.reprocess, _GIVES_WAY), (pools.export, _GIVES_WAY)):
            worker = ("prefect", "worker", "start", "--type", "process", "--pool", pool.name)
            yield Program(f"worker-{pool.name}", (*worker, "--name", f"{host}-{pool.name}"), niceness=niceness)
        if experiment.file is not None:
            yield Program("catch-up", ("nearline.cli", "catch-up", str(experiment.file)))

    # ---- looking ------------------------------------------------------------------------------

    def _look(self) -> None:
        said = self._supervisor.look()
        self._look_at_programs()  # what is said is said with how they are now
        for words in said:
            self._say(words)
        now = time.monotonic()
        if now - self._sampled_at > _STATUS_S:
            self._sampled_at = now
            self._sample_service(now)
        if now - self._counted_at > _COUNT_S:
            self._counted_at = now
            self._count_flow_runs()
        self._view.show(self._status)

    def _sample_service(self, now: float) -> None:
        try:
            sample = Sample(now, ServiceStatus.model_validate(read_status(self._address)))
        except NearlineError:
            return
        self._status.before, self._status.sample = self._status.sample, sample

    def _count_flow_runs(self) -> None:
        try:
            self._status.flow_runs = flow_run_counts(self._experiment.experiment, self._api)
        except ServiceUnavailable:
            self._status.flow_runs = {}

    def _look_at_programs(self) -> None:
        self._status.programs = self._supervisor.statuses()
        self._view.show(self._status)

    def _say(self, words: str) -> None:
        self._status.said = [*self._status.said, f"{datetime.now():%H:%M:%S} {words}"][-_MOST_SAID:]
        self._view.say(words, self._status)


# ---- showing --------------------------------------------------------------------------------------


class View:
    """Shows how it goes; used as a context."""

    def __enter__(self) -> "View":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def say(self, words: str, status: UpStatus) -> None:
        raise NotImplementedError

    def show(self, status: UpStatus) -> None:
        pass

    def finished(self) -> None:
        pass


class _Lines(View):
    """A line for each thing that happens: for log files, and as JSON for scripts."""

    def __init__(self, as_json: bool, console: Console) -> None:
        self._as_json, self._console = as_json, console

    def say(self, words: str, status: UpStatus) -> None:
        if self._as_json:
            print(json.dumps({"at": datetime.now(UTC).isoformat(), "said": words} | status.as_json()), flush=True)
        else:
            self._console.print(f"{datetime.now():%H:%M:%S} {words}", highlight=False, soft_wrap=True, markup=False)


class _Screen(View):
    """A table that is kept up to date."""

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> "View":
        self._live.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._live.__exit__(*exception)

    def say(self, words: str, status: UpStatus) -> None:
        self.show(status)

    def show(self, status: UpStatus) -> None:
        self._live.update(_rendered(status), refresh=True)

    def finished(self) -> None:
        self._live.console.print("everything is down", highlight=False)


def _rendered(status: UpStatus) -> RenderableType:
    table = Table(box=None, padding=(0, 2), title=f"nearline up: {status.experiment}", title_justify="left")
    for name, justify in (("program", "left"), ("state", "left"), ("pid", "right"), ("for", "right"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for one in status.programs:
        words = f"{one.n_restarts} restarts, last exit {one.exit_code}" if one.n_restarts else ""
        seconds = f"{one.seconds:.0f} s" if one.seconds < 600 else f"{one.seconds / 60:.0f} min"
        state = Text(one.state, style=_STYLES[one.state])
        table.add_row(one.name, state, str(one.pid or ""), seconds, words)
    counts = ", ".join(f"{n} {state}" for state, n in status.flow_runs.items()) or "none yet"
    parts: list[RenderableType] = [table, Text(f"flow runs: {counts}   {status.ui}"), Text(f"logs: {status.logs}")]
    if status.sample is not None:
        parts.append(render_status(status.sample, status.before))
    parts += [Text(words, style="dim", overflow="ellipsis", no_wrap=True) for words in status.said]
    parts.append(Text("Ctrl-C takes everything down", style="dim"))
    return Group(*parts)
