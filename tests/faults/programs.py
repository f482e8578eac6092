"""What runs in processes of its own and is killed: a service, producers, consumers.

Each writes down what it was promised, a line an event, with one `write` each: `kill -9` cannot take what
the kernel has. Times are `time.monotonic`, the same clock in all processes.
"""

import json
import os
import time
import zlib
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from storage.errors import ProtocolError, ServiceUnavailable, StreamNotOpen
from storage.frame import blob_digest
from storage.models import StreamHeader
from streaming.producer import Producer, RunProducer
from streaming.retrieval import Run, open_run
from streaming.service import ServiceSettings, serve_until_signal
from tests.streaming.harness import blob

__all__ = ["Journal", "consume", "content_of", "produce", "read_journal", "run_logged", "serve"]

_MOST_TRIES = 5


class Journal:
    """Lines of JSON that outlive their writer."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)

    def note(self, what: str, **facts: Any) -> None:
        line = json.dumps({"what": what, "at": time.monotonic(), "pid": os.getpid()} | facts)
        os.write(self._fd, line.encode() + b"\n")


def read_journal(path: Path) -> list[dict[str, Any]]:
    """All that was noted; [] if nothing was yet."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_logged(log: Path, function: Callable[..., None], *args: Any) -> None:
    """Run one of the programs below with what it says in a file."""
    fd = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    function(*args)


def serve(settings: str) -> None:
    """A service until it is told to stop."""
    serve_until_signal(ServiceSettings.model_validate_json(settings))


def produce(address: str, header: StreamHeader, name: str, log: Path, stop: Path, pause_s: float) -> None:
    """Put frames, many under way at once, until ``stop`` exists; then end this producer's part of the stream.

    A producer that was killed goes on with the first frame it does not know to be stored: those that were on
    their way are sent again, under the same (producer, sequence).
    """
    journal, said = Journal(log), read_journal(log)
    if any(entry["what"] == "finished" for entry in said):
        return
    stored = {entry["n"] for entry in said if entry["what"] == "stored"}
    n = next(i for i in range(len(stored) + 1) if i not in stored)
    n_begun = 1 + max((entry["n"] for entry in said if entry["what"] == "putting"), default=-1)
    with _connect_patiently(address, header, name) as producer:
        try:
            out = producer.run(header.run, join=True)
            out.start(header)
            # All its lives count as one: the n-th frame of this producer is its n-th sending.
            producer.sender, out._sequence = name, n
            while not stop.exists() or n < n_begun:
                _put(out, journal, name, n)
                n += 1
                time.sleep(pause_s)
            out.flush()
            journal.note("finishing", n=n)
            out.finish()
        except (StreamNotOpen, ProtocolError):
            # Killed, or cut off, between its last word and the answer: the stream has ended as it wished.
            if not any(entry["what"] == "finishing" for entry in read_journal(log)):
                raise
    journal.note("finished", n=n)


def _put(out: RunProducer, journal: Journal, name: str, n: int) -> None:
    content = content_of(name, n)
    digest = blob_digest(content).hex()
    journal.note("putting", n=n)

    def settled(future: "Future[int]") -> None:
        if future.exception() is None:
            journal.note("stored", n=n, index=future.result(), digest=digest)

    out.put(content, meta={"from": name, "n": n}).add_done_callback(settled)


def content_of(name: str, n: int) -> bytes:
    """Frame n of a producer; no two are alike."""
    return blob(zlib.crc32(name.encode()) + n)


def consume(address: str, run: str, source: str, group: str, log: Path, lease_s: float) -> None:
    """One member of a group, until the group has all of the stream."""
    journal = Journal(log)
    stream = _open_patiently(f"{address}/{run}")[source]
    for leased in stream.source.follow_group(group, None, lease_s):
        index, digest = leased.frame.info.frame_index, blob_digest(leased.frame.blob).hex()
        journal.note("got", index=index, lease=leased.lease, delivery=leased.delivery, digest=digest)
        journal.note("done", index=index, lease=leased.lease)
    journal.note("end")


def _connect_patiently(address: str, header: StreamHeader, name: str) -> Producer:
    """A producer of a service that may be down, or busy with its recovery."""
    for _ in range(_MOST_TRIES):
        try:
            return Producer(address, header.experiment, header.data_source, ack="stored", name=name)
        except ServiceUnavailable:
            time.sleep(0.1)
    return Producer(address, header.experiment, header.data_source, ack="stored", name=name)


def _open_patiently(run: str) -> Run:
    """Open a run of a service that may be down, or busy with its recovery, again and again."""
    for _ in range(_MOST_TRIES):
        try:
            return open_run(run)
        except ServiceUnavailable:
            time.sleep(0.1)
    return open_run(run)
