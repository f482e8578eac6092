"""`kill -9` of services, writers in mid-seal, producers and consumers under load: nothing promised is lost.

A world of processes lives through a number of kills, drawn from a seed, then comes to its end and is
checked against what each of its members had written down.
"""

import itertools
import random
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from storage.frame import blob_digest
from storage.models import RunState, StreamHeader
from storage.run_folder import RunFolder
from storage.states import FrameState
from storage.stream_source import FolderSource
from streaming.producer import Producer
from tests.streaming.harness import SHAPE, arm, blob, detector, wait_for

from . import programs
from .processes import ServiceUnderFire, spawn
from .programs import read_journal

LEASE_S = 3.0
# An acknowledgement under way: it goes with the request for more frames, and so long after the answer to that it may
# not yet be in the group's state on disk (saved every 50 ms).
ACK_UNDER_WAY_S = 1.0
# A member that waited so long for a frame had asked for it.
ASKED_S = 0.02
# A batch of frames is given out at once and worked on in turn, for about so long.
BATCH_S = 1.0
# Numbers of leases count up from anywhere: two so far apart were given by two lives of a service.
OTHER_LIFE = 1 << 40
CHUNK = 20
N_SERIES = 100_000


@dataclass
class Worker:
    """A producer or consumer that is started again when it was killed."""

    function: Any
    args: tuple[Any, ...]
    log: Path
    process: BaseProcess | None = None
    kills: list[tuple[int, float]] = field(default_factory=list)

    @property
    def said(self) -> Path:
        return self.log.with_name(f"{self.log.name}.log")

    def start(self) -> None:
        self.process = spawn(self.function, self.said, *self.args)

    def kill(self) -> None:
        assert self.process is not None
        pid = self.process.pid
        assert pid is not None
        self.process.kill()
        self.process.join()
        self.kills.append((pid, time.monotonic()))
        self.start()

    def end(self, timeout: float) -> None:
        assert self.process is not None
        self.process.join(timeout)
        assert self.process.exitcode == 0, (
            f"{self.log.name} ended with {self.process.exitcode}: {self.said.read_text()[-3000:]}"
        )


