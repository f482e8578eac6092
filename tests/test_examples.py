"""Every example is executed: on a run being taken, a finished one, and a bare folder."""

import runpy
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import nearline
from nearline.children import free_port
from streaming.service import Service, ServiceSettings, SourceSettings
from streaming.simulator import SimulatorSettings, simulate

EXAMPLES = Path(__file__).parent.parent / "examples"
N_FRAMES = 24


@contextmanager
def running_service(root: Path, detector: str) -> Iterator[Service]:
    """A service on free ports that listens to one detector, and is the one programs find."""
    settings = ServiceSettings(
        root=root,
        bind="tcp://127.0.0.1:*",
        sources=(SourceSettings(name="eiger", endpoint=detector),),
        buffer_bytes=64 << 20,
    )
    with Service(settings) as service, pytest.MonkeyPatch.context() as environment:
        environment.setenv("NEARLINE_SERVICE", service.address)
        environment.setenv("DO_NOT_TRACK", "1")
        yield service


def simulated(detector: str, name: str, **options: object) -> SimulatorSettings:
    """A series of small frames that asks to be stored as run ``name``."""
    experiment, _, run = name.rpartition("/")
    values = {"size": "512", "n_frames": N_FRAMES, "rate": 60.0, "hit_fraction": 0.5, "receiver_timeout": 30.0}
    return SimulatorSettings(bind=detector, experiment=experiment, run=int(run), sample="lysozyme", **values | options)


def free_detector() -> str:
    return f"tcp://127.0.0.1:{free_port()}"


def wait_for_end(name: str) -> nearline.Run:
    """The run once its last frame is in; opened through the service."""
    run = nearline.open(name)
    assert sum(1 for _ in run["eiger"].follow(timeout=30)) == len(run["eiger"])
    return run


@pytest.fixture(scope="module")
def detector() -> str:
    return free_detector()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, detector: str) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("data"), detector) as running:
        yield running


