"""The service's voice: one thread, one ROUTER, every request of the native protocol.

This module carries messages; what they mean is in `streaming.handlers`. A request that cannot
be answered yet is parked and tried again when its stream changes, a lease runs out, credit comes
back, or its time-out is over. The thread waits nowhere else and reads no disk, so no client can
hold up another.
"""

import logging
import math
import os
import sqlite3
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import zmq

from storage.catalog import Catalog
from storage.errors import AccessDenied, BufferFull, NearlineError, ProtocolError, SourceBusy
from storage.models import RunState
from storage.run_folder import RunFolder
from streaming import wire
from streaming.groups import GroupLog
from streaming.handlers import HANDLERS, Answer, Call, Client, Desk
from streaming.handlers.desk import LATER, NO_PAYLOAD, bounded, failure
from streaming.handlers.runs import hello
from streaming.handlers.sharing import take_back
from streaming.live_stream import StreamKey
from streaming.recorder import Recorder
from streaming.worker import Worker

__all__ = ["Server"]

log = logging.getLogger("nearline.server")

_SAVE_GROUPS_S = 0.05
_IDLE_POLL_S = 1.0
_LOOK_AGAIN_S = 0.2
_MAX_WAIT_S = 3600.0
_KEEP_CLIENTS = 4096
# Requests waiting for their answer: of one client, and the frames of all producers together.
_MOST_PARKED = 64
_MOST_ANSWERS_QUEUED = 256
_MOST_PARKED_BYTES = 1 << 30
_MOST_RECEIVED_AT_ONCE = 256


