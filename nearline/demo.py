"""`nearline demo`: the whole way of a run on one command, with everything it needs started and ended.

A Prefect server, the service, a detector (simulated, or files replayed) and the flow each run as
a process of their own, as they would at a beamline; this one watches and checks.
"""

import json
import os
import shlex
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

import nearline
from nearline import show
from nearline.children import ChildFailed, Children, free_port
from nearline.prefect_server import server_environment, wait_until_healthy
from nearline.truth import Comparison, compare_with_truth
from storage.errors import NearlineError
from storage.models import Model
from storage.states import StreamLedger
from storage.step_store import Processing, find_processings
from streaming.simulator import SimulatorSettings
from tasks.unit_cell import UnitCell, read_cell

__all__ = ["DemoSettings", "run_demo"]

_SOURCE = "eiger"
_LOOK_S = 0.25
# A whole run of a few hundred frames takes well under a minute; this is for machines in trouble.
_TOO_LONG_S = 600.0


class DemoSettings(Model):
    """What `nearline demo` can be told."""

    folder: Path
    real: Path | None = None
    cell: str | None = None
    space_group: str | None = None
    n_frames: int = 300
    rate: float = 20.0
    size: str = "4M"
    keep: bool = False

    @property
    def experiment(self) -> str:
        return "real" if self.real else "lysozyme"

    @property
    def unit_cell(self) -> UnitCell | None:
        """The cell to index with; lysozyme's for the simulated crystal."""
        if self.real:
            return show.read_unit_cell(self.cell, self.space_group)
        defaults = SimulatorSettings()
        return read_cell(defaults.cell, defaults.space_group)


@dataclass
class _Seconds:
    """Wall time of each stage."""

    stages: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=time.perf_counter)

    def done(self, stage: str) -> None:
        now = time.perf_counter()
        self.stages[stage] = round(now - self._since, 2)
        self._since = now


@dataclass
class _View:
    """What the screen shows while the run travels."""

    lines: list[str] = field(default_factory=list)
    total: int = 0
    sent: int = 0
    stored: int = 0
    processed: int = 0
    hits: int = 0
    indexed: int = 0

    def __rich__(self) -> Group:
        table = Table.grid(padding=(0, 2))
        for name, value in (("frames in", self.sent), ("stored", self.stored), ("processed", self.processed)):
            bar = ProgressBar(total=max(self.total, 1), completed=value, width=40)
            table.add_row(name, bar, f"{value} / {self.total}" if self.total else str(value))
        hit_rate = f"{100 * self.hits / self.processed:.1f} % of frames" if self.processed else "–"
        indexing = f"{100 * self.indexed / self.hits:.1f} % of hits" if self.hits else "–"
        rates = f"hit rate {hit_rate}   indexing rate {indexing}   lag {max(self.stored - self.processed, 0)} frames"
        return Group(*self.lines, table, rates, "")


def run_demo(settings: DemoSettings, console: Console, *, as_json: bool = False) -> bool:
    """Run the demo; True if every frame is accounted for and the results agree with the truth.

    With ``as_json`` the last line of standard output is one JSON object; see docs/demo.md for its keys.
    """
    stop = threading.Event()
    previous = {n: signal.signal(n, lambda *_: stop.set()) for n in (signal.SIGINT, signal.SIGTERM)}
    children = Children(settings.folder / "logs")
    demo = _Demo(settings, console, children, stop)
    try:
        return demo.run(as_json=as_json)
    except _Interrupted:
        console.print("interrupted; ending everything", highlight=False)
        return False
    except ChildFailed as error:
        console.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
        return False
    finally:
        children.stop_all()
        for number, handler in previous.items():
            signal.signal(number, handler)


class _Interrupted(Exception):
    """Ctrl-C, or a request to end."""


