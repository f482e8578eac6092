"""Frames through a throw-away service on loopback and back, held against what was sent.

Run as ``python -m nearline.round_trip``: a process of its own, so that a service that dies takes
nothing with it, and settings of the environment stay out of it.
"""

import json
import tempfile
import time
from pathlib import Path

import numpy as np

import nearline
from storage.errors import NearlineError
from streaming.service import Service, ServiceSettings

__all__ = ["round_trip"]

_SHAPE = (512, 512)


def round_trip(n_frames: int = 40) -> dict[str, float]:
    """Send, read live, read again from the folder; frames and how long that took.

    Raises
    ------
    NearlineError : a frame came back other than it was sent, or the ledger does not balance.
    """
    sent = np.random.default_rng(0).integers(0, 200, (n_frames, *_SHAPE), dtype=np.uint16)
    with tempfile.TemporaryDirectory(prefix="nearline-doctor-") as folder:
        settings = ServiceSettings(root=Path(folder), bind="tcp://127.0.0.1:*", sources=(), buffer_bytes=256 << 20)
        with Service(settings) as service:
            began = time.perf_counter()
            with nearline.producer("doctor", "camera", service=service.address).run(1) as out:
                for frame in sent:
                    out.send(frame)
            run = nearline.open("doctor/1", service=service.address)
            _compare(sent, [frame.data for frame in run["camera"].follow(timeout=30)], "over the wire")
            seconds = time.perf_counter() - began
        offline = nearline.open(Path(folder) / "doctor" / "1")
        _compare(sent, [frame.data for frame in offline["camera"]], "from the folder")
        unbalanced = [words for ledger in offline.ledger().values() for words in ledger.problems]
        if unbalanced:
            raise NearlineError(f"the ledger does not balance: {'; '.join(unbalanced)}; keep the log and report it")
    return {"n_frames": n_frames, "seconds": round(seconds, 3)}


def _compare(sent: np.ndarray, received: list[np.ndarray], how: str) -> None:
    is_same = len(received) == len(sent) and all(map(np.array_equal, sent, received))
    if not is_same:
        raise NearlineError(f"{len(sent)} frames were sent, and other ones came back {how}; keep the log and report it")


if __name__ == "__main__":
    print(json.dumps(round_trip()))