class World:
    """A service with a detector, two producers, and three groups of consumers."""

    def __init__(self, root: Path, eiger: Any, seed: int) -> None:
        self.root, self.data, self._eiger = root, root / "data", eiger
        self.rng = random.Random(seed)
        self.service = ServiceUnderFire(self.data, {"eiger": eiger.endpoint})
        self.stop = root / "stop"
        self.headers = {
            name: StreamHeader(
                experiment="lyso", run=run, data_source=name, shape=SHAPE, dtype="uint16", frames_per_chunk=CHUNK
            )
            for run, name in ((11, "cam"), (12, "diode"))
        }
        # Two producers fill one stream.
        self.producers = {"cam": ("cam-a", "cam-b"), "diode": ("diode-a",)}
        self.workers: dict[str, Worker] = {}
        self.service_kills: list[float] = []
        # Of them those that left a shard without a commit.
        self.n_in_mid_seal = 0
        self._shutter = threading.Event()
        self._acquisition = threading.Thread(target=self._acquire, daemon=True)
        self.n_exposed = 0

    def begin(self) -> None:
        """Start everybody but the service."""
        self._acquisition.start()
        wait_for(lambda: (self.data / "lyso" / "1" / "eiger.stream.json").exists())
        for name, header in self.headers.items():
            self._begin_run(header)
            for group, n_members in (("hits", 3), ("all", 2)):
                for member in range(n_members):
                    self._add_member(f"lyso/{header.run}", name, group, member)
        for member in range(2):
            self._add_member("lyso/1", "eiger", "hits", member)

    def _begin_run(self, header: StreamHeader) -> None:
        names = self.producers[header.data_source]
        for name in names:
            with Producer(self.service.address, "lyso", header.data_source, name=name) as producer:
                producer.run(header.run, join=name != names[0]).start(header)
        for name in names:
            log = self.root / f"{name}.producer"
            self._add(name, programs.produce, (self.service.address, header, name, log, self.stop, 0.01), log)

    def _add_member(self, run: str, source: str, group: str, member: int) -> None:
        log = self.root / f"{source}.{group}.{member}"
        args = (self.service.address, run, source, group, log, LEASE_S)
        self._add(f"{source} {group} {member}", programs.consume, args, log)

    def _add(self, name: str, function: Any, args: tuple[Any, ...], log: Path) -> None:
        self.workers[name] = Worker(function, args, log)
        self.workers[name].start()

    def _acquire(self) -> None:
        arm(self._eiger, N_SERIES)
        while not self._shutter.is_set():
            self._eiger.send_image(self.n_exposed, blob(self.n_exposed % 100))
            self.n_exposed += 1
            time.sleep(0.01)
        self._eiger.send_end()

    # ---- fire ------------------------------------------------------------------------------------

    def fire(self, n_kills: int) -> None:
        for _ in range(n_kills):
            time.sleep(self.rng.uniform(0.05, 0.6))
            draw = self.rng.random()
            if draw < 0.25:
                self.kill_service()
            elif draw < 0.5:
                self.kill_in_mid_seal()
            else:
                self.rng.choice(list(self.workers.values())).kill()

    def kill_service(self) -> None:
        self.service_kills.append(time.monotonic())
        self.service.kill()
        self.n_in_mid_seal += any(self._seals_under_way())
        time.sleep(self.rng.choice([0.0, 0.0, 0.3]))
        self.service.start()
        # Also while it is still recovering.
        if self.rng.random() < 0.8:
            self.service.wait_until_there()

    def kill_in_mid_seal(self) -> None:
        """Once a shard has its name and its chunk no commit; a seal is short, and now and then none is caught."""
        deadline = time.monotonic() + 3.0
        while time.monotonic() < deadline and not any(self._seals_under_way()):
            pass
        self.kill_service()

    def _seals_under_way(self) -> Iterator[Path]:
        for header in self.headers.values():
            paths = RunFolder(self.data / "lyso" / str(header.run), None).stream(header.data_source)  # type: ignore[arg-type]
            chunk = 1 + max(paths.commits(), default=-1)
            if paths.shard(chunk, 2).exists() and not paths.commit(chunk).exists():
                yield paths.shard(chunk, 2)

    # ---- the end -----------------------------------------------------------------------------------

    def end(self) -> None:
        """Let everybody come to the end."""
        self.service.wait_until_there()
        self.stop.touch()
        self._shutter.set()
        self._acquisition.join(30)
        deadline = time.monotonic() + 60
        for worker in self.workers.values():
            worker.end(max(deadline - time.monotonic(), 1.0))
        assert self.service.stop() == 0
        assert "Traceback" not in self.service.log.read_text(), self.service.log.read_text()

    def __enter__(self) -> "World":
        return self

    def __exit__(self, *_: object) -> None:
        self._shutter.set()
        for worker in self.workers.values():
            if worker.process is not None:
                worker.process.kill()
        self.service.kill()

    # ---- what was promised -----------------------------------------------------------------------------

    def check(self) -> None:
        for name, header in self.headers.items():
            source = FolderSource(RunFolder.open(self.data / "lyso" / str(header.run)), name)
            self._check_produced(name, source)
            assert source.folder.state is RunState.completed
            for group in ("hits", "all"):
                self._check_group(name, group, source)
        eiger = FolderSource(RunFolder.open(self.data / "lyso" / "1"), "eiger")
        assert all(bytes(eiger.read_one(i).blob) == blob(i % 100) for i in stored_indices(eiger))
        assert eiger.folder.state is RunState.incomplete, "a frame that the detector never took was planned"
        self._check_group("eiger", "hits", eiger)
        for source in (eiger,):
            assert source.ledger().problems == []
            assert all(r.cause for r in source.ledger().ranges)

    def _check_produced(self, source_name: str, source: FolderSource) -> None:
        """Each acknowledged frame is there under its index, and each frame once, in the order of its producer."""
        sent: dict[str, int] = {}
        for name in self.producers[source_name]:
            said = read_journal(self.root / f"{name}.producer")
            sent[name] = next(entry["n"] for entry in said if entry["what"] == "finished")
            for entry in said:
                if entry["what"] == "stored":
                    frame = source.read_one(entry["index"])
                    assert frame.info.meta == {"from": name, "n": entry["n"]}
                    assert blob_digest(frame.blob).hex() == entry["digest"], f"frame {entry['index']} is another"
        metas = [info.meta for info in source.infos(0, source.states.announced)]
        found = {name: [meta["n"] for meta in metas if meta["from"] == name] for name in sent}
        assert {name: sorted(numbers) for name, numbers in found.items()} == {n: list(range(sent[n])) for n in sent}
        assert source.ledger().problems == []
        assert (source.ledger().stored, source.ledger().missing) == (sum(sent.values()), 0)

    def _check_group(self, source_name: str, group: str, source: FolderSource) -> None:
        members = {w.log: w for w in self.workers.values() if w.log.name.startswith(f"{source_name}.{group}.")}
        deliveries = read_deliveries(members)
        assert sorted(deliveries) == stored_indices(source), f"{group} of {source_name} got every stored frame"
        deaths = self._deaths([d for frames in deliveries.values() for d in frames])
        for index, frames in deliveries.items():
            digest = blob_digest(source.read_one(index).blob).hex()
            assert {d.digest for d in frames} == {digest}, f"frame {index} of {source_name} was delivered wrong"
            for before, after in itertools.pairwise(frames):
                why = may_come_again(before, after, deaths.get(before.life))
                assert why, f"{before} was acknowledged, and came again as {after}; service killed at {deaths}"

    def _deaths(self, deliveries: list["Delivery"]) -> dict[int, float]:
        """The earliest moment at which each life of the service can have ended; sets each delivery's life."""
        life, before = 0, 0
        numbered = sorted(deliveries, key=lambda d: d.lease)
        for delivery in numbered:
            life += bool(before) and delivery.lease - before > OTHER_LIFE
            delivery.life, before = life, delivery.lease
        first_seen = {life: min(d.at for d in deliveries if d.life == life) for life in {d.life for d in deliveries}}
        deaths: dict[int, float] = {}
        kills = iter(self.service_kills)
        for life in sorted(first_seen, key=lambda life: first_seen[life])[:-1]:
            deaths[life] = next(kills)
        return deaths


