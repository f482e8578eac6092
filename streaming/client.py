"""A connection to a service: one DEALER socket, several requests under way if wanted.

Every request may be repeated: sendings carry (producer, sequence), runs a key. So a service that
was restarted is simply asked again, and whoever waits for an answer need not know.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import zmq

import storage.errors
from storage.errors import Interrupted, NearlineError, ProtocolError, ServiceUnavailable
from streaming import wire
from streaming.payload import split_payload
from streaming.security import find_credentials, secure_client

__all__ = ["Client", "Connection", "is_reachable"]

_CONNECT_S = 5.0
_EXTRA_S = 30.0
_POLL_MS = 200
# A silent service is greeted this often, and waited for when nothing has listened there for so long: a restart takes a
# few seconds.
_GREET_S = 1.0
_PATIENCE_S = 10.0
# A link that carries nothing any more without either end being told (a cable, a switch, a firewall that forgets) is
# asked this often, and given up after so long: then ZeroMQ connects anew. Without it the kernel would wait up to
# 15 minutes for data that it has sent, and for ever if it has sent none.
_HEARTBEAT_MS, _HEARTBEAT_TIMEOUT_MS = 3000, 10_000
_LOOK_AT_LINK_S = 0.2
# Greetings: of a service that has been silent, and over a new link, after which everything is asked again.
_HELLO, _HELLO_ANEW = -1, -2

Reply = tuple[Any, list[zmq.Frame]]


@dataclass(slots=True)
class _Asked:
    """A request under way, as it will be repeated if need be."""

    request: Any
    payload: list[Any]


class Connection:
    """One client of one service, to be used by one thread at a time.

    Parameters
    ----------
    token, server_key : what to show to the service, and the key it must have; by default what
        `streaming.security.find_credentials` finds for its address.
    stop : when set, whoever waits for an answer gets `Interrupted` within 0.2 s.

    Raises
    ------
    ServiceUnavailable : nothing answers there, or it stopped answering.
    AccessDenied : the service wants a token, or another one.
    """

    def __init__(
        self,
        address: str,
        *,
        token: str | None = None,
        server_key: str | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        credentials = find_credentials(address)
        self.address, self.stop = address, stop
        self._token = token if token is not None else credentials.token
        self._received_bytes = 0
        self._last_id = 0
        self._session: str | None = None
        self._asked: dict[int, _Asked] = {}
        self._answered: dict[int, Reply] = {}
        self._unheard: set[int] = set()
        self._heard_at = self._greeted_at = self._looked_at = time.monotonic()
        self._is_broken = False
        self._absent_since: float | None = None
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.IDENTITY, os.urandom(12).hex().encode())
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
        self._monitor: zmq.Socket[bytes] = self._socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        if server_key or credentials.server_key:
            secure_client(self._socket, server_key or credentials.server_key or "")
        self._socket.connect(address)
        try:
            self._greet_first()
        except BaseException:
            self.close()
            raise

    # ---- one request at a time ------------------------------------------------------------------

    def ask(self, request: Any, payload: list[Any] | None = None, timeout: float | None = None) -> Reply:
        """Send a request and wait for its answer: (reply, payload parts).

        Raises
        ------
        The service's own error for this request, ServiceUnavailable or Interrupted.
        """
        number = self.send(request, payload)
        return self.wait(number, getattr(request, "timeout_s", 0.0) + _EXTRA_S if timeout is None else timeout)

    def ask_json(self, request: Any) -> Any:
        """The body of an answer that is JSON."""
        reply, _ = self.ask(request)
        return json.loads(reply.body)

    def ask_frames(self, request: Any) -> tuple[wire.Frames, list[Any]]:
        """An answer with frames: the reply and each frame's bytes."""
        reply, parts = self.ask(request)
        return reply, split_payload(reply.infos, parts)

    # ---- several under way ------------------------------------------------------------------------

    def send(self, request: Any, payload: list[Any] | None = None) -> int:
        """Send a request without waiting; its number."""
        self._last_id += 1
        request.id = self._last_id
        if not self._asked:
            self._heard_at, self._absent_since = time.monotonic(), None  # nothing was awaited before
        asked = self._asked[request.id] = _Asked(request, payload or [])
        self._transmit(asked)
        return self._last_id

    def wait(self, number: int, timeout: float) -> Reply:
        """The answer to a request under way, as `ask`."""
        return self.take(self.wait_any([number], timeout))

    def wait_any(self, numbers: Sequence[int], timeout: float) -> int:
        """Which of several requests under way was answered first; `take` has the answer. Errors as of `ask`."""
        deadline = time.monotonic() + timeout
        while (first := next((n for n in self._answered if n in numbers), None)) is None:
            if not self.pump(min(max(deadline - time.monotonic(), 0.0), _POLL_MS / 1000)):
                if self.stop is not None and self.stop.is_set():
                    raise Interrupted("stopped waiting, as asked")
                if time.monotonic() > deadline:
                    for number in numbers:
                        self.forget(number)
                    raise self._unavailable()
        return first

    def take(self, number: int) -> Reply:
        """An answer that is there; its error, if it is one."""
        reply, parts = self._answered.pop(number)
        if isinstance(reply, wire.Failure):
            raise _error_of(reply)
        return reply, parts

    def has_answer(self, number: int) -> bool:
        return number in self._answered

    def forget(self, number: int) -> None:
        """Nobody wants the answer any more."""
        self._asked.pop(number, None)
        self._answered.pop(number, None)

    def pump(self, timeout_s: float) -> bool:
        """Take in what has come, waiting for it up to ``timeout_s``; whether anything did."""
        self._mind_link()
        if not self._socket.poll(int(1000 * timeout_s)):
            self._mind_silence()
            return False
        while True:
            try:
                header, *parts = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return True
            self._received_bytes += len(header) + sum(len(part) for part in parts)
            self._heard_at, self._absent_since = time.monotonic(), None
            self._sort(wire.decode_reply(header.buffer), parts)

    @property
    def socket(self) -> "zmq.Socket[bytes]":
        """For a poller that waits for several things."""
        return self._socket

    def close(self) -> None:
        if not self._socket.closed:
            self._socket.disable_monitor()
            self._monitor.close()
            self._socket.close()

    def __del__(self) -> None:
        # A thread's connection ends with the thread, without anyone to close it.
        if hasattr(self, "_monitor"):
            self.close()

    # ---- a service that comes and goes ----------------------------------------------------------

    def _greet_first(self) -> None:
        deadline = time.monotonic() + _CONNECT_S
        self._greet()
        while self._session is None:
            if self.pump(_POLL_MS / 1000):
                continue
            now = time.monotonic()
            if now > deadline:
                raise self._unavailable()
            if now - self._greeted_at > _GREET_S:
                if self._is_absent(now):
                    deadline = now + _CONNECT_S  # it may be about to start again
                self._greet()  # the one before may have died with its service

    def _greet(self) -> None:
        self._greeted_at = time.monotonic()
        number = _HELLO_ANEW if self._is_broken else _HELLO
        hello = wire.Hello(id=number, protocol=wire.PROTOCOL, token=self._token, is_anew=self._is_broken)
        self._transmit(_Asked(hello, []))

    def _sort(self, reply: Any, parts: list[zmq.Frame]) -> None:
        if isinstance(reply, wire.Welcome):
            self._welcomed(reply)
        elif isinstance(reply, wire.SayHello):
            if not self._unheard:
                self._greet()
            self._unheard.add(reply.id)
        elif isinstance(reply, wire.Failure) and reply.id <= 0:
            # A greeting that was refused, or a request that could not even be read.
            raise _error_of(reply)
        elif self._asked.pop(reply.id, None) is not None:
            self._answered[reply.id] = (reply, parts)

    def _welcomed(self, reply: wire.Welcome) -> None:
        """The same service: repeat what it had not heard. Another life of it, or a new link: repeat everything."""
        is_new, is_first = reply.session != self._session, self._session is None
        self._session = reply.session
        unheard, self._unheard = self._unheard, set()
        if reply.id == _HELLO_ANEW or (is_new and not is_first):
            self._is_broken = self._is_broken and reply.id != _HELLO_ANEW
            self._received_bytes = 0  # credit begins anew with the service
            unheard = set(self._asked)
        for number in sorted(unheard & self._asked.keys()):
            self._transmit(self._asked[number])

    def _mind_link(self) -> None:
        """Greet a service anew whose link broke: questions or answers may have been lost with it."""
        now = time.monotonic()
        if now - self._looked_at < _LOOK_AT_LINK_S:
            return
        self._looked_at = now
        was_broken = self._is_broken
        with suppress(zmq.Again):
            while True:
                self._monitor.recv_multipart(zmq.NOBLOCK)
                self._is_broken, was_broken = True, False
        if self._is_broken and not was_broken and self._session is not None:
            self._greet()

    def _mind_silence(self) -> None:
        """Greet a service that has long said nothing: it answers at once if it is there."""
        now = time.monotonic()
        if not self._asked or now - max(self._heard_at, self._greeted_at) < _GREET_S:
            return
        if self._greeted_at > self._heard_at:
            self._is_absent(now)
        self._greet()

    def _is_absent(self, now: float) -> bool:
        """Whether nothing listens there now; ServiceUnavailable if so at every look for long."""
        # Not longer than whoever wants to stop may wait; one look that is wrong counts for nothing.
        if is_reachable(self.address, timeout_s=_POLL_MS / 1000):
            self._absent_since = None
            return False
        self._absent_since = now if self._absent_since is None else self._absent_since
        if now - self._absent_since > _PATIENCE_S:
            raise self._unavailable()
        return True

    def _transmit(self, asked: _Asked) -> None:
        asked.request.received_bytes = self._received_bytes
        try:
            parts = [wire.encode(asked.request), *asked.payload]
            self._socket.send_multipart(parts, zmq.NOBLOCK, copy=not asked.payload)
        except zmq.Again:
            raise self._unavailable() from None

    def _unavailable(self) -> ServiceUnavailable:
        return ServiceUnavailable(
            f"no answer from a Nearline service at {self.address}; start one with `nearline serve`, "
            "or give its address (NEARLINE_SERVICE); one that encrypts answers only to those who have its key "
            "(NEARLINE_SERVER_KEY, printed by `nearline token key`)"
        )


