"""What Prefect costs: `process_run` beside `run_processing` on the same chunks, and a live flow of half an hour."""

import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from prefect.settings import PREFECT_API_URL, temporary_settings

from benchmarks.analysis import recipe_for
from benchmarks.frames import EXPERIMENT, FrameSet, Options, WorkFolder, stored_run
from benchmarks.measure import Figure, Target, figure, in_rounds
from flows.process_run import process_run
from flows.run_processing import ProcessRequest, run_processing
from nearline.children import Children, free_port
from nearline.prefect_server import server_environment, wait_until_healthy
from storage.run_folder import RunFolder
from storage.step_store import find_processings

__all__ = ["measure", "measure_beside", "measure_fast", "measure_long", "measure_many"]

log = logging.getLogger("benchmarks")

# Seconds of detector time in a chunk, by default.
CHUNK_S = 2.0
_FRAMES_PER_CHUNK = 10
_MOST_SHARE = 5.0
_LIVE_RATE = 20
_SAMPLE_S = 5.0
_FINISHED_RUNS, _FINISHED_CHUNKS = range(1, 6), 60
# Caches fill and pages are touched before that.
_WARM_SHARE = 0.25
_STARTING_S = 180.0


def measure(options: Options) -> list[Figure]:
    """Time per chunk with tasks, states and artifacts, less the time without, as a share of a chunk's length.

    Frames are small and few: what Prefect does for a chunk does not depend on them.
    """
    n_chunks = options.choose(5, 60)
    frames = FrameSet.make("512", 32)
    recipe = recipe_for(frames).model_dump(mode="json")
    extra, of_processor, of_server, plain = [], [], [], []
    with WorkFolder(options, "flow") as root, _prefect_server(root) as server:
        for number in in_rounds(options.choose(2, 5)):
            by_kind = {}
            for kind in ("plain", "flow") if number % 2 else ("flow", "plain"):
                folder = _new_run(root, frames, n_chunks)
                by_kind[kind] = _timed(kind, folder, recipe, server)
            if number == 0:  # kernels are compiled, modules imported
                continue
            flow, alone = by_kind["flow"], by_kind["plain"]
            extra.append(1e3 * (flow.wall_s - alone.wall_s) / n_chunks)
            of_processor.append(1e3 * (flow.cpu_s - alone.cpu_s) / n_chunks)
            of_server.append(1e3 * flow.server_cpu_s / n_chunks)
            plain.append(1e3 * alone.wall_s / n_chunks)
    share = [ms / (10 * CHUNK_S) for ms in extra]
    return [
        figure(
            "Prefect's share of a live flow, 2 s chunks",
            "%",
            share,
            higher_is_better=False,
            target=Target("at most", _MOST_SHARE),
        ),
        figure(
            "process-run beside run_processing, per chunk",
            "ms",
            extra,
            ("the chunk without Prefect", plain),
            higher_is_better=False,
        ),
        figure("of it processor time of the flow", "ms", of_processor, higher_is_better=False),
        figure("processor time of the Prefect server, per chunk", "ms", of_server, higher_is_better=False),
    ]


def measure_long(options: Options) -> list[Figure]:
    """Half an hour of a live run in chunks of 2 s through service and flow: does memory or lag grow?"""
    seconds = options.choose(60, 1800)
    with WorkFolder(options, "flow-30min") as root, _prefect_server(root) as server:
        samples = list(_live_flow(root, server, seconds))
    done = figure(
        f"chunks of a live flow of {seconds / 60:g} min", "chunks", [float(samples[-1].n_done)], higher_is_better=True
    )
    return [done, *_growth(samples)]


