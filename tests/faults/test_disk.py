"""Full disks and slow ones: push back, say so, lose nothing that was acknowledged, go on by itself.

The whole disk is full, for every file of the service; not one call that a test has replaced.
"""

import contextlib
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nearline.children import free_port
from storage.models import RunState, StreamHeader
from streaming.producer import Producer
from streaming.retrieval import open_run
from streaming.status import ServiceStatus
from tests.streaming.harness import (
    SHAPE,
    ServiceProcess,
    ServiceProgram,
    arm,
    blob,
    detector,
    pixels,
    producing,
    status_of,
    wait_for,
)

from .disk import FaultyDisk

BUDGET = 1 << 20


class Sending:
    """A producer that sends on and on in a thread of its own, and what it was told."""

    def __init__(self, address: str, run: int, ack: str, pause_s: float = 0.002) -> None:
        self.indices: list[int] = []
        self.slowest_s = 0.0
        self._address, self._run, self._ack, self._pause_s = address, run, ack, pause_s
        self._enough = threading.Event()
        self._thread = threading.Thread(target=self._send)

    def _send(self) -> None:
        header = StreamHeader(
            experiment="lyso", run=self._run, data_source="eiger", shape=SHAPE, dtype="uint16", frames_per_chunk=20
        )
        with Producer(self._address, "lyso", "eiger", ack=self._ack) as producer, producer.run(self._run) as out:
            out.start(header)
            while not self._enough.wait(self._pause_s):
                began = time.monotonic()
                self.indices.append(out.send(blob(len(self.indices))))
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)

    def __enter__(self) -> "Sending":
        self._thread.start()
        wait_for(lambda: len(self.indices) > 5)
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        self._enough.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "the producer does not come to its end"


def status(address: str) -> ServiceStatus:
    return ServiceStatus.model_validate(status_of(address))


def check_run(address: str, run: int, n: int) -> None:
    opened = open_run(f"{address}/lyso/{run}")
    assert [bytes(frame.blob) for frame in opened["eiger"].follow()] == [blob(i) for i in range(n)]
    assert opened["eiger"].ledger().problems == []
    assert opened.state is RunState.completed


@pytest.mark.parametrize("room", [0, 3_000], ids=["no room", "room for half a frame"])
def test_a_full_disk(tmp_path, room):
    disk = FaultyDisk(tmp_path / "data", tmp_path / "log")
    with ServiceProgram(disk.root, disk.environment, buffer_bytes=BUDGET) as service:
        with Sending(service.address, 1, "stored") as sending:
            disk.set_room(room)
            wait_for(lambda: status(service.address).disk.is_full)
            time.sleep(0.5)
            known = len(sending.indices)
            time.sleep(0.7)
            assert len(sending.indices) <= known + 1, "nothing is acknowledged that is not stored"
            told = status(service.address)
            assert "full" in " ".join(told.problems())
            assert told.buffer.used_bytes <= BUDGET
            readable = open_run(f"{service.address}/lyso/1")["eiger"]
            assert [bytes(f.blob) for f in readable][:known] == [blob(i) for i in range(known)], "readers go on"
            disk.set_room(None)
            wait_for(lambda: len(sending.indices) > known + 20)
            sending.end()
        check_run(service.address, 1, len(sending.indices))
        assert not status(service.address).disk.is_full
        assert disk.n_refused > 0
        assert service.stop() == 0


def test_a_service_killed_on_a_full_disk(tmp_path):
    """What was acknowledged is there, a half-written frame is not, and the producer goes on with the next service."""
    disk, bind = FaultyDisk(tmp_path / "data", tmp_path / "log"), f"tcp://127.0.0.1:{free_port()}"
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(ServiceProgram(disk.root, disk.environment, bind=bind))
        sending = stack.enter_context(Sending(bind, 1, "stored"))
        disk.set_room(10_000)
        wait_for(lambda: status(bind).disk.is_full)
        service.kill()
        known = len(sending.indices)
        image = disk.disk().replay().as_it_is().write(tmp_path / "image")
        stream = open_run(image / "lyso" / "1")["eiger"]
        assert [bytes(stream[i].blob) for i in range(known)] == [blob(i) for i in range(known)]
        disk.set_room(None)
        stack.enter_context(ServiceProgram(disk.root, disk.environment, bind=bind))
        wait_for(lambda: len(sending.indices) > known + 20)
        sending.end()
        check_run(bind, 1, len(sending.indices))


def test_a_slow_sync_holds_up_only_those_who_wait_for_it(tmp_path):
    disk = FaultyDisk(tmp_path / "data", tmp_path / "log")
    with ServiceProgram(disk.root, disk.environment) as service:
        with Sending(service.address, 1, "stored", 0.01) as quick, Sending(service.address, 2, "durable") as patient:
            disk.set_sync_s(0.15)
            began, before = time.monotonic(), len(patient.indices)
            quick.slowest_s = 0.0
            wait_for(lambda: status(service.address).streams[0].sealing > 2, 30)
            wait_for(lambda: len(patient.indices) > before + 4, 30)
            each_s = (time.monotonic() - began) / (len(patient.indices) - before)
            assert each_s > 0.13, "durable waits for the disk"
            assert quick.slowest_s < 0.6, "stored does not wait for seals and syncs"
            assert status(service.address).metrics.histograms["sync"].longest_s > 0.14
            disk.set_sync_s(0.0)
            quick.end()
            patient.end()
        check_run(service.address, 1, len(quick.indices))
        check_run(service.address, 2, len(patient.indices))


def test_slow_writes_push_back(tmp_path):
    """A producer waits; of a detector we stop reading, say so, and name what it could not keep."""
    disk = FaultyDisk(tmp_path / "data", tmp_path / "log")
    n = 150
    with (
        detector(high_water_mark=2) as eiger,
        ServiceProgram(disk.root, disk.environment, eiger.endpoint, buffer_bytes=60_000) as service,
    ):
        arm(eiger, n)
        wait_for(lambda: (disk.root / "lyso" / "1" / "eiger.stream.json").exists())
        disk.set_write_s(1.0)
        exposing = threading.Thread(target=lambda: [eiger.send_image(i, blob(i)) for i in range(n)])
        exposing.start()
        wait_for(lambda: status(service.address).sources[0].is_paused)
        assert "disk does not keep up" in " ".join(status(service.address).problems())
        assert status(service.address).buffer.used_bytes <= 60_000
        disk.set_write_s(0.0)
        exposing.join()
        eiger.send_end()
        check_run(service.address, 1, n)
        assert status(service.address).problems() == []


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A real file system that is too small; skipped where none may be mounted."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_file_system_that_is_really_full(tmp_path):
    with small_disk(tmp_path / "small", "2m") as root, ServiceProcess(root) as service:
        ballast: Any = root / "ballast"
        ballast.write_bytes(bytes(1_400_000))
        with producing(service.address) as out:
            sending = threading.Thread(target=lambda: [out.send(pixels(i)) for i in range(200)])
            sending.start()
            wait_for(lambda: status(service.address).disk.is_full)
            assert sending.is_alive(), "it waits"
            ballast.unlink()
            sending.join(30)
            out.finish()
        check_run(service.address, 1, 200)
        assert service.stop() == 0
