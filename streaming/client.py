"""A connection to a service: one DEALER socket, requests answered in turn."""

import json
import os
import socket
import threading
import time
from typing import Any

import zmq

import storage.errors
from storage.errors import NearlineError, ProtocolError, ServiceUnavailable
from streaming import wire
from streaming.payload import split_payload

__all__ = ["Client", "Connection", "is_reachable"]

_CONNECT_S = 5.0
_EXTRA_S = 30.0
_POLL_MS = 200
# A silent service is looked for this often, and waited for so long when it is gone: a restart takes a few seconds.
_LOOK_S = 1.0
_PATIENCE_S = 10.0


class Connection:
    """One client of one service, to be used by one thread at a time.

    Raises
    ------
    ServiceUnavailable : nothing answers there, or it stopped answering.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self._received_bytes = 0
        self._last_id = 0
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.IDENTITY, os.urandom(12).hex().encode())
        self._socket.connect(address)
        try:
            self.ask(wire.Hello(id=0, protocol=wire.PROTOCOL), timeout=_CONNECT_S)
        except BaseException:
            self.close()
            raise

    def ask(
        self, request: Any, payload: list[Any] | None = None, timeout: float | None = None
    ) -> tuple[Any, list[zmq.Frame]]:
        """Send a request and wait for its answer: (reply, payload parts).

        Raises
        ------
        The service's own error for this request, or ServiceUnavailable.
        """
        self._send(request, payload)
        wait = getattr(request, "timeout_s", 0.0) + _EXTRA_S if timeout is None else timeout
        while True:
            reply, parts = self._receive(wait, request, payload)
            # A request that could not even be read is answered without its number.
            if reply.id in (self._last_id, 0):
                break
        if isinstance(reply, wire.Failure):
            raise _error_of(reply)
        return reply, parts

    def ask_json(self, request: Any) -> Any:
        """The body of an answer that is JSON."""
        reply, _ = self.ask(request)
        return json.loads(reply.body)

    def ask_frames(self, request: Any) -> tuple[wire.Frames, list[Any]]:
        """An answer with frames: the reply and each frame's bytes."""
        reply, parts = self.ask(request)
        return reply, split_payload(reply.infos, parts)

    def close(self) -> None:
        self._socket.close()

    def __del__(self) -> None:
        # A thread's connection ends with the thread, without anyone to close it.
        if hasattr(self, "_socket"):
            self._socket.close()

    def _send(self, request: Any, payload: list[Any] | None) -> None:
        self._last_id += 1
        request.id, request.received_bytes = self._last_id, self._received_bytes
        try:
            self._socket.send_multipart([wire.encode(request), *(payload or [])], zmq.NOBLOCK, copy=not payload)
        except zmq.Again:
            raise self._unavailable() from None

    def _receive(self, wait: float, request: Any, payload: list[Any] | None) -> tuple[Any, list[zmq.Frame]]:
        """The next reply; a service that was restarted meanwhile is asked again."""
        deadline, look_at, gone_since = time.monotonic() + wait, time.monotonic() + _LOOK_S, None
        while not self._socket.poll(_POLL_MS):
            now = time.monotonic()
            if now > deadline:
                raise self._unavailable()
            if now < look_at:
                continue
            look_at = now + _LOOK_S
            if not is_reachable(self.address):
                gone_since = gone_since or now
                if now - gone_since > _PATIENCE_S:
                    raise self._unavailable()
            elif gone_since is not None:
                gone_since = None
                self._ask_again(request, payload)
        header, *parts = self._socket.recv_multipart(copy=False)
        self._received_bytes += len(header) + sum(len(part) for part in parts)
        return wire.decode_reply(header.buffer), parts

    def _ask_again(self, request: Any, payload: list[Any] | None) -> None:
        """Repeat a request to a service that knows nothing of it; frames put twice are recognised there."""
        if isinstance(request, wire.StartRun):
            raise ServiceUnavailable(
                f"the service at {self.address} was restarted while a run was being started; "
                "look with `nearline runs` whether it exists, then start it again or another"
            )
        self._received_bytes = 0  # credit begins anew with the service
        self._send(wire.Hello(id=0, protocol=wire.PROTOCOL), None)
        self._send(request, payload)

    def _unavailable(self) -> ServiceUnavailable:
        return ServiceUnavailable(
            f"no answer from a Nearline service at {self.address}; start one with `nearline serve`, "
            "or give its address (NEARLINE_SERVICE)"
        )


class Client:
    """A service seen from a program: a connection for each thread that uses it."""

    def __init__(self, address: str) -> None:
        if not is_reachable(address):
            raise ServiceUnavailable(
                f"nothing listens at {address}; start a service with `nearline serve`, "
                "or give its address (NEARLINE_SERVICE)"
            )
        self.address = address
        self._local = threading.local()

    @property
    def connection(self) -> Connection:
        """This thread's own connection."""
        found = getattr(self._local, "connection", None)
        if found is None:
            found = self._local.connection = Connection(self.address)
        return found

    def new_connection(self) -> Connection:
        """A connection of its own, for something that waits long."""
        return Connection(self.address)


def is_reachable(address: str) -> bool:
    """Whether anything accepts connections there; answers at once where ZMQ would wait for ever."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if not address.startswith("tcp://") or not port.isdecimal():
        raise ProtocolError(f"{address!r} is not a service address; write tcp://host:port")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=2.0):
            return True
    except OSError:
        return False


def _error_of(reply: wire.Failure) -> NearlineError:
    kind = getattr(storage.errors, reply.error, NearlineError)
    is_ours = isinstance(kind, type) and issubclass(kind, NearlineError)
    return kind(reply.message) if is_ours else NearlineError(reply.message)