@pytest.fixture(scope="module")
def run(service: Service, detector: str) -> nearline.Run:
    """A finished run of simulated lysozyme."""
    simulate(simulated(detector, "lysozyme/1"))
    return wait_for_end("lysozyme/1")


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run an example as a program; its lines."""

    def execute(name: str, *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return execute


def test_read_frames_gives_the_same_finished_and_offline(run, example, monkeypatch) -> None:
    served = example("read_frames.py", run.name)
    monkeypatch.delenv("NEARLINE_SERVICE")
    offline = example("read_frames.py", str(run.folder))

    assert served == offline
    assert [line.split(":")[0] for line in served[1:-1]] == [f"frame {i}" for i in range(N_FRAMES)]
    assert served[-1] == "the ledger balances"


def test_read_frames_follows_a_run_being_taken(service, detector, example) -> None:
    sender = threading.Thread(target=simulate, args=[simulated(detector, "lysozyme/2", rate=20.0)])
    sender.start()
    try:
        while service.recorder.find(("lysozyme", 2, "eiger")) is None:
            sender.join(0.05)
        lines = example("read_frames.py", "lysozyme/2")
    finally:
        sender.join()

    assert "is live" in lines[0]
    assert len(lines) == N_FRAMES + 2


def test_own_step_fills_tables_and_the_results_stream(run, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    summary = nearline.process(run.name, EXAMPLES / "own_step.yaml", n_threads=2)

    frames = run.processings[summary["processing"]].frames
    rows = [frame.meta for frame in run[f"eiger.results@{summary['processing']}"].follow(timeout=10)]
    assert len(frames) == len(rows) == N_FRAMES
    for column in ("n_peaks", "ring_mean", "n_saturated_pixels"):
        assert frames[column].to_pylist() == [row[column] for row in rows]

    mask, radius = run["eiger"].pixel_mask, run["eiger"].geometry.radius_px()
    first = run["eiger"][0].data[(mask == 0) & (radius >= 60) & (radius < 120)]
    assert rows[0]["ring_mean"] == pytest.approx(first.mean())
    assert frames["n_saturated_pixels"].to_pylist() == [0] * N_FRAMES


def test_lysozyme_recipe_indexes_the_simulated_crystal(run) -> None:
    summary = nearline.process(run.name, EXAMPLES / "lysozyme.yaml", n_threads=2)

    assert summary["frames"] == N_FRAMES
    assert summary["hits"] >= 5
    assert summary["indexed"] >= 0.8 * summary["hits"]
    assert all(Path(path).stat().st_size for path in summary["files"].values())
    assert f"eiger.binned@{summary['processing']}" in run


def test_send_frames_arrive_with_their_metadata(service, example) -> None:
    lines = example("send_frames.py", "cameras")

    camera = nearline.open("cameras/1")["camera"]
    assert lines == [f"cameras/1: 20 frames, the last one with {camera[19].meta}"]
    assert [frame.meta["laser_on"] for frame in camera] == [True, False] * 10
    assert camera[0].data.shape == (480, 640)


def test_find_frames_tells_pumped_from_dark(service, detector, example) -> None:
    simulate(simulated(detector, "lysozyme/7"))
    run = wait_for_end("lysozyme/7")
    summary = nearline.process(run.name, EXAMPLES / "lysozyme.yaml", n_threads=2)

    lines = example("find_frames.py", run.name)

    frames = run.processings[summary["processing"]].frames
    rows = zip(frames["frame_index"].to_pylist(), frames["hit"].to_pylist(), frames["n_peaks"].to_pylist(), strict=True)
    hits = {index: n_peaks for index, is_hit, n_peaks in rows if is_hit}
    pumped = [index for index in hits if index % 8 < 4]
    dark = [index for index in hits if index % 8 >= 4]
    assert lines[0] == f"{len(pumped)} pumped and {len(dark)} dark hits in {N_FRAMES} frames"
    sizes = {index: run["eiger"][index].info.size_bytes for index in pumped}
    assert lines[1 : 1 + len(pumped)] == [f"frame {i} was pumped: {sizes[i]} bytes" for i in pumped]
    assert lines[1 + len(pumped) :] == [f"frame {i} was dark: {hits[i]} peaks" for i in dark]


def test_bluesky_says_where_a_run_begins_and_ends(service, detector, example) -> None:
    assert example("bluesky_callback.py") == ["Nearline runs: [1]"]

    run = nearline.open("lyso-2026/1")
    assert (run.header.sample, run.data_sources) == ("lysozyme", [])
    assert run.events("run_finished")[0].payload["cause"] == "no stream was started"
    assert run.metadata["bluesky"]["temperature"] == 100.0


def test_bluesky_puts_all_series_of_a_plan_into_one_run(service, detector) -> None:
    from bluesky import RunEngine, plan_stubs, preprocessors

    runs = runpy.run_path(str(EXAMPLES / "bluesky_callback.py"))["NearlineRuns"]("scans")
    engine = RunEngine()
    engine.subscribe(runs)
    series = simulated(detector, "scans/1", n_frames=5).model_copy(update={"run": None})

    def parts():
        stream = service.recorder.find(("scans", max(runs.runs.values()), "eiger"))
        return stream.series if stream else []

    @preprocessors.run_decorator(md={"plan_args": {"left": "out"}, "purpose": "test"})
    def plan(n_series: int, fails: bool):
        for number in range(1, n_series + 1):
            simulate(series)
            # What has left the detector when a run is stopped must have arrived, as in any plan.
            while [part.is_ended for part in parts()] != [True] * number:
                yield from plan_stubs.sleep(0.02)
        if fails:
            raise RuntimeError("the motor is stuck")

    (scanned,) = engine(plan(3, fails=False))
    with pytest.raises(RuntimeError, match="stuck"):
        engine(plan(1, fails=True))

    first, second = (nearline.open(f"scans/{number}") for number in runs.runs.values())
    assert runs.runs[scanned] == first.header.run
    assert [frame.info.series_frame for frame in first["eiger"]] == [*range(5)] * 3
    assert (first.state, second.state, len(second["eiger"])) == ("completed", "aborted", 5)
    assert first.metadata["bluesky"]["purpose"] == "test"
    assert "plan_args" not in first.metadata["bluesky"]


def test_every_example_is_executed_here() -> None:
    source = Path(__file__).read_text()
    assert [
        p.name for p in EXAMPLES.iterdir() if p.is_file() and p.name not in source and p.name != "own_step.py"
    ] == []