def measure_many(options: Options) -> list[Figure]:
    """50,000 frames of 1M at 100/s, a fifth of them hits, fully analysed: does memory or lag grow?"""
    of = _Detector("1M", 100, 0.2)
    n_frames = options.choose(1000, 50_000)
    with WorkFolder(options, "flow-50000") as root, _prefect_server(root) as server:
        samples = list(_live_flow(root, server, n_frames // of.rate, of))
    took = samples[-1].at_s - samples[0].at_s
    done = figure(
        f"{n_frames} frames of 1M at {of.rate}/s: analysed", "frames/s", [n_frames / took],
        ("taken", [float(of.rate)]), higher_is_better=True,
    )  # fmt: skip
    return [done, *_growth(samples)]


def _growth(samples: list["_Sample"]) -> list[Figure]:
    """Of memory and lag, once caches are full."""
    warm = samples[int(_WARM_SHARE * len(samples)) :]
    half = len(warm) // 2
    memory = [s.memory_mib for s in warm]
    growth = statistics.median(memory[half:]) - statistics.median(memory[:half])
    lag = [float(s.lag_chunks) for s in warm]
    later = statistics.mean(lag[half:]) - statistics.mean(lag[:half])
    small, none = Target("at most", 20.0), Target("at most", 1.0)
    return [
        figure("memory of the flow process", "MiB", memory, higher_is_better=False),
        figure("its growth, second half less first", "MiB", [growth], higher_is_better=False, target=small),
        figure("chunks sealed and not processed yet", "chunks", lag, higher_is_better=False, target=none),
        figure("their growth, second half less first", "chunks", [later], higher_is_better=False),
    ]


def measure_fast(options: Options) -> list[Figure]:
    """4M frames at 60/s, a fifth of them hits, beside service and simulator: does the analysis keep up?"""
    of = _Detector("4M", 60, 0.2)
    seconds = options.choose(10, 60)
    with WorkFolder(options, "flow-4M") as root, _prefect_server(root) as server:
        samples = list(_live_flow(root, server, seconds, of))
    n_all = seconds * of.rate
    while_taken = [s for s in samples if s.n_sealed < max(one.n_sealed for one in samples)] or samples
    half = len(while_taken) // 2
    lag = [float(s.lag_chunks) for s in while_taken]
    later = statistics.mean(lag[half:]) - statistics.mean(lag[:half] or lag)
    took = samples[-1].at_s - samples[0].at_s
    return [
        figure(f"{n_all} frames of 4M at 60/s: analysed", "frames/s", [n_all / took], (
            "taken", [float(of.rate)]), higher_is_better=True, target=Target("of limit", 0.95)),
        figure("its lag while frames come, second half less first", "chunks", [later], higher_is_better=False,
               target=Target("at most", 1.0)),
        figure("its lag", "chunks", [float(s.lag_chunks) for s in samples], higher_is_better=False),
        figure("memory of the flow process", "MiB", [s.memory_mib for s in samples], higher_is_better=False),
    ]  # fmt: skip


def measure_beside(options: Options) -> list[Figure]:
    """A live flow alone, and with five finished runs being processed anew beside it, as the pool `reprocess` does."""
    seconds = options.choose(40, 240)
    frames = FrameSet.make("512", 32)
    with WorkFolder(options, "flow-beside") as root, _prefect_server(root) as server:
        for run in _FINISHED_RUNS:
            stored_run(root / "finished", frames, run, _FINISHED_CHUNKS * _FRAMES_PER_CHUNK, _FRAMES_PER_CHUNK)
        half_at, other = time.monotonic() + seconds / 2, None
        alone, beside = [], []
        for sample in _live_flow(root, server, seconds):
            if other is None and time.monotonic() > half_at:
                other = _start_reprocessing(root, frames, server)
            if other is None:
                alone.append(float(sample.lag_chunks))
            elif other.poll() is None:
                beside.append(float(sample.lag_chunks))
        n_processed = sum(1 for run in _FINISHED_RUNS for _ in _done_chunks(root / "finished" / EXPERIMENT / str(run)))
        if not n_processed or not beside:
            raise RuntimeError(f"nothing was reprocessed:\n{server.children.log('reprocess').read_text()[-3000:]}")
    more = statistics.mean(beside) - statistics.mean(alone)
    return [
        figure("lag of a live flow, mean over 5 s each", "chunks", alone, higher_is_better=False),
        figure("its lag beside reprocessing", "chunks", beside, higher_is_better=False),
        figure("more of it on average", "chunks", [more], higher_is_better=False, target=Target("at most", 1.0)),
        figure("chunks reprocessed meanwhile", "chunks", [float(n_processed)], higher_is_better=True),
    ]


def _start_reprocessing(root: Path, frames: FrameSet, server: "_Server") -> "subprocess.Popen[bytes]":
    """Like a worker of that pool: a process of its own that gives way."""
    runs = [f"{EXPERIMENT}/{run}" for run in _FINISHED_RUNS]
    arguments = f"{runs!r}, {recipe_for(frames).model_dump(mode='json')!r}, root={str(root / 'finished')!r}"
    script = f"from flows.reprocess_runs import reprocess_runs; reprocess_runs({arguments})"
    command = ["benchmarks.program", "nice", "-n", "15", sys.executable, "-c", script]
    return server.children.start("reprocess", command, server.environment)


# ---- one processing -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Spent:
    wall_s: float
    cpu_s: float
    server_cpu_s: float


def _new_run(root: Path, frames: FrameSet, n_chunks: int) -> Path:
    """A run that nobody has processed; a processed one would find its results again."""
    shutil.rmtree(root / EXPERIMENT, ignore_errors=True)
    return stored_run(root, frames, 1, n_chunks * _FRAMES_PER_CHUNK, _FRAMES_PER_CHUNK).path


def _timed(kind: str, folder: Path, recipe: dict[str, Any], server: "_Server") -> _Spent:
    before, cpu, of_server = time.perf_counter(), time.process_time(), server.cpu_s()
    if kind == "plain":
        run_processing(ProcessRequest(run=str(folder), recipe=recipe))
    else:
        with temporary_settings({PREFECT_API_URL: server.api}):
            process_run(str(folder), recipe)
    return _Spent(time.perf_counter() - before, time.process_time() - cpu, server.cpu_s() - of_server)


@dataclass(frozen=True)
class _Server:
    """A Prefect server of our own."""

    api: str
    environment: dict[str, str]
    process: psutil.Process
    children: Children

    def cpu_s(self) -> float:
        """Processor time that it and its children have used, s."""
        return sum(sum(p.cpu_times()[:2]) for p in (self.process, *self.process.children(recursive=True)))


@contextmanager
def _prefect_server(root: Path) -> Iterator[_Server]:
    port = free_port()
    environment = server_environment(root / "prefect", port)
    children = Children(root / "logs")
    command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    try:
        process = psutil.Process(children.start("prefect", command, environment).pid)
        wait_until_healthy(port, 120, lambda: children.check("prefect"))
        yield _Server(environment["PREFECT_API_URL"], environment, process, children)
    finally:
        children.stop_all()


# ---- a live flow --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sample:
    """at_s : of any clock. lag_chunks : sealed and not processed. memory_mib : of the flow process and its children."""

    at_s: float
    n_done: int
    n_sealed: int
    memory_mib: float

    @property
    def lag_chunks(self) -> int:
        return self.n_sealed - self.n_done


@dataclass(frozen=True)
class _Detector:
    """rate : frames/s."""

    size: str = "512"
    rate: int = _LIVE_RATE
    hit_fraction: float = 0.3


def _live_flow(root: Path, server: _Server, seconds: int, of: _Detector | None = None) -> Iterator[_Sample]:
    data, detector, service = root / "data", *(f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    of = of or _Detector()
    recipe = root / "recipe.json"
    recipe.write_text(json.dumps(recipe_for(FrameSet.make(of.size, 4)).model_dump(mode="json")))
    cli, start = "nearline.cli", server.children.start
    start("service", [cli, "serve", "--root", str(data), "--bind", service, "--source", f"eiger={detector}",
                      "--experiment", EXPERIMENT], server.environment)  # fmt: skip
    frames = ["--size", of.size, "--rate", str(of.rate), "--frames", str(seconds * of.rate)]
    start("detector", [cli, "simulate", "--bind", detector, *frames, "--hit-fraction", str(of.hit_fraction),
                       "--experiment", EXPERIMENT], os.environ)  # fmt: skip
    flow = start("flow", [cli, "process", f"{EXPERIMENT}/1", "--service", service, "--wait", str(int(_STARTING_S)),
                          "--recipe", str(recipe), "--prefect"], server.environment)  # fmt: skip
    deadline = time.monotonic() + 2 * seconds + _STARTING_S
    folder = data / EXPERIMENT / "1"
    while flow.poll() is None and time.monotonic() < deadline:
        time.sleep(_SAMPLE_S)
        if flow.poll() is None and (sample := _sample(folder, psutil.Process(flow.pid))) is not None:
            log.info("%s", sample)
            yield sample
    if flow.returncode != 0:
        raise RuntimeError(f"the flow ended with {flow.returncode}:\n{server.children.log('flow').read_text()[-3000:]}")
    for name in ("detector", "service"):
        server.children.stop(name)


def _done_chunks(folder: Path) -> Iterator[Path]:
    for processing in find_processings(folder).values():
        yield from (processing.folder / "chunks").glob("[0-9]*.json")


def _sample(folder: Path, flow: psutil.Process) -> _Sample | None:
    processings = find_processings(folder)
    if not processings:
        return None
    n_sealed = len(RunFolder.open(folder).stream("eiger").commits())
    n_done = sum(1 for _ in _done_chunks(folder))
    memory = sum(p.memory_info().rss for p in (flow, *flow.children(recursive=True)))
    return _Sample(time.monotonic(), n_done, n_sealed, memory / (1 << 20))
