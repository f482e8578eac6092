"""What was promised to be durable is there after a power loss, whatever of the rest was on its way to the disk."""

import contextlib
import itertools
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from storage.errors import NearlineError
from storage.models import StreamHeader
from storage.run_folder import RunFolder, find_runs
from storage.states import FrameState
from storage.stream_source import FolderSource
from storage.stream_store import StreamStore
from streaming.producer import Producer
from streaming.retrieval import open_run
from tests.streaming.harness import SHAPE, ServiceProgram, blob, record_run, serving, wait_for

from .disk import Disk, FaultyDisk, Loss, mark, positions, tree
from .store_program import content

N_FRAMES = 60
# How names reach the disk: in the order of one metadata log (ext4, XFS), or as POSIX leaves it open.
DISKS = {"journaled": True, "posix": False}


def record(folder: Path, seed: int, *, is_synced: bool = True) -> FaultyDisk:
    """A stream's store being filled by a writer that is killed twice on its way to the end."""
    place = Path(tempfile.mkdtemp(dir=folder))
    disk = FaultyDisk(place / "data", place / "log")
    if not is_synced:
        disk.ignore_syncs()
    command = [sys.executable, "-m", "tests.faults.store_program", disk.root, disk.log, str(seed), str(N_FRAMES)]
    rng = random.Random(seed)
    for n_changes in (rng.randrange(60, 250), rng.randrange(30, 200), 0):
        disk.kill_after(n_changes)
        code = -signal.SIGKILL if n_changes else 0
        assert subprocess.run(command, env=disk.environment, cwd=Path(__file__).parents[2]).returncode == code
    return disk


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """In memory where there is room for it: what is written here need not survive anything."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="nearline-", dir=memory if memory.is_dir() else None) as path:
        yield Path(path)


@pytest.fixture(scope="module")
def recorded(folder) -> FaultyDisk:
    return record(folder, seed=1)


def images(
    disk: FaultyDisk, n: int, seed: int, folder: Path, *, loss: Loss | None = None, **options
) -> Iterator[tuple[Path, dict, str]]:
    """Folders as the power losses at ``n`` points of the log leave them, and what was promised by then."""
    rng = random.Random(seed)
    points = positions(disk.log)
    state: Disk = disk.disk(**options)
    for at in sorted(rng.choices(points, k=n)):
        state.replay(at)
        if state.marks:
            drawn = loss or Loss.draw(rng)
            path = state.lose_power(rng, drawn).write(Path(tempfile.mkdtemp(dir=folder)) / "image")
            yield path, promises(state), f"seed {seed}, power lost at byte {at} of the log, {drawn}"
            shutil.rmtree(path.parent)


def promises(state: Disk) -> dict:
    """What the writer had been promised: frames by its syncs, and that the stream has ended."""
    durable = sorted(set().union(*(m["durable"] for m in state.marks)))
    return {"durable": durable, "finished": any(m.get("finished") for m in state.marks)}


def check_store(root: Path, promised: dict) -> None:
    """All that was promised can be read, by a reader and by the next writer, and the run can be ended."""
    durable = promised["durable"]
    folder = RunFolder.open(root / "lyso" / "1")
    check_reader(FolderSource(folder, "eiger"), durable)
    store = StreamStore.recover(folder, "eiger")
    assert {i: bytes(store.read(i).blob) for i in durable} == {i: content(i) for i in durable}
    if not store.is_finished:
        assert not promised["finished"]
        store.finish(N_FRAMES, "lost with the power")
    assert store.ledger().problems == []
    store.close()
    check_reader(FolderSource(folder, "eiger"), durable)


def check_reader(source: FolderSource, durable: list[int]) -> None:
    assert {i: bytes(source.read_one(i).blob) for i in durable} == {i: content(i) for i in durable}
    # Also what nobody promised: nothing is ever read wrong, and a sealed chunk is whole.
    stored = source.states.indices(FrameState.stored, 0, source.states.announced)
    assert all(bytes(source.read_one(int(i)).blob) == content(int(i)) for i in stored)


def test_the_log_has_seen_every_change(recorded, folder):
    """Else an image would prove nothing."""
    image = recorded.disk().replay().as_it_is().write(Path(tempfile.mkdtemp(dir=folder)) / "image")
    assert tree(image) == tree(recorded.root)
    assert recorded.n_syncs > 50


@pytest.mark.parametrize("is_journaled", DISKS.values(), ids=DISKS.keys())
def test_synced_frames_survive(recorded, folder, is_journaled):
    for root, promised, where in images(recorded, 30, 2, folder, is_journaled=is_journaled):
        with said(where):
            check_store(root, promised)


@pytest.mark.campaign
@pytest.mark.parametrize("is_journaled", DISKS.values(), ids=DISKS.keys())
@pytest.mark.parametrize("seed", range(10))
def test_synced_frames_survive_campaign(folder, is_journaled, seed):
    disk = record(folder, seed)
    for root, promised, where in images(disk, 200, seed, folder, is_journaled=is_journaled):
        with said(where):
            check_store(root, promised)


def test_a_disk_that_does_not_sync_is_found_out(folder):
    """The same check fails when syncs do nothing: it is the syncs that keep the promise."""
    disk = record(folder, seed=2, is_synced=False)
    # Names reach the disk by themselves, bytes do not: what a sync is for.
    for root, promised, _ in images(disk, 10, 2, folder, loss=Loss(names=1.0, bytes=0.0), is_journaled=True):
        with pytest.raises((NearlineError, OSError, ValueError, AssertionError)):
            check_store(root, promised)


# ---- the whole service -----------------------------------------------------------------------------


class Recording:
    """A service under load that was killed: what it had acknowledged as durable is noted in the disk's log."""

    def __init__(self, folder: Path, n_frames: int, *, is_synced: bool = True) -> None:
        self.disk = FaultyDisk(folder / "data", folder / "log")
        if not is_synced:
            self.disk.ignore_syncs()
        self._n_frames = n_frames
        with ServiceProgram(self.disk.root, self.disk.environment) as service:
            threads = [threading.Thread(target=self._produce, args=(service.address, run)) for run in (1, 2)]
            for thread in threads:
                thread.start()
            wait_for(lambda: (self.disk.root / "lyso" / "1" / "cam.stream.json").exists())
            reading = open_run(f"{service.address}/lyso/1")["cam"].follow(group="readers", timeout=1.0)
            seen = [frame.frame_index for frame in itertools.islice(reading, n_frames // 2)]
            for thread in threads:
                thread.join()
            service.kill()
        assert len(seen) == n_frames // 2

    def _produce(self, address: str, run: int) -> None:
        header = StreamHeader(
            experiment="lyso", run=run, data_source="cam", shape=SHAPE, dtype="uint16", frames_per_chunk=8
        )
        with Producer(address, "lyso", "cam", ack="durable", name=f"p{run}") as producer:
            out = producer.run(run)
            out.start(header)
            for n in range(self._n_frames):
                future = out.put(blob(100 * run + n), meta={"n": n})
                future.add_done_callback(lambda f, n=n: mark(self.disk.log, run=run, n=n, index=f.result()))
                time.sleep(0.01)
            out.flush()
            if run == 1:
                out.finish()
                mark(self.disk.log, ended=run)
            out._close_courier()


@pytest.fixture(scope="module")
def recording(folder) -> Recording:
    return Recording(Path(tempfile.mkdtemp(dir=folder)), n_frames=40)


def service_images(
    recording: Recording, n: int, seed: int, folder: Path, **options
) -> Iterator[tuple[Path, list, str]]:
    """Folders as the power losses leave them, and all that was promised by then; the last at the end of the log."""
    rng = random.Random(seed)
    points = sorted([*rng.choices(positions(recording.disk.log), k=n - 1), positions(recording.disk.log)[-1]])
    state = recording.disk.disk(**options)
    for at in points:
        state.replay(at)
        loss = Loss.draw(rng)
        path = state.lose_power(rng, loss).write(Path(tempfile.mkdtemp(dir=folder)) / "image")
        yield path, state.marks, f"seed {seed}, power lost at byte {at} of the log, {loss}"
        shutil.rmtree(path.parent)


def check_service(root: Path, marks: list[dict]) -> None:
    """A new service on what is left: it starts, has all that was promised, and goes on."""
    check_durable(root, marks)
    with serving(root) as service:
        check_durable(root, marks)
        for run in find_runs(root):
            if not run.state.is_terminal:
                with Producer(service.address, "lyso", "cam", name=f"p{run.header.run}") as producer:
                    out = producer.run(run.header.run, join=True)
                    for name in run.data_sources():
                        out.start(run.stream_header(name))
                        out.finish()
        record_run(service.address, range(3), run=9)
        assert len(list(open_run(f"{service.address}/lyso/9")["eiger"].follow(group="new"))) == 3
    check_durable(root, marks)
    for run in find_runs(root):
        for name in run.data_sources():
            assert FolderSource(run, name).ledger().problems == []


def check_durable(root: Path, marks: list[dict]) -> None:
    for promise in marks:
        run = RunFolder.open(root / "lyso" / str(promise.get("run") or promise["ended"]))
        if "ended" in promise:
            assert run.state.is_terminal
            continue
        frame = FolderSource(run, "cam").read_one(promise["index"])
        assert (frame.info.meta, bytes(frame.blob)) == ({"n": promise["n"]}, blob(100 * promise["run"] + promise["n"]))


@pytest.mark.parametrize("is_journaled", DISKS.values(), ids=DISKS.keys())
def test_frames_acknowledged_as_durable_survive(recording, folder, is_journaled):
    for root, marks, where in service_images(recording, 4, 5, folder, is_journaled=is_journaled):
        with said(where):
            check_service(root, marks)


@pytest.mark.campaign
@pytest.mark.parametrize("is_journaled", DISKS.values(), ids=DISKS.keys())
@pytest.mark.parametrize("seed", range(5))
def test_frames_acknowledged_as_durable_survive_campaign(folder, is_journaled, seed):
    recording = Recording(Path(tempfile.mkdtemp(dir=folder)), n_frames=200)
    for root, marks, where in service_images(recording, 60, seed, folder, is_journaled=is_journaled):
        with said(where):
            check_service(root, marks)


def test_durable_is_a_lie_on_a_disk_that_does_not_sync(folder):
    lying = Recording(Path(tempfile.mkdtemp(dir=folder)), n_frames=20, is_synced=False)
    state = lying.disk.disk(is_journaled=True).replay()
    place = Path(tempfile.mkdtemp(dir=folder))
    image = state.lose_power(random.Random(1), Loss(names=1.0, bytes=0.0)).write(place / "image")
    with pytest.raises((NearlineError, OSError, ValueError)):
        check_durable(image, state.marks)


@pytest.mark.parametrize("what", ["groups.sqlite", "catalog.sqlite"])
def test_the_service_starts_without_its_databases(recording, folder, what):
    """They are its own state and an index: lost, it begins them anew."""
    state = recording.disk.disk(is_journaled=True).replay()
    root = state.as_it_is().write(Path(tempfile.mkdtemp(dir=folder)) / "image")
    for path in root.glob(f"{what}*"):
        path.unlink()
    check_service(root, state.marks)


@contextlib.contextmanager
def said(where: str) -> Iterator[None]:
    """Every failure says how to have it again."""
    try:
        yield
    except Exception as error:
        error.add_note(where)
        raise
