"""A program that fills a stream's store and notes in the disk's log what it has been promised.

``python -m tests.faults.store_program ROOT LOG SEED N_FRAMES`` in an environment of `FaultyDisk`.
As in the service one thread writes, one syncs and one seals. Killed and started again, it goes on.
"""

import queue
import random
import sys
import threading
import time
from pathlib import Path

from storage.frame import FrameInfo, blob_crc32c, blob_digest
from storage.metadata import pack_meta
from storage.run_folder import RunFolder
from storage.states import FrameState
from storage.stream_store import StreamStore
from tests.faults.disk import mark
from tests.storage.stores import new_folder, new_header

SHAPE = (32, 32)
CHUNK = 5


def content(index: int) -> bytes:
    """Bytes of frame ``index``: of many lengths, as compressed ones are; they need not decode."""
    rng = random.Random(index)
    return rng.randbytes(rng.choice([40, 700, 1500, 5000]))


def row(index: int) -> FrameInfo:
    blob = content(index)
    return FrameInfo(
        frame_index=index,
        size_bytes=len(blob),
        crc32c=blob_crc32c(blob),
        digest=blob_digest(blob),
        meta_json=pack_meta({"i": index}),
    )


class Program:
    """One life of the writer."""

    def __init__(self, root: Path, log: Path, seed: int) -> None:
        self.log, self.rng = log, random.Random(seed)
        if (root / "lyso" / "1").exists():
            self.store = StreamStore.recover(RunFolder.open(root / "lyso" / "1"), "eiger")
        else:
            self.store = StreamStore.create(new_folder(root), new_header(shape=SHAPE, frames_per_chunk=CHUNK))
        states = self.store.states
        self.appended = [int(i) for i in states.indices(FrameState.stored, 0, states.announced)]
        self.chunks: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self.is_over = threading.Event()
        self.threads = [threading.Thread(target=self.sync), threading.Thread(target=self.seal)]

    def run(self, n_frames: int) -> None:
        for thread in self.threads:
            thread.start()
        for batch in self.batches(n_frames):
            self.store.append_many([(row(i), content(i)) for i in batch])
            self.appended += batch
            for chunk in self.store.take_complete():
                self.chunks.put(chunk)
            time.sleep(self.rng.uniform(0, 0.004))
        for chunk in self.store.begin_finish(n_frames, "never sent"):
            self.chunks.put(chunk)
        self.chunks.put(None)
        self.is_over.set()
        for thread in self.threads:
            thread.join()
        self.store.end_finish()
        mark(self.log, durable=self.appended, finished=True)

    def batches(self, n_frames: int) -> list[list[int]]:
        """What is not stored yet, a little out of order, some frames at a time."""
        known = set(self.appended)
        order = sorted((i for i in range(n_frames) if i not in known), key=lambda i: i + self.rng.random() * 4)
        found = []
        while order:
            n = self.rng.choice([1, 1, 2, 6])
            found.append(order[:n])
            order = order[n:]
        return found

    def sync(self) -> None:
        while not self.is_over.wait(self.rng.uniform(0, 0.02)):
            stored = list(self.appended)
            self.store.sync()
            mark(self.log, durable=stored)

    def seal(self) -> None:
        while (chunk := self.chunks.get()) is not None:
            self.store.seal(chunk)


if __name__ == "__main__":
    Program(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])).run(int(sys.argv[4]))
