"""Service, catalog, Dask, flow and consumers on hosts of their own; a host that is cut off costs time, never frames."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from storage.step_store import Processing
from streaming.retrieval import open_run
from streaming.security import TokenBook, server_keys, service_folder
from tests.streaming.harness import pixels, wait_for

from ..servers import postgres_programs
from .network import Host, HostPostgres, Network, require_namespaces
from .programs import DTYPE

RATE_HZ, LEASE_S = 8.0, 3.0
PROGRAMS = "tests.hosts.programs"
HOSTS = ("service", "catalog", "detector", "scheduler", "worker1", "worker2", "flow", "consumer1", "consumer2")
# A worker that says nothing is given up after so long, not after Dask's five minutes. That it is slow on a busy machine
# is nobody's fault: a chunk may be begun more often than the three times that Dask allows.
DASK = {
    "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": "6s",
    "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "20",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__TCP": "12s",
}

# Other tests beside it starve its eight processes on two cores: Dask then leaves who came back without work.
pytestmark = [pytest.mark.campaign, pytest.mark.timeout(240)]


class Site:
    """The hosts, what runs on them, and the folder they share."""

    def __init__(self, folder: Path, network: Network, catalog_url: str, hosts: dict[str, Host]) -> None:
        self.folder, self.root, self.hosts, self.catalog_url = folder, folder / "data", hosts, catalog_url
        self.address = f"tcp://{hosts['service'].address}:5600"
        self.run = f"{self.address}/lyso/1"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        state = service_folder(self.root)
        state.mkdir(parents=True)
        self._environment = os.environ | {
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "NEARLINE_TOKEN": TokenBook(state).issue("tests", ["lyso"], "write", 600)[0],
            "NEARLINE_SERVER_KEY": server_keys(state).public.decode(),
            **DASK,
        }

    def start(self, host: str, *module: str) -> None:
        """``python -m …`` on a host."""
        with open(self.folder / f"{host}.log", "wb") as log:
            self.processes[host] = subprocess.Popen(
                self.hosts[host].command(sys.executable, "-m", *module),
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
            )

    def start_ours(self, host: str, program: str, **arguments: Any) -> None:
        self.start(host, PROGRAMS, program, json.dumps(arguments))

    def start_all(self) -> None:
        at = {name: host.address for name, host in self.hosts.items()}
        detector, scheduler = f"tcp://{at['detector']}:31001", f"tcp://{at['scheduler']}:8786"
        settings = {
            "root": str(self.root), "bind": self.address, "wants_tokens": True, "encrypts": True, "experiment": "lyso",
            "sources": [{"name": "eiger", "endpoint": detector}], "catalog_url": self.catalog_url,
        }  # fmt: skip
        self.start_ours("service", "serve", settings=settings)
        self.start("scheduler", "dask", "scheduler", "--host", at["scheduler"], "--port", "8786", "--no-dashboard")
        for worker in ("worker1", "worker2"):
            # With a nanny: a worker that was given up ends, and its nanny starts another. What is imported before it is
            # there takes seconds, in which it would not answer.
            folder = str(self.folder / worker)
            options = ["--no-dashboard", "--nthreads", "1", "--local-directory", folder, "--preload", PROGRAMS]
            self.start(worker, "dask", "worker", scheduler, "--host", at[worker], *options)
        for consumer in ("consumer1", "consumer2"):
            log = str(self.folder / f"{consumer}.jsonl")
            self.start_ours(consumer, "follow", run=self.run, group="readers", lease_s=LEASE_S, log=log)
        self.start_ours("flow", "process", run=self.run, scheduler=scheduler, summary=str(self.folder / "summary.json"))
        self.wait_for(lambda: all("Registered to" in self.log(worker) for worker in ("worker1", "worker2")), 90)
        self.start_ours("detector", "detect", bind=detector, rate=RATE_HZ, stop=str(self.folder / "stop"))

    def done_by(self, consumer: str) -> list[dict[str, Any]]:
        path = self.folder / f"{consumer}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def n_done(self) -> int:
        return sum(len(self.done_by(consumer)) for consumer in ("consumer1", "consumer2"))

    def n_chunks(self) -> int:
        return len(list((self.root / "lyso" / "1" / "processed" / "p1" / "chunks").glob("*.json")))

    def wait_for(self, what: Any, timeout: float) -> None:
        def answer() -> Any:
            self.require_alive()
            return what()

        wait_for(answer, timeout)

    def require_alive(self) -> None:
        for name, process in self.processes.items():
            assert process.poll() in (None, 0), f"{name} ended: {self.log(name)}"

    def wait_for_end(self, name: str, timeout: float) -> None:
        try:
            code = self.processes[name].wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} does not come to its end: {self.log(name)}") from None
        assert code == 0, f"{name} failed: {self.log(name)}"

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")[-6000:]

    def stop(self) -> None:
        # Last the scheduler: without one, workers take long to end.
        for names in (self.processes.keys() - {"scheduler"}, {"scheduler"}):
            ending = [process for name, process in self.processes.items() if name in names]
            for process in ending:
                process.terminate()
            for process in ending:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(10)
                process.kill()
                process.wait()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    require_namespaces()
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt install postgresql)")
    pytest.importorskip("distributed")
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(Network())
        hosts = {name: network.host(name) for name in HOSTS}
        catalog = HostPostgres(programs, hosts["catalog"])
        stack.callback(catalog.close)
        site = Site(tmp_path, network, catalog.url, hosts)
        stack.callback(site.stop)
        site.start_all()
        yield site


def test_a_live_run_across_hosts_survives_each_being_cut_off(site: Site) -> None:
    folder, cuts = site.root / "lyso" / "1", {}

    def cut(name: str, seconds: float) -> float:
        began = time.time()
        site.hosts[name].cut_off_for(seconds)
        cuts[name] = (began, time.time())
        return time.time()

    site.wait_for(lambda: site.n_done() > 10 and site.n_chunks() > 1, 120)
    back = cut("worker1", 8.0)
    site.wait_for(lambda: site.hosts["worker1"].number in _at_work(folder, back, time.time()), 60)
    # Longer than its lease: what it had goes to the other.
    back = cut("consumer1", LEASE_S + 2.0)
    site.wait_for(lambda: site.done_by("consumer1")[-1]["at"] > back, 30)
    cut("service", 4.0)
    n_done, n_chunks = site.n_done(), site.n_chunks()
    site.wait_for(lambda: site.n_done() > n_done + 10 and site.n_chunks() > n_chunks, 30)
    (site.folder / "stop").touch()
    for name in ("detector", "consumer1", "consumer2", "flow"):
        site.wait_for_end(name, 60)

    run = open_run(str(folder))
    n_frames = run["eiger"].status.announced
    totals = {index: int(pixels(index, DTYPE).sum()) for index in range(n_frames)}
    assert n_frames > 100
    assert run.ledger()["eiger"].is_balanced
    assert {frame.frame_index: int(frame.data.sum()) for frame in run["eiger"]} == totals
    _check_group(site, totals, *cuts["consumer1"])
    _check_processing(site, totals, *cuts["worker1"])
    _check_catalog(site, run.state.value)


def _check_group(site: Site, totals: dict[int, int], began: float, ended: float) -> None:
    rows = {consumer: site.done_by(consumer) for consumer in ("consumer1", "consumer2")}
    everything = [row for done in rows.values() for row in done]
    assert {row["frame_index"]: row["total"] for row in everything} == totals
    # Twice is what the one had in hand when it was cut off, no more.
    counts = Counter(row["frame_index"] for row in everything)
    assert sum(count - 1 for count in counts.values()) < len(totals) / 4
    assert not any(began + 1.5 < row["at"] < ended for row in rows["consumer1"]), "it was not cut off at all"
    assert any(began < row["at"] < ended for row in rows["consumer2"]), "the other did not go on meanwhile"


def _check_processing(site: Site, totals: dict[int, int], began: float, ended: float) -> None:
    folder, both = site.root / "lyso" / "1", {site.hosts[worker].number for worker in ("worker1", "worker2")}
    table = Processing(folder, "p1").frames
    assert dict(zip(table["frame_index"].to_pylist(), table["total"].to_pylist(), strict=True)) == totals
    assert json.loads((site.folder / "summary.json").read_text())["frames"] == len(totals)
    assert _at_work(folder, 0, began) | _at_work(folder, ended, time.time()) == both
    # What it had computed, it could still write: the folder is no part of the network that was cut.
    assert site.hosts["worker2"].number in _at_work(folder, began, ended), "the other did not go on meanwhile"
    results = open_run(str(folder))["eiger.results@p1"]
    assert {row.frame_index: row.meta["total"] for row in results} == totals
    assert results.ledger().is_balanced


def _at_work(folder: Path, start: float, stop: float) -> set[int]:
    """The hosts that have computed chunks in a time."""
    table = Processing(folder, "p1").frames
    made = zip(table["host"].to_pylist(), table["at"].to_pylist(), strict=True)
    return {host for host, at in made if start < at < stop}


def _check_catalog(site: Site, state: str) -> None:
    # Through the network as well: nothing else leads to this PostgreSQL.
    script = (
        "import sys; from storage.catalog import Catalog; rows = Catalog(sys.argv[1]).runs('lyso'); "
        "print([(row.run, str(row.state)) for row in rows])"
    )
    command = site.hosts["flow"].command(sys.executable, "-c", script, site.catalog_url)
    wait_for(lambda: f"(1, '{state}')".encode() in subprocess.run(command, capture_output=True).stdout, 30)