class _Demo:
    def __init__(self, settings: DemoSettings, console: Console, children: Children, stop: threading.Event) -> None:
        self._settings, self._console, self._children, self._stop = settings, console, children, stop
        self._root = settings.folder / "data"
        self._root.mkdir(parents=True, exist_ok=True)
        self._number = show.newest_run(settings.experiment, self._root) + 1
        self._run_name = f"{settings.experiment}/{self._number}"
        self._truth = settings.folder / f"truth-{self._number}.parquet"
        self._prefect_port, service_port, detector_port = free_port(), free_port(), free_port()
        self._service = f"tcp://127.0.0.1:{service_port}"
        self._detector = f"tcp://127.0.0.1:{detector_port}"
        self._environment = server_environment(settings.folder / "prefect", self._prefect_port)
        self._seconds = _Seconds()
        self._view = _View()

    def run(self, *, as_json: bool) -> bool:
        self._introduce()
        with Live(self._view, console=self._console, refresh_per_second=8, transient=False):
            self._start_servers()
            self._seconds.done("start")
            self._start_run()
            self._watch()
            self._seconds.done("run")
            self._say("checking the results")
            result = self._result()
            self._seconds.done("check")
        self._summarise(result)
        if as_json:
            # Standard output, whatever the console writes to.
            print(json.dumps(result.as_json(self._seconds.stages), default=str), flush=True)
        if self._settings.keep:
            self._keep()
        return result.is_good

    # ---- starting -----------------------------------------------------------------------------

    def _introduce(self) -> None:
        what = f"files from {self._settings.real}" if self._settings.real else "a simulated lysozyme run"
        self._console.print(
            f"[bold]Nearline demo[/bold]: {what}, detector → service → Zarr → Prefect flow → NeXus, "
            f"as run [bold]{self._run_name}[/bold]",
            highlight=False,
        )

    def _start_servers(self) -> None:
        say, start = self._say, self._children.start
        say(f"Prefect server on http://127.0.0.1:{self._prefect_port}")
        port = str(self._prefect_port)
        command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", port]
        start("prefect", command, self._environment)
        say(f"service on {self._service}, writing {self._root}")
        start("service", self._command("serve", *self._serve_options()), self._environment)
        self._wait_for(lambda: self._status() is not None, "service")
        if not self._settings.real:
            say("detector: making frames, then sending them as DECTRIS stream v2")
            start("detector", self._command("simulate", *self._simulate_options()), self._environment)
        wait_until_healthy(self._prefect_port, 120, lambda: self._check("prefect"))

    def _start_run(self) -> None:
        """The flow first: it waits for the run to begin."""
        self._say("flow: process-run, one task for each chunk and group of steps")
        self._children.start("flow", self._command("process", *self._process_options()), self._environment)
        if self._settings.real:
            self._say("detector: replaying the files as DECTRIS stream v2")
            self._children.start("detector", self._command("replay", *self._replay_options()), self._environment)

    def _command(self, *arguments: str) -> list[str]:
        return ["nearline.cli", *arguments]

    def _serve_options(self) -> list[str]:
        return [
            "--root", str(self._root), "--bind", self._service, "--source", f"{_SOURCE}={self._detector}",
            "--experiment", self._settings.experiment, "--buffer", "0.5",
        ]  # fmt: skip

    def _simulate_options(self) -> list[str]:
        s = self._settings
        return [
            "--size", s.size, "--frames", str(s.n_frames), "--rate", str(s.rate), "--bind", self._detector,
            "--hit-fraction", "0.4", "--experiment", s.experiment, "--run", str(self._number),
            "--sample", "lysozyme", "--seed", str(self._number), "--truth", str(self._truth),
        ]  # fmt: skip

    def _replay_options(self) -> list[str]:
        s = self._settings
        return [
            str(s.real), "--rate", str(s.rate), "--bind", self._detector,
            "--experiment", s.experiment, "--run", str(self._number),
        ]  # fmt: skip

    def _process_options(self) -> list[str]:
        options = [self._run_name, "--service", self._service, "--wait", "180", "--prefect", "--json"]
        cell = self._settings.unit_cell
        if cell is not None:
            options += ["--cell", ",".join(f"{v:g}" for v in cell.parameters), "--space-group", cell.space_group]
        return options

    # ---- watching -----------------------------------------------------------------------------

    def _watch(self) -> None:
        """Follow the run on the screen until the flow has ended."""
        deadline = time.monotonic() + _TOO_LONG_S
        flow = self._children.process("flow")
        while flow.poll() is None:
            self._look()
            for name in ("service", "detector", "prefect", "flow"):
                self._check(name)
            if time.monotonic() > deadline:
                raise ChildFailed(
                    f"the demo took longer than {_TOO_LONG_S:g} s; see the logs in {self._settings.folder}"
                )
            self._pause()
        self._check("flow")
        self._look()

    def _look(self) -> None:
        status = self._status()
        mine = [s for s in (status or {}).get("streams", []) if (s["run"], s["data_source"]) == (self._number, _SOURCE)]
        if mine:
            self._view.total = mine[0]["planned"]
            self._view.sent, self._view.stored = mine[0]["announced"], mine[0]["stored"]
        processing = self._processing()
        if processing is not None:
            chunks = list(processing.chunks())
            self._view.processed = sum(c.n_frames for c in chunks)
            self._view.hits, self._view.indexed = sum(c.n_hits for c in chunks), sum(c.n_indexed for c in chunks)

    def _status(self) -> dict[str, Any] | None:
        """The service's status, or None while it does not answer."""
        try:
            return show.read_status(self._service)
        except NearlineError:
            return None

    def _processing(self) -> Processing | None:
        found = find_processings(self._root / self._settings.experiment / str(self._number))
        return next(reversed(found.values()), None)

    def _wait_for(self, is_there: Any, child: str) -> None:
        deadline = time.monotonic() + 60
        while not is_there():
            self._check(child)
            if time.monotonic() > deadline:
                raise ChildFailed(f"{child} did not get ready in 60 s; see {self._children.log(child)}")
            self._pause()

    def _check(self, child: str) -> None:
        if self._stop.is_set():
            raise _Interrupted
        self._children.check(child)

    def _pause(self) -> None:
        if self._stop.wait(_LOOK_S):
            raise _Interrupted

    def _say(self, line: str) -> None:
        self._view.lines.append(f"  {line}")

    # ---- the end ------------------------------------------------------------------------------

    def _result(self) -> "_Result":
        run = nearline.open(self._run_name, service=self._service)
        processing = run.processings[next(reversed(run.processings))]
        comparison = None
        cell = self._settings.unit_cell
        if not self._settings.real and cell is not None:
            comparison = compare_with_truth(processing, self._truth, cell)
        stream = run[_SOURCE]
        files = {f.frame_index: f.meta.get("source_file") for f in stream} if self._settings.real else {}
        return _Result(
            self._settings.experiment,
            self._number,
            run.state.value,
            run.folder,
            stream.ledger(),
            processing,
            processing.summary or {},
            comparison,
            files,
        )

    def _summarise(self, result: "_Result") -> None:
        summary, ledger = result.summary, result.ledger
        colour = "green" if result.is_good else "red"
        title = result.verdict if result.is_good else "; ".join(result.problems)
        self._print(f"\n[{colour} bold]{self._run_name}: {title}[/]")
        verdict = "balances" if ledger.is_balanced else "[red]does not balance[/red]"
        rows = [("ledger", f"{verdict}: {ledger.stored} of {ledger.planned} stored, {ledger.missing} missing")]
        rows += result.rates()
        rows += [("run folder", str(result.folder))]
        rows += [(name.replace("_", " "), path) for name, path in summary["files"].items()]
        rows += [("pictures", os.path.dirname(summary["pictures"][0]))] if summary["pictures"] else []
        rows += [("Prefect UI", str(summary["flow_run_url"]) + ("" if self._settings.keep else "  (up with --keep)"))]
        for name, text in rows:
            self._print(f"  {name:16} {text}")
        self._print("To go on:")
        for line in self._next_lines(result):
            self._print(f"  {line}")

    def _print(self, line: str) -> None:
        """One line, however long: paths are for copying."""
        self._console.print(line, highlight=False, soft_wrap=True)

    def _next_lines(self, result: "_Result") -> list[str]:
        folder = _short(result.folder)
        command, python = _short(Path(sys.executable).parent / "nearline"), _short(Path(sys.executable))
        return [
            f"{command} info {folder}",
            f"{python} -c \"import nearline; print(nearline.open('{folder}')['{_SOURCE}'][0].data.shape)\"",
            f"export NEARLINE_SERVICE={self._service}   # then `{command} status`, `{command} runs`"
            if self._settings.keep
            else f"{command} demo --keep{self._real_options()}   # again, with the Prefect UI left up to look around",
        ]

    def _real_options(self) -> str:
        s = self._settings
        values: dict[str, Any] = {"--real": s.real, "--cell": s.cell, "--space-group": s.space_group}
        if s.folder != Path("build/demo").absolute():
            values["--folder"] = _short(s.folder)
        return "".join(f" {name} {shlex.quote(str(value))}" for name, value in values.items() if value)

    def _keep(self) -> None:
        self._console.print(
            f"\nStill running: Prefect UI http://127.0.0.1:{self._prefect_port}, service {self._service}. "
            "[bold]Ctrl-C[/bold] ends both.",
            highlight=False,
        )
        while not self._stop.wait(0.5):
            for name in ("service", "prefect"):
                self._children.check(name)