@dataclass
class Delivery:
    """One frame in one member's hands."""

    index: int
    at: float
    lease: int
    delivery: int
    digest: str
    done_at: float | None = None
    # When its holder was given what it had asked for next.
    answered_at: float | None = None
    # When its holder was killed, if it was.
    killed_at: float | None = None
    life: int = 0


def read_deliveries(members: dict[Path, Worker]) -> dict[int, list[Delivery]]:
    """Each frame's deliveries in the order in which they came."""
    found: dict[int, list[Delivery]] = defaultdict(list)
    for log, worker in members.items():
        killed, held, last_at, done = dict(worker.kills), {}, 0.0, []
        for entry in read_journal(log):
            if entry["what"] == "got" and entry["at"] - last_at > ASKED_S:
                for delivery in done:
                    delivery.answered_at = entry["at"]
                done = []
            last_at = entry["at"]
            if entry["what"] == "got":
                fields = {name: entry[name] for name in ("index", "at", "lease", "delivery", "digest")}
                delivery = held[entry["lease"]] = Delivery(**fields, killed_at=killed.get(entry["pid"]))
                found[entry["index"]].append(delivery)
            elif entry["what"] == "done":
                held[entry["lease"]].done_at = entry["at"]
                done.append(held[entry["lease"]])
    for deliveries in found.values():
        deliveries.sort(key=lambda d: d.at)
    return found


def may_come_again(before: Delivery, after: Delivery, service_died_at: float | None) -> str:
    """Why a redelivery is in order: the lease was open, or its acknowledgement under way; empty if it is not."""
    acked_by = None if before.done_at is None else (before.answered_at or before.done_at) + ACK_UNDER_WAY_S
    if before.life == after.life and after.delivery <= before.delivery:
        return ""  # it is not even flagged
    # With its holder, an acknowledgement dies that was not yet sent: so also if a later life gives it out again.
    if before.killed_at is not None and (acked_by is None or before.killed_at <= acked_by):
        return "its holder was killed"
    if before.life != after.life:
        # What the service had not yet written down when it was killed.
        is_open = service_died_at is not None and (acked_by is None or service_died_at <= acked_by)
        return "the service was killed" if is_open else ""
    ends_at = before.at + LEASE_S - BATCH_S
    return "its lease ran out" if after.at > ends_at and (acked_by is None or acked_by > ends_at) else ""


def stored_indices(source: FolderSource) -> list[int]:
    return [int(i) for i in source.states.indices(FrameState.stored, 0, source.states.announced)]


def live_through(root: Path, seed: int, n_kills: int) -> World:
    with detector(high_water_mark=2) as eiger, World(root, eiger, seed) as world, world.service:
        world.begin()
        world.fire(n_kills)
        world.end()
        world.check()
    return world


def test_a_few_kills(tmp_path):
    world = live_through(tmp_path, seed=3, n_kills=8)
    assert world.service_kills


@pytest.mark.campaign
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", range(16))
def test_many_kills(tmp_path, seed):
    world = live_through(tmp_path, seed, n_kills=16)
    assert world.service_kills
    assert world.n_in_mid_seal, "a quarter of the kills wait for a seal"
    print(f"seed {seed}: the service was killed {len(world.service_kills)} times, {world.n_in_mid_seal} in mid-seal")
