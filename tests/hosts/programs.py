"""What runs on the hosts: ``python -m tests.hosts.programs NAME JSON`` calls a function of this module."""

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from flows.run_processing import ProcessRequest, run_processing
from streaming.retrieval import Run, open_run
from streaming.service import ServiceSettings, serve_until_signal
from streaming.simulator import DectrisStreamSender
from tasks.chunk_frames import ChunkFrames
from tests.streaming.harness import arm, blob

DTYPE = "uint16"


def serve(settings: dict[str, Any]) -> None:
    serve_until_signal(ServiceSettings.model_validate(settings))


def detect(bind: str, rate: float, stop: str) -> None:
    """Be a detector for one series until the file ``stop`` is there; frame i follows from i alone."""
    with DectrisStreamSender(bind, receiver_timeout=60) as sender:
        sender.wait_for_receiver()
        arm(sender, 0, DTYPE)
        due = time.monotonic()
        for index in itertools.takewhile(lambda _: not Path(stop).exists(), itertools.count()):
            time.sleep(max(due - time.monotonic(), 0))
            sender.send_image(index, blob(index, DTYPE))
            due += 1 / rate
        sender.send_end()


def follow(run: str, group: str, lease_s: float, log: str) -> None:
    """Be a member of a group: a line for each frame done, with its sum and when."""
    with open(log, "a", buffering=1) as lines:
        for frame in wait_for_run(run)["eiger"].follow(group, lease_s=lease_s):
            time.sleep(0.02)
            row = {"frame_index": frame.frame_index, "total": int(frame.data.sum(dtype=np.int64)), "at": time.time()}
            lines.write(json.dumps(row) + "\n")


def process(run: str, scheduler: str, summary: str) -> None:
    """Be the flow: chunks to Dask, results into a stream of the service."""
    wait_for_run(run)
    request = ProcessRequest.model_validate(
        {
            "run": run,
            "recipe": {"steps": [{"use": f"{__name__}:sums"}], "export": {"nexus": "none", "crystfel": False}},
            "execution": {"kind": "dask", "address": scheduler, "workers": 2},
        }
    )
    Path(summary).write_text(json.dumps(run_processing(request)))


def sums(chunk: ChunkFrames) -> dict[str, Any]:
    """A user's step: the sum of each frame, on which host (its network namespace) it was made, and when."""
    # Longer than the 1.25 s in which a chunk comes: Dask has work for the second worker only if the first is busy.
    time.sleep(1.8)
    n = len(chunk)
    totals = [int(chunk.data(i).sum(dtype=np.int64)) for i in range(n)]
    return {"total": totals, "host": np.full(n, os.stat("/proc/self/ns/net").st_ino), "at": np.full(n, time.time())}


def wait_for_run(address: str) -> Run:
    """The run, once its first frames are announced; within a minute."""
    deadline = time.monotonic() + 60
    while True:
        try:
            run = open_run(address)
            if "eiger" in run:
                return run
        except Exception:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.2)


if __name__ == "__main__":
    # By its full name: a step is found, and pickled, under it.
    from tests.hosts import programs

    getattr(programs, sys.argv[1])(**json.loads(sys.argv[2]))
