"""A simulated run that real sockets brought into a real service, and a real Prefect server."""

import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from nearline.children import Children, free_port
from nearline.prefect_server import server_environment, wait_until_healthy
from storage.errors import RunNotFound
from streaming.retrieval import Run, open_run
from streaming.service import Service, ServiceSettings, SourceSettings
from streaming.simulator import SimulatorSettings, simulate
from tasks.recipe import Recipe, crystallography
from tasks.unit_cell import read_cell

N_FRAMES = 24
CHUNK = 10


@dataclass(frozen=True)
class SimulatedRun:
    """A finished run of lysozyme stills (1M) and the file that says what is on them."""

    folder: Path
    truth: Path

    def copy_to(self, folder: Path) -> Path:
        """The run folder alone, for a test of its own."""
        target = folder / "lyso" / "1"
        shutil.copytree(self.folder, target)
        return target


def take_run(service: Service, detector: str, truth: Path, **options: object) -> Run:
    """Simulate a series into a service; the run once it is finished."""
    # 0.2 s of frame time makes chunks of ten frames.
    settings = SimulatorSettings(
        size="1M", n_frames=N_FRAMES, bind=detector, experiment="lyso", hit_fraction=0.4, frame_time=0.2, truth=truth,
        **options,
    )  # fmt: skip
    simulate(settings)
    run = wait_for_run(service)
    for _ in run["eiger"].follow():
        pass
    return run


def wait_for_run(service: Service) -> Run:
    """The run, once the service has seen its start message."""
    deadline = time.monotonic() + 20
    while True:
        try:
            run = open_run(f"{service.address}/lyso/1")
            if "eiger" in run:
                return run
        except RunNotFound:
            pass
        assert time.monotonic() < deadline, "the series never became a run"
        time.sleep(0.05)


@pytest.fixture(scope="session")
def simulated_run(tmp_path_factory: pytest.TempPathFactory) -> SimulatedRun:
    folder = tmp_path_factory.mktemp("simulated")
    detector = f"tcp://127.0.0.1:{free_port()}"
    settings = ServiceSettings(root=folder, bind="tcp://127.0.0.1:*", sources=(SourceSettings(endpoint=detector),))
    with Service(settings) as service:
        take_run(service, detector, folder / "truth.parquet")
    return SimulatedRun(folder / "lyso" / "1", folder / "truth.parquet")


@pytest.fixture(scope="session")
def recipe() -> Recipe:
    return crystallography(read_cell("79.1,79.1,37.9,90,90,90", "P 43 21 2"))


@dataclass(frozen=True)
class PrefectServer:
    port: int
    environment: dict[str, str]


@pytest.fixture(scope="session")
def prefect_server(tmp_path_factory: pytest.TempPathFactory):
    """One Prefect server for the whole session, on a free port, with its own database."""
    port = free_port()
    environment = server_environment(tmp_path_factory.mktemp("prefect"), port)
    children = Children(tmp_path_factory.mktemp("logs"))
    command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    try:
        children.start("prefect", command, environment)
        wait_until_healthy(port, 120, lambda: children.check("prefect"))
        yield PrefectServer(port, environment)
    finally:
        children.stop_all()


@pytest.fixture
def in_thread():
    """Runs a function beside the test and hands its result, or its error, back at the end."""
    threads = []

    def start(function, *args):
        outcome: dict = {}

        def work():
            try:
                outcome["result"] = function(*args)
            except BaseException as error:
                outcome["error"] = error

        thread = threading.Thread(target=work)
        thread.start()
        threads.append(thread)

        def result():
            thread.join(120)
            assert not thread.is_alive(), "still at work after two minutes"
            if "error" in outcome:
                raise outcome["error"]
            return outcome["result"]

        return result

    yield start
    for thread in threads:
        thread.join(120)