@dataclass(slots=True)
class _Inbox:
    """What other threads leave for the server thread, and the pipe that wakes it."""

    changed: set[StreamKey] = field(default_factory=set)
    errands: list[Callable[[], None]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    pipe: tuple[int, int] = field(default_factory=os.pipe)
    is_awake: bool = False

    def tell(self, key: StreamKey) -> None:
        """Something is new in a stream."""
        with self.lock:
            if key not in self.changed:
                self.changed.add(key)
                self._wake()

    def leave(self, errand: Callable[[], None]) -> None:
        """Something to be done in the server thread."""
        with self.lock:
            self.errands.append(errand)
            self._wake()

    def ring(self) -> None:
        """Nothing but the wake-up."""
        with self.lock:
            self._wake()

    def _wake(self) -> None:
        # One byte is enough: the server thread itself must never block on a full pipe.
        if not self.is_awake:
            self.is_awake = True
            os.write(self.pipe[1], b"!")

    def take(self) -> tuple[set[StreamKey], list[Callable[[], None]]]:
        with self.lock:
            if self.is_awake:
                os.read(self.pipe[0], 1)
                self.is_awake = False
            changed, errands = self.changed, self.errands
            self.changed, self.errands = set(), []
            return changed, errands

    def close(self) -> None:
        """Nobody leaves anything any more."""
        with self.lock:
            self.is_awake = True
            for fd in self.pipe:
                os.close(fd)


class Server(threading.Thread):
    """Answers requests until `stop`.

    Parameters
    ----------
    admit : checks the token of a hello; gives what each later request is checked against.
    secure : puts encryption on the socket before it is bound.

    Raises
    ------
    SourceBusy : the address is in use; raised here, not in the thread.
    """

    def __init__(
        self,
        recorder: Recorder,
        catalog: Catalog,
        bind: str,
        status: Callable[[], dict[str, Any]],
        name: str,
        *,
        admit: Callable[[str | None], Any] = lambda token: None,
        secure: Callable[[Any], None] = lambda socket: None,
    ) -> None:
        super().__init__(name="server", daemon=True)
        self._recorder = recorder
        # The least recently heard of are forgotten first; one that is still there says hello again.
        self._clients: OrderedDict[bytes, Client] = OrderedDict()
        self._parked: list[Call] = []
        self._parked_bytes = 0
        self._inbox = _Inbox()
        self._is_stopping = False
        self._socket = _bound(bind, secure, self._inbox)
        self.address: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._group_log = GroupLog(recorder.root / "groups.sqlite")
        try:
            self._group_log.forget_runs(lambda experiment, run: _is_gone(recorder.root / experiment / str(run)))
        except (sqlite3.Error, OSError) as error:
            log.warning("could not look for groups of runs that are no more: %s", error)
        self.desk = Desk(
            recorder=recorder,
            catalog=catalog,
            librarian=Worker("librarian"),
            intake=Worker("intake"),
            group_log=self._group_log,
            do_later=self._inbox.leave,
            send=self._answer,
            changed=self._inbox.tell,
            hasten=self._hasten,
            status=status,
            admit=admit,
            name=name,
            session=uuid.uuid4().hex,
        )

    # ---- called from other threads --------------------------------------------------------------

    def changed(self, key: StreamKey) -> None:
        """Something is new in a stream: look at the requests that wait for it."""
        self._inbox.tell(key)

    @property
    def n_clients(self) -> int:
        return len(self._clients)

    def group_rows(self) -> list[dict[str, Any]]:
        """The groups that somebody has asked for lately, as rows of the service's status."""
        rows = []
        for (experiment, run, data_source, name), group in list(self.desk.groups.items()):
            live = self._recorder.find((experiment, run, data_source))
            if live is not None:
                leased = [one for one in group.unacknowledged() if one.is_leased]
                rows.append(
                    {
                        "experiment": experiment,
                        "run": run,
                        "data_source": data_source,
                        "group": name,
                        "lag": group.lag(live.store.states),
                        "leases": len(leased),
                        "members": len({one.member for one in leased}),
                        "dead_letters": len(group.dead_letters),
                    }
                )
        return rows

    def discard(self) -> None:
        """Close a server that was never started."""
        self._socket.close()
        self._group_log.close()
        self._inbox.close()

    def stop(self) -> None:
        """Give everyone who waits the last word, then close."""
        self.desk.intake.stop()
        self.desk.librarian.stop()
        self._is_stopping = True
        self._inbox.ring()
        self.join()

    def start(self) -> None:
        self.desk.librarian.start()
        self.desk.intake.start()
        super().start()

    # ---- the thread -----------------------------------------------------------------------------

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._inbox.pipe[0], zmq.POLLIN)
        self._load_groups()
        last_save = time.monotonic()
        while not self._is_stopping:
            ready = dict(poller.poll(int(1000 * self._poll_seconds()) + 1))
            if self._inbox.pipe[0] in ready:
                self._take_inbox()
            if self._socket in ready:
                self._receive_all(until=last_save + _SAVE_GROUPS_S)
            self._retry_overdue()
            if time.monotonic() - last_save > _SAVE_GROUPS_S:
                self._save_groups()
                last_save = time.monotonic()
        self._say_goodbye()
        self._save_groups(is_last=True)
        self._group_log.close()
        self._socket.close()
        self._inbox.close()

    def _load_groups(self) -> None:
        """Those of streams that go on: a group that nobody asks for after a restart is one to be told of."""
        try:
            for stream in self._recorder.streams():
                if stream.is_open:
                    for name in self._group_log.names(stream.key):
                        self.desk.group(wire.StreamRef(*stream.key), name)
        except sqlite3.Error as error:
            log.warning("could not look for the groups of streams that go on: %s", error)

    def _take_inbox(self) -> None:
        changed, errands = self._inbox.take()
        for errand in errands:
            errand()
        self._retry(changed)

    def _say_goodbye(self) -> None:
        """Answer everyone who waits with the last state there is."""
        for call in self._parked:
            call.deadline = 0.0
        self._take_inbox()
        self._retry_overdue()

    def _save_groups(self, *, is_last: bool = False) -> None:
        """Keep the groups' state, and forget idle groups: they are loaded again when someone asks."""
        try:
            self._group_log.save(self.desk.groups, is_last=is_last)
        except sqlite3.Error as error:  # a full disk, mostly; they stay dirty and are tried again
            log.error("could not save the consumer groups: %s", error)
            return
        self.desk.forget_idle_groups()

    def _poll_seconds(self) -> float:
        """Until the next thing that happens by itself: a time-out, a lease running out, a save, a look."""
        now = time.monotonic()
        times = [call.deadline for call in self._parked] + list(self._awaited_leases().values())
        if any(group.is_dirty for group in self.desk.groups.values()):
            times.append(now + _SAVE_GROUPS_S)
        if any(self.desk.is_watched(call.key) for call in self._parked):
            times.append(now + _LOOK_AGAIN_S)
        return min(max(min(times, default=now + _IDLE_POLL_S) - now, 0.0), _IDLE_POLL_S)

    def _awaited_leases(self) -> dict[StreamKey, float]:
        """When a lease runs out, or a delay ends, that somebody waits for; by stream."""
        found: dict[StreamKey, float] = {}
        waiting = {(*c.key, c.request.group) for c in self._parked if c.key and isinstance(c.request, wire.NextFrames)}
        for key in waiting - self.desk.fetching:
            group = self.desk.groups.get(key)
            moment = group.next_event() if group else None
            if moment is not None:
                found[key[:3]] = min(moment, found.get(key[:3], moment))
        return found

    def _receive_all(self, until: float) -> None:
        """What has come; on a busy machine that takes long, and acknowledgements have to reach the disk in time."""
        for n_received in range(_MOST_RECEIVED_AT_ONCE):
            if n_received and time.monotonic() > until:
                return
            try:
                identity, *parts = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            except ValueError:
                continue
            self._handle(identity.bytes, parts)

    def _handle(self, identity: bytes, parts: list[zmq.Frame]) -> None:
        try:
            if not parts:
                raise ProtocolError("empty message")
            request = wire.decode_request(parts[0].buffer)
        except ProtocolError as error:
            self._recorder.n_rejected_messages += 1
            self._send(identity, failure(0, error))
            return
        client = self._clients.get(identity)
        if isinstance(request, wire.Hello):
            self._hello(identity, client, request)
        elif client is None:
            # After a restart, mostly: the client says hello and asks again.
            self._send(identity, (wire.SayHello(id=request.id), NO_PAYLOAD))
        else:
            self._clients.move_to_end(identity)
            self._take(Call(identity, client, request, parts[1:], self._deadline(request), _key_of(request)))

    def _hello(self, identity: bytes, client: Client | None, request: wire.Hello) -> None:
        """A client introduces itself, or asks whether this is still the service it knows."""
        if client is not None and request.is_anew:
            self._forget_parked(client)
            client = None
        call = Call(identity, client or Client(), request, [], 0.0)
        try:
            answer = hello(self.desk, call)
        except NearlineError as error:
            self._send(identity, failure(request.id, error))
            return
        self._clients[identity] = call.client
        if len(self._clients) > _KEEP_CLIENTS:
            self._clients.popitem(last=False)
        self._send(identity, answer)

    @staticmethod
    def _deadline(request: Any) -> float:
        # A producer waits for room, however long that takes.
        if isinstance(request, wire.PutFrames):
            return math.inf
        return time.monotonic() + bounded(getattr(request, "timeout_s", 0.0), 0.0, _MAX_WAIT_S)

    def _take(self, call: Call) -> None:
        client = call.client
        self._recorder.metrics.requests.add()
        client.received_bytes = min(max(client.received_bytes, call.request.received_bytes), client.sent_bytes)
        if client.credit <= 0:
            self._refuse_unread(client)
        elif not self._try(call):
            self._park(call)

    def _refuse_unread(self, client: Client) -> None:
        """A client that asks on without reading its answers: even a refusal would be one more of them."""
        client.n_refused += 1
        self._recorder.n_rejected_messages += 1
        if client.n_refused == 1:
            log.error("a client asks on without reading its answers; it gets none until it has read")

    def _park(self, call: Call) -> None:
        """Keep a request for later, within bounds of what one client and all together may have waiting."""
        if call.client.n_parked >= _MOST_PARKED or self._parked_bytes + call.payload_bytes > _MOST_PARKED_BYTES:
            error = BufferFull("too much is waiting at this service already; read the answers, then ask again")
            self._send(call.identity, failure(call.request.id, error))
            return
        call.client.n_parked += 1
        self._parked_bytes += call.payload_bytes
        self._parked.append(call)

    def _forget_parked(self, client: Client) -> None:
        """A client whose link broke asks again for all that it waits for."""
        forgotten = [call for call in self._parked if call.client is client]
        self._parked_bytes -= sum(call.payload_bytes for call in forgotten)
        self._parked = [call for call in self._parked if call.client is not client]

    def _hasten(self, client: Client) -> None:
        """The client waits no longer: what it has parked is overdue."""
        for call in self._parked:
            if call.client is client:
                call.deadline = 0.0

    def _retry(self, changed: set[StreamKey]) -> None:
        """Try again what waits for these streams, and producers, who wait for room that any stream may have freed."""
        if not self._parked:
            return
        waiting, self._parked = self._parked, []
        for call in waiting:
            is_due = call.key in changed or isinstance(call.request, wire.PutFrames)
            if is_due and self._try(call):
                call.client.n_parked -= 1
                self._parked_bytes -= call.payload_bytes
            else:
                self._parked.append(call)

    def _retry_overdue(self) -> None:
        """Parked requests whose time is over, whose group has a lease run out, or whose writer is elsewhere."""
        now = time.monotonic()
        due = {c.key for c in self._parked if c.key and (c.deadline <= now or self.desk.is_watched(c.key))}
        due |= {key for key, moment in self._awaited_leases().items() if moment <= now}
        if due:
            self._retry(due)

    def _try(self, call: Call) -> bool:
        """Answer if possible; False to keep waiting."""
        handler = HANDLERS[type(call.request)]
        try:
            call.require(handler.scope, call.key[0] if call.key else getattr(call.request, "experiment", None))
            answer = handler.answer(self.desk, call)
        except NearlineError as error:
            if isinstance(error, AccessDenied):
                self._recorder.metrics.requests_denied.add()
            answer = failure(call.request.id, error)
        except Exception as error:
            log.exception("request %s failed", type(call.request).__name__)
            answer = failure(call.request.id, NearlineError(f"the service failed on this request: {error}"))
        if answer is None:
            return False
        if answer is not LATER:
            self._answer(call, answer)
        return True

    def _answer(self, call: Call, answer: Answer) -> None:
        reply = answer[0]
        if not self._send(call.identity, answer, call.client):
            take_back(self.desk, call.request, reply)
        elif isinstance(reply, wire.Frames):
            self._recorder.metrics.frames_delivered.add(len(reply.infos))
            self._recorder.metrics.bytes_delivered.add(sum(info.size_bytes for info in reply.infos))

    def _send(self, identity: bytes, answer: Answer, client: Client | None = None) -> bool:
        """Hand an answer to the socket; False when its client is gone."""
        reply, payload = answer
        header = wire.encode(reply)
        try:
            if payload:
                self._socket.send_multipart([identity, header, *payload], zmq.NOBLOCK, copy=False)
            else:
                self._socket.send_multipart([identity, header], zmq.NOBLOCK)
        except zmq.Again:
            if client is not None:
                self._refuse_unread(client)
            return False
        except zmq.ZMQError as error:
            log.info("could not answer a client, it is gone: %s", error)
            self._clients.pop(identity, None)
            return False
        if client is not None:
            client.sent_bytes += len(header) + sum(memoryview(part).nbytes for part in payload)
        return True


def _bound(bind: str, secure: Callable[[Any], None], inbox: _Inbox) -> "zmq.Socket[bytes]":
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
    socket.setsockopt(zmq.LINGER, 500)
    socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
    socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
    # Without it a ROUTER drops silently: it tells when a client is gone, so that what was leased to it
    # goes to another at once, and when one does not read. The byte window bounds an honest client
    # much earlier; the number of messages bounds one that lies about what it has read.
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.SNDHWM, _MOST_ANSWERS_QUEUED)
    secure(socket)
    try:
        socket.bind(bind)
    except zmq.ZMQError as error:
        socket.close()
        inbox.close()
        raise SourceBusy(
            f"cannot listen on {bind}: {error.strerror}; another service may be running there, "
            "stop it or choose another address with --bind"
        ) from error
    return socket


def _is_gone(path: Path) -> bool:
    """Whether there is no such run, or none of its frames; not where a whole experiment cannot be seen."""
    if not path.exists():
        return path.parent.is_dir()
    try:
        return RunFolder.open(path).state is RunState.deleted
    except NearlineError:  # damaged; that can be mended
        return False


def _key_of(request: Any) -> StreamKey | None:
    stream = getattr(request, "stream", None)
    return stream.key if stream is not None else None