@dataclass(frozen=True)
class _Result:
    """What came out, and whether it is as it should be."""

    experiment: str
    run: int
    state: str
    folder: Path
    ledger: StreamLedger
    processing: Processing
    summary: dict[str, Any]
    comparison: Comparison | None
    source_files: dict[int, str | None]

    @property
    def problems(self) -> list[str]:
        found = list(self.ledger.problems)
        if self.state != "completed":
            found.append(f"the run is {self.state}, not completed")
        if self.summary["frames"] != self.ledger.stored:
            found.append(f"{self.summary['frames']} frames processed of {self.ledger.stored} stored")
        return found + (self.comparison.problems if self.comparison else [])

    @property
    def is_good(self) -> bool:
        return not self.problems

    @property
    def verdict(self) -> str:
        return "everything agrees with the truth" if self.comparison else "every frame is accounted for"

    def rates(self) -> list[tuple[str, str]]:
        """Hits and lattices in words, against the truth where it is known."""
        s, t = self.summary, self.comparison
        if t is None:
            return [
                ("hits", f"{s['hits']} of {s['frames']} frames ({100 * s['hit_rate']:.1f} %)"),
                ("indexed", f"{s['indexed']} of {s['hits']} hits ({100 * s['indexing_rate']:.1f} %)"),
            ]
        return [
            ("hits", f"{t.found_hits} of {t.true_hits} true hits found, {t.false_hits} false, in {t.n_frames} frames"),
            ("indexed", f"{t.correct} correct within 0.3° and 1 % of the cell, {t.wrong} wrong, of {s['hits']} hits"),
        ]

    def as_json(self, seconds: dict[str, float]) -> dict[str, Any]:
        s, t = self.summary, self.comparison
        cells = {row["frame_index"]: row for row in self._crystals()}
        frames = [
            {
                "frame_index": row["frame_index"],
                "n_peaks": row["n_peaks"],
                "hit": row["hit"],
                "indexed": row.get("indexed", False),
                "cell": _cell_of(cells.get(row["frame_index"])),
                "source_file": self.source_files.get(row["frame_index"]),
            }
            for row in self.processing.frames.to_pylist()
        ]
        return {
            "experiment": self.experiment,
            "run": self.run,
            "state": self.state,
            "is_good": self.is_good,
            "problems": self.problems,
            "ledger": self.ledger.model_dump(mode="json") | {"is_balanced": self.ledger.is_balanced},
            "hits": {
                "true": t.true_hits if t else None,
                "found": t.found_hits if t else s["hits"],
                "false": t.false_hits if t else None,
            },
            "indexed": {
                "correct": t.correct if t else None,
                "wrong": t.wrong if t else None,
                "frames": s["indexed"],
            },
            "frames": frames,
            "folder": str(self.folder),
            "files": s["files"],
            "flow_run_url": s["flow_run_url"],
            "seconds": seconds | {f"process.{name}": value for name, value in s["seconds_by_stage"].items()},
        }

    def _crystals(self) -> list[dict[str, Any]]:
        try:
            rows: list[dict[str, Any]] = self.processing.crystals.to_pylist()
        except KeyError:  # a recipe without indexing
            return []
        return [row for row in rows if row["crystal"] == 0]


def _short(path: Path) -> str:
    """A path as one would type it here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _cell_of(row: dict[str, Any] | None) -> list[float] | None:
    """[a, b, c, alpha, beta, gamma] in Å and degrees."""
    return [round(row[name], 4) for name in ("a", "b", "c", "alpha", "beta", "gamma")] if row else None