class Client:
    """A service seen from a program: a connection for each thread that uses it."""

    def __init__(self, address: str, *, token: str | None = None) -> None:
        if not is_reachable(address):
            raise ServiceUnavailable(
                f"nothing listens at {address}; start a service with `nearline serve`, "
                "or give its address (NEARLINE_SERVICE)"
            )
        self.address = address
        self._token = token
        self._local = threading.local()

    @property
    def connection(self) -> Connection:
        """This thread's own connection."""
        found = getattr(self._local, "connection", None)
        if found is None:
            found = self._local.connection = self.new_connection()
        return found

    def new_connection(self, stop: threading.Event | None = None) -> Connection:
        """A connection of its own, for something that waits long."""
        return Connection(self.address, token=self._token, stop=stop)


def is_reachable(address: str, timeout_s: float = 2.0) -> bool:
    """Whether anything accepts connections there; answers at once where ZMQ would wait for ever."""
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    if not address.startswith("tcp://") or not port.isdecimal():
        raise ProtocolError(f"{address!r} is not a service address; write tcp://host:port")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s):
            return True
    except OSError:
        return False


def _error_of(reply: wire.Failure) -> NearlineError:
    kind = getattr(storage.errors, reply.error, NearlineError)
    is_ours = isinstance(kind, type) and issubclass(kind, NearlineError)
    return kind(reply.message) if is_ours else NearlineError(reply.message)
