"""A peer: Redis Streams, with Debian's server and the Python client.

The sender keeps a window of XADDs under way, the consumer group is read in batches and
acknowledged with the request for the next batch. The server's file is appended to before a
reply: ``appendfsync everysec`` syncs it within a second, ``always`` before the reply. It keeps
all messages in memory, as Redis does.
"""

import os
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import redis

from benchmarks.frames import FramesLost
from nearline.children import Children, free_port

__all__ = ["PROGRAM", "RedisStreams", "send", "window"]

PROGRAM = "redis-server"
_STREAM, _GROUP, _FIELD = "frames", "bench", b"blob"
# Messages under way from the sender and in one answer to the consumer; small ones come in larger batches.
_WINDOW_BYTES, _MOST_AT_ONCE = 16 << 20, 1000
# The client reads 32 kB at a time unless told otherwise: too little for frames.
_READ_BYTES = 1 << 20
_PATIENCE_S = 30.0


def _client(port: int) -> redis.Redis:
    return redis.Redis(
        host="127.0.0.1", port=port, protocol=2, socket_read_size=_READ_BYTES, socket_timeout=_PATIENCE_S
    )


def window(blobs: Sequence[bytes]) -> int:
    """How many messages go at once."""
    return max(min(_WINDOW_BYTES // max(len(blob) for blob in blobs), _MOST_AT_ONCE), 1)


def send(port: int, blobs: Sequence[bytes], n: int) -> dict[str, int]:
    """Add n messages, a window of them unacknowledged at a time: monotonic ns of first and of last answer."""
    client = _client(port)
    connection, under_way, first_ns = client.connection_pool.get_connection(), 0, time.monotonic_ns()
    for index in range(n):
        if under_way == window(blobs):
            connection.read_response()
            under_way -= 1
        connection.send_command("XADD", _STREAM, "*", _FIELD, blobs[index % len(blobs)])
        under_way += 1
    for _ in range(under_way):
        connection.read_response()
    last_ns = time.monotonic_ns()
    client.connection_pool.release(connection)
    client.close()
    return {"first_ns": first_ns, "last_ns": last_ns}


class RedisStreams:
    """A server of its own in ``folder``, and its consumer in this process."""

    def __init__(self, children: Children, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.port, self._children = free_port(), children
        settings = {
            "port": self.port, "bind": "127.0.0.1", "dir": folder.absolute(), "save": "", "appendonly": "yes",
            "auto-aof-rewrite-percentage": 0, "loglevel": "warning",
        }  # fmt: skip
        options = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
        children.start(PROGRAM, ["benchmarks.program", PROGRAM, *options], os.environ)
        self._client = _client(self.port)
        self._wait_until_up()

    def begin(self, sync: Literal["everysec", "always", "no"]) -> None:
        """An empty stream with its group, synced to disk in this way."""
        client = self._client
        client.delete(_STREAM)
        # Switched off and on, it begins a new file: the last series need not stay on disk.
        client.config_set("appendonly", "no")
        client.config_set("appendonly", "yes")
        while client.info("persistence")["aof_rewrite_in_progress"]:
            time.sleep(0.02)
        client.config_set("appendfsync", sync)
        client.xgroup_create(_STREAM, _GROUP, id="0", mkstream=True)

    def drain(self, n: int, blobs: Sequence[bytes]) -> int:
        """Take and acknowledge n messages as one member of the group: monotonic ns of the last one's coming."""
        connection = self._client.connection_pool.get_connection()
        count, seen, n_bytes = window(blobs), 0, 0
        done: deque[Any] = deque()
        while seen < n:
            n_replies = 0
            if done:
                connection.send_command("XACK", _STREAM, _GROUP, *done)
                done.clear()
                n_replies = 1
            block = int(1000 * _PATIENCE_S / 2)
            connection.send_command(
                "XREADGROUP", "GROUP", _GROUP, "member", "COUNT", count, "BLOCK", block, "STREAMS", _STREAM, ">"
            )
            for _ in range(n_replies):
                connection.read_response()
            answer = connection.read_response()
            if not answer:
                raise FramesLost(f"{seen} of {n} messages came through Redis, then none for {block} ms")
            for number, fields in answer[0][1]:
                done.append(number)
                n_bytes += len(fields[1])
            seen += len(answer[0][1])
        last_ns = time.monotonic_ns()
        connection.send_command("XACK", _STREAM, _GROUP, *done)
        connection.read_response()
        self._client.connection_pool.release(connection)
        if n_bytes != sum(len(blobs[index % len(blobs)]) for index in range(n)):
            raise FramesLost(f"{n} messages came through Redis with {n_bytes} bytes: not those that were sent")
        return last_ns

    def close(self) -> None:
        self._client.close()

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + _PATIENCE_S
        while True:
            self._children.check(PROGRAM)
            try:
                self._client.ping()
                return
            except redis.ConnectionError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(0.02)
