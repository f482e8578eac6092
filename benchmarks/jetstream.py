"""A peer: NATS JetStream, with Debian's server and the Python client.

Asynchronous publishes within a window, each acknowledged by the server; a durable pull consumer
that fetches in batches and acknowledges each message. File storage: a message is written before
it is acknowledged, and synced by ``sync_interval`` (2 minutes if not set). Servers before 2.10
know no other: nothing there is comparable to *durable*.
"""

import asyncio
import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nats
from nats.aio.client import Client
from nats.js.api import AckPolicy, ConsumerConfig, StorageType

from benchmarks.frames import FramesLost
from benchmarks.program import find_program
from benchmarks.redis_streams import window
from nearline.children import Children, free_port
from streaming.client import is_reachable

__all__ = ["ALWAYS", "PROGRAM", "JetStream", "knows", "send"]

PROGRAM = "nats-server"
ALWAYS = "sync_interval: always"
_STREAM, _SUBJECT, _GROUP = "frames", "frames.eiger", "bench"
_LARGEST_PAYLOAD = "64MB"
_PATIENCE_S = 30.0


def _configuration(port: int, folder: Path, sync: str) -> str:
    return (
        f"listen: 127.0.0.1:{port}\nmax_payload: {_LARGEST_PAYLOAD}\nmax_pending: 256MB\n"
        f'jetstream {{\n  store_dir: "{folder.absolute()}"\n  max_file_store: 64GB\n  {sync}\n}}\n'
    )


def knows(sync: str, folder: Path) -> bool:
    """Whether the server that is installed takes this setting of its store."""
    path, program = folder / "try.conf", find_program(PROGRAM)
    path.write_text(_configuration(4222, folder, sync))
    return program is not None and subprocess.run([program, "-t", "-c", path], capture_output=True).returncode == 0


def send(port: int, blobs: Sequence[bytes], n: int) -> dict[str, int]:
    """Publish n messages, a window of them unacknowledged at a time: monotonic ns of first and of last answer."""
    return asyncio.run(_send(port, blobs, n))


async def _send(port: int, blobs: Sequence[bytes], n: int) -> dict[str, int]:
    connection = await _connect(port)
    stream = connection.jetstream(publish_async_max_pending=window(blobs))
    futures, first_ns = [], time.monotonic_ns()
    for index in range(n):
        futures.append(await stream.publish_async(_SUBJECT, blobs[index % len(blobs)]))
    for future in futures:
        await future  # or the server's error
    last_ns = time.monotonic_ns()
    await connection.close()
    return {"first_ns": first_ns, "last_ns": last_ns}


async def _connect(port: int) -> Client:
    return await nats.connect(f"nats://127.0.0.1:{port}", allow_reconnect=False)


class JetStream:
    """A server of its own in ``folder``, and its consumer in this process."""

    def __init__(self, name: str, children: Children, folder: Path, sync: str) -> None:
        folder.mkdir(parents=True)
        self.port, self._children, self._name = free_port(), children, name
        configuration = folder / "server.conf"
        configuration.write_text(_configuration(self.port, folder, sync))
        children.start(name, ["benchmarks.program", PROGRAM, "-c", str(configuration)], os.environ)
        self._wait_until_up()
        # One event loop for the life of the connection.
        self._runner = asyncio.Runner()
        self._connection = self._runner.run(_connect(self.port))
        self._subscription: Any = None

    def begin(self) -> None:
        """An empty stream with its durable consumer."""
        self._runner.run(self._begin())

    def drain(self, n: int, blobs: Sequence[bytes]) -> int:
        """Take and acknowledge n messages: monotonic ns of the last one's coming."""
        return self._runner.run(self._drain(n, blobs))

    def close(self) -> None:
        self._runner.run(self._connection.close())
        self._runner.close()

    async def _begin(self) -> None:
        stream = self._connection.jetstream()
        if self._subscription is not None:
            await self._subscription.unsubscribe()
            await stream.delete_stream(_STREAM)
        await stream.add_stream(name=_STREAM, subjects=[_SUBJECT], storage=StorageType.FILE)
        config = ConsumerConfig(ack_policy=AckPolicy.EXPLICIT, max_ack_pending=10_000)
        self._subscription = await stream.pull_subscribe(
            _SUBJECT, durable=_GROUP, stream=_STREAM, config=config, pending_bytes_limit=1 << 30
        )

    async def _drain(self, n: int, blobs: Sequence[bytes]) -> int:
        seen, n_bytes, at_once = 0, 0, window(blobs)
        while seen < n:
            messages = await self._subscription.fetch(min(at_once, n - seen), timeout=_PATIENCE_S)
            last_ns = time.monotonic_ns()
            for message in messages:
                n_bytes += len(message.data)
                await message.ack()
            seen += len(messages)
        await self._connection.flush()
        if n_bytes != sum(len(blobs[index % len(blobs)]) for index in range(n)):
            raise FramesLost(f"{n} messages came through NATS with {n_bytes} bytes: not those that were sent")
        return last_ns

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while not is_reachable(f"tcp://127.0.0.1:{self.port}"):
            self._children.check(self._name)
            if time.monotonic() > deadline:
                raise TimeoutError(f"{PROGRAM} did not get ready in {_PATIENCE_S:g} s")
            time.sleep(0.02)
