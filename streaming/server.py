"""The service's voice: one thread, one ROUTER, every request of the native protocol.

A handler returns its reply, or None: then the request is parked and tried again when its
stream changes, a lease runs out, credit comes back, or its time-out is over. The thread does no
waiting anywhere else, so no client can hold up another.
"""

import json
import logging
import math
import os
import sqlite3
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zmq
from pydantic import ValidationError

from storage.errors import (
    BufferFull,
    CorruptFrame,
    NearlineError,
    ProtocolError,
    RunNotFound,
    SourceBusy,
    StreamNotOpen,
)
from storage.frame import RawFrame, meta_bytes
from storage.masks import read_plane
from storage.models import StreamHeader
from storage.names import check_name, check_run, run_key
from storage.run_folder import RunFolder
from storage.states import IndexStates, StreamLedger
from storage.stream_source import FolderSource, StreamStatus
from storage.stream_store import missing_frame
from streaming import wire
from streaming.groups import Group, GroupKey, GroupLog
from streaming.payload import glue_payload, split_payload
from streaming.recorder import LiveStream, Recorder, StreamKey

__all__ = ["Server"]

log = logging.getLogger("nearline.server")

_SAVE_GROUPS_S = 0.05
_IDLE_POLL_S = 1.0
_KEEP_FOLDERS = 32
_MAX_WAIT_S = 3600.0
_MOST_FRAMES_AT_ONCE = 4096
# What a row takes in an answer, about; so that rows without pixels use up credit too.
_ROW_BYTES = 256
_KEEP_CLIENTS = 4096
_KEEP_GROUPS = 256
_LEAST_WINDOW_BYTES = 1 << 20
# Requests waiting for their answer: of one client, and the frames of all producers together.
_MOST_PARKED = 16
_MOST_ANSWERS_QUEUED = 64
_MOST_BYTES_AN_ANSWER = 32 << 20
_MOST_PARKED_BYTES = 1 << 30
_NO_PAYLOAD: list[Any] = []
Answer = tuple[wire.Reply, list[Any]]
# The handler has arranged for the answer to be sent when the work is done.
_LATER: Answer = (wire.Reply(id=-1), _NO_PAYLOAD)


@dataclass(slots=True)
class _Client:
    """One connection: its window, how much of it is used, and what it waits for."""

    window_bytes: int = wire.WINDOW_BYTES
    sent_bytes: int = 0
    received_bytes: int = 0
    n_parked: int = 0
    n_refused: int = 0

    @property
    def credit(self) -> int:
        return self.window_bytes - (self.sent_bytes - self.received_bytes)


@dataclass(slots=True, eq=False)
class _Parked:
    """A request waiting for its answer."""

    identity: bytes
    client: _Client
    request: Any
    parts: list[Any]
    deadline: float
    key: StreamKey | None = None

    @property
    def payload_bytes(self) -> int:
        return sum(len(part) for part in self.parts)


@dataclass(slots=True)
class _Inbox:
    """What other threads leave for the server thread, and the pipe that wakes it."""

    changed: set[StreamKey] = field(default_factory=set)
    finished: list[tuple[bytes, Answer]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    pipe: tuple[int, int] = field(default_factory=os.pipe)
    is_awake: bool = False

    def wake(self) -> None:
        """With the lock held. One byte is enough: the server thread itself must never block on a full pipe."""
        if not self.is_awake:
            self.is_awake = True
            os.write(self.pipe[1], b"!")

    def take(self) -> tuple[set[StreamKey], list[tuple[bytes, Answer]]]:
        with self.lock:
            if self.is_awake:
                os.read(self.pipe[0], 1)
                self.is_awake = False
            changed, finished = self.changed, self.finished
            self.changed, self.finished = set(), []
            return changed, finished

    def close(self) -> None:
        """Nobody leaves anything any more."""
        with self.lock:
            self.is_awake = True
            for fd in self.pipe:
                os.close(fd)


class Server(threading.Thread):
    """Answers requests until `stop`.

    Raises
    ------
    SourceBusy : the address is in use; raised here, not in the thread.
    """

    def __init__(self, recorder: Recorder, bind: str, status: Callable[[], dict[str, Any]], name: str) -> None:
        super().__init__(name="server", daemon=True)
        self._recorder, self._status, self._service_name = recorder, status, name
        self._groups: OrderedDict[GroupKey, Group] = OrderedDict()
        # The least recently heard of are forgotten first; one that is still there begins anew with a full window.
        self._clients: OrderedDict[bytes, _Client] = OrderedDict()
        self._parked: list[_Parked] = []
        self._parked_bytes = 0
        self._folders: OrderedDict[StreamKey, FolderSource] = OrderedDict()
        self._inbox = _Inbox()
        self._is_stopping = False
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 500)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        # Without it a ROUTER drops silently: it tells when a client is gone, so that what was leased to it
        # goes to another at once, and when one does not read. The byte window bounds an honest client
        # much earlier; the number of messages bounds one that lies about what it has read.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.SNDHWM, _MOST_ANSWERS_QUEUED)
        try:
            self._socket.bind(bind)
        except zmq.ZMQError as error:
            self._socket.close()
            self._inbox.close()
            raise SourceBusy(
                f"cannot listen on {bind}: {error.strerror}; another service may be running there, "
                "stop it or choose another address with --bind"
            ) from error
        self.address: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)
        self._groups_log = GroupLog(recorder.root / "groups.sqlite")

    # ---- called from other threads --------------------------------------------------------------

    def changed(self, key: StreamKey) -> None:
        """Something is new in a stream: look at the requests that wait for it."""
        with self._inbox.lock:
            if key not in self._inbox.changed:
                self._inbox.changed.add(key)
                self._inbox.wake()

    def discard(self) -> None:
        """Close a server that was never started."""
        self._socket.close()
        self._groups_log.close()
        self._inbox.close()

    def stop(self) -> None:
        """Give everyone who waits the last word, then close."""
        with self._inbox.lock:
            self._is_stopping = True
            self._inbox.wake()
        self.join()

    def _answer_later(self, identity: bytes, reply: wire.Reply) -> None:
        with self._inbox.lock:
            self._inbox.finished.append((identity, (reply, _NO_PAYLOAD)))
            self._inbox.wake()

    # ---- the thread -----------------------------------------------------------------------------

    def run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._inbox.pipe[0], zmq.POLLIN)
        last_save = time.monotonic()
        while not self._is_stopping:
            ready = dict(poller.poll(int(1000 * self._poll_seconds()) + 1))
            if self._inbox.pipe[0] in ready:
                self._take_inbox()
            if self._socket in ready:
                self._receive_all()
            self._retry_overdue()
            if time.monotonic() - last_save > _SAVE_GROUPS_S:
                self._save_groups()
                last_save = time.monotonic()
        self._say_goodbye()
        self._save_groups()
        self._groups_log.close()
        self._socket.close()
        self._inbox.close()

    def _take_inbox(self) -> None:
        changed, finished = self._inbox.take()
        for identity, answer in finished:
            self._send(identity, answer)
        self._retry(changed)

    def _say_goodbye(self) -> None:
        """Answer everyone who waits with the last state there is."""
        for parked in self._parked:
            parked.deadline = 0.0
        self._take_inbox()
        self._retry_overdue()

    def _save_groups(self) -> None:
        """Keep the groups' state, and forget idle groups: they are loaded again when someone asks."""
        try:
            self._groups_log.save(self._groups)
        except sqlite3.Error as error:  # a full disk, mostly; they stay dirty and are tried again
            log.error("could not save the consumer groups: %s", error)
            return
        while len(self._groups) > _KEEP_GROUPS and not next(iter(self._groups.values())).leases:
            self._groups.popitem(last=False)

    def _poll_seconds(self) -> float:
        """Until the next thing that happens by itself: a time-out, a lease running out, a save."""
        now = time.monotonic()
        times = [p.deadline for p in self._parked] + list(self._awaited_leases().values())
        if any(g.is_dirty for g in self._groups.values()):
            times.append(now + _SAVE_GROUPS_S)
        return min(max(min(times, default=now + _IDLE_POLL_S) - now, 0.0), _IDLE_POLL_S)

    def _awaited_leases(self) -> dict[StreamKey, float]:
        """When a lease runs out that somebody waits for, by stream."""
        found: dict[StreamKey, float] = {}
        waiting = {(*p.key, p.request.group) for p in self._parked if p.key and isinstance(p.request, wire.NextFrames)}
        for key in waiting:
            group = self._groups.get(key)
            deadline = group.next_deadline() if group else None
            if deadline is not None:
                found[key[:3]] = min(deadline, found.get(key[:3], deadline))
        return found

    def _receive_all(self) -> None:
        for _ in range(256):
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
            self._send(identity, _failure(0, error))
            return
        client = self._client(identity)
        client.received_bytes = min(max(client.received_bytes, request.received_bytes), client.sent_bytes)
        if client.credit <= 0:
            self._refuse_unread(client)
            return
        timeout = _bounded(getattr(request, "timeout_s", 0.0), 0.0, _MAX_WAIT_S)
        # A producer waits for room, however long that takes.
        deadline = math.inf if isinstance(request, wire.PutFrames) else time.monotonic() + timeout
        stream = getattr(request, "stream", None)
        parked = _Parked(identity, client, request, parts[1:], deadline, stream.key if stream else None)
        if not self._try(parked):
            self._park(parked)

    def _client(self, identity: bytes) -> _Client:
        client = self._clients.get(identity)
        if client is None:
            client = self._clients[identity] = _Client()
            if len(self._clients) > _KEEP_CLIENTS:
                self._clients.popitem(last=False)
        self._clients.move_to_end(identity)
        return client

    def _refuse_unread(self, client: _Client) -> None:
        """A client that asks on without reading its answers: even a refusal would be one more of them."""
        client.n_refused += 1
        self._recorder.n_rejected_messages += 1
        if client.n_refused == 1:
            log.error("a client asks on without reading its answers; it gets none until it has read")

    def _park(self, parked: _Parked) -> None:
        """Keep a request for later, within bounds of what one client and all together may have waiting."""
        if parked.client.n_parked >= _MOST_PARKED or self._parked_bytes + parked.payload_bytes > _MOST_PARKED_BYTES:
            error = BufferFull("too much is waiting at this service already; read the answers, then ask again")
            self._send(parked.identity, _failure(parked.request.id, error))
            return
        parked.client.n_parked += 1
        self._parked_bytes += parked.payload_bytes
        self._parked.append(parked)

    def _retry(self, changed: set[StreamKey]) -> None:
        """Try again what waits for these streams, and producers, who wait for room that any stream may have freed."""
        waiting, self._parked = self._parked, []
        for parked in waiting:
            is_due = parked.key in changed or isinstance(parked.request, wire.PutFrames)
            if is_due and self._try(parked):
                parked.client.n_parked -= 1
                self._parked_bytes -= parked.payload_bytes
            else:
                self._parked.append(parked)

    def _retry_overdue(self) -> None:
        """Parked requests whose time is over, or whose group has an expired lease."""
        now = time.monotonic()
        due = {p.key for p in self._parked if p.key and p.deadline <= now}
        due |= {key for key, deadline in self._awaited_leases().items() if deadline <= now}
        if due:
            self._retry(due)

    def _try(self, parked: _Parked) -> bool:
        """Answer if possible; False to keep waiting."""
        handler = _HANDLERS[type(parked.request)]
        try:
            answer = handler(self, parked)
        except NearlineError as error:
            answer = _failure(parked.request.id, error)
        except Exception as error:
            log.exception("request %s failed", type(parked.request).__name__)
            answer = _failure(parked.request.id, NearlineError(f"the service failed on this request: {error}"))
        if answer is None:
            return False
        if answer is not _LATER and not self._send(parked.identity, answer):
            self._take_back(parked.request, answer[0])
        return True

    def _send(self, identity: bytes, answer: Answer) -> bool:
        """Hand an answer to the socket; False when its client is gone."""
        reply, payload = answer
        header = wire.encode(reply)
        try:
            self._socket.send_multipart([identity, header, *payload], zmq.NOBLOCK, copy=False)
        except zmq.Again:
            self._refuse_unread(self._client(identity))
            return False
        except zmq.ZMQError as error:
            log.info("could not answer a client, it is gone: %s", error)
            self._clients.pop(identity, None)
            return False
        self._client(identity).sent_bytes += len(header) + sum(memoryview(part).nbytes for part in payload)
        return True

    def _take_back(self, request: Any, reply: wire.Reply) -> None:
        """What was leased to a member that is gone goes to the next one at once."""
        if isinstance(request, wire.NextFrames) and isinstance(reply, wire.Frames):
            group = self._group(request.stream, request.group)
            for info, lease in zip(reply.infos, reply.leases, strict=True):
                group.give_back(info.frame_index, lease)
            self.changed(request.stream.key)

    # ---- what is served -------------------------------------------------------------------------

    def _folder(self, experiment: str, run: int | None) -> RunFolder:
        check_name(experiment, "experiment")
        if run is None:
            numbers = [int(p.name) for p in (self._recorder.root / experiment).glob("[0-9]*") if p.name.isdecimal()]
            if not numbers:
                raise RunNotFound(f"experiment {experiment!r} has no runs here; `nearline runs` lists what there is")
            run = max(numbers)
        check_run(run)
        path = self._recorder.root / experiment / str(run)
        if not (path / "run.json").exists():
            raise RunNotFound(
                f"no run {run_key(experiment, run)} at this service; `nearline runs` lists the runs there are"
            )
        return RunFolder.open(path)

    def _view(self, ref: wire.StreamRef) -> "_StreamView":
        live = self._recorder.find(ref.key)
        if live is not None:
            return _StreamView(live.header, live.store.states, live.is_ended, live=live)
        source = self._folders.get(ref.key)
        if source is None:
            source = FolderSource(self._folder(ref.experiment, ref.run), ref.data_source)
            self._folders[ref.key] = source
            if len(self._folders) > _KEEP_FOLDERS:
                self._folders.popitem(last=False)
        self._folders.move_to_end(ref.key)
        # Mostly finished; but a flow may be writing it from a process of its own.
        return _StreamView(source.header, source.states, source.status().is_terminal, source=source)

    def _frame(self, view: "_StreamView", index: int) -> RawFrame:
        if view.live is None:
            return view.source.read_one(index)  # type: ignore[union-attr]
        return self._recorder.buffer.get(view.live.key, index) or view.live.store.read(index)

    def _group(self, ref: wire.StreamRef, name: str) -> Group:
        key = (*ref.key, check_name(name, "group"))
        if key not in self._groups:
            self._groups[key] = self._groups_log.load(key)
        self._groups.move_to_end(key)
        return self._groups[key]

    # ---- handlers: reply, or None to wait ---------------------------------------------------------

    def _hello(self, p: _Parked) -> Answer:
        if p.request.protocol != wire.PROTOCOL:
            raise ProtocolError(
                f"client speaks protocol {p.request.protocol}, this service {wire.PROTOCOL}; install matching versions"
            )
        p.client.window_bytes = min(max(p.request.window_bytes, _LEAST_WINDOW_BYTES), wire.WINDOW_BYTES)
        return wire.Welcome(id=p.request.id, protocol=wire.PROTOCOL, service=self._service_name), _NO_PAYLOAD

    def _list_runs(self, p: _Parked) -> Answer:
        rows = [row.model_dump(mode="json") for row in self._recorder.catalog.runs(p.request.experiment)]
        return _json(p.request.id, rows)

    def _open_run(self, p: _Parked) -> Answer:
        folder = self._folder(p.request.experiment, p.request.run)
        return _json(
            p.request.id,
            {
                "header": folder.header.model_dump(mode="json"),
                "state": self._recorder.state_of(folder).value,
                "folder": str(folder.path.absolute()),
                "streams": {n: folder.stream_header(n).model_dump(mode="json") for n in folder.data_sources()},
            },
        )

    def _get_status(self, p: _Parked) -> Answer:
        return _json(p.request.id, self._status())

    def _wait(self, p: _Parked) -> Answer | None:
        status = self._view(p.request.stream).status()
        if status.watermark > p.request.above or status.is_terminal or _overdue(p):
            return _json(p.request.id, status.model_dump())
        return None

    def _read(self, p: _Parked) -> Answer:
        request, view = p.request, self._view(p.request.stream)
        if request.exact:
            self._require_stored(view, request.start)
            return _frames(request.id, [self._frame(view, request.start)], request.start + 1)
        start = max(request.start, 0)
        stop = max(min(request.stop, start + _MOST_FRAMES_AT_ONCE, view.states.announced), start)
        credit = min(request.max_bytes, p.client.credit, _MOST_BYTES_AN_ANSWER)
        frames: list[RawFrame] = []
        for index in view.states.readable(start, stop):
            if frames and credit <= 0:
                return _frames(request.id, frames, int(index))
            try:
                frames.append(self._frame(view, int(index)))
            except CorruptFrame:
                if not frames:
                    raise
                # Those before it are good; the next request names the damaged one.
                return _frames(request.id, frames, int(index))
            credit -= frames[-1].nbytes + _ROW_BYTES
        return _frames(request.id, frames, stop)

    def _require_stored(self, view: "_StreamView", index: int) -> None:
        if not view.states.is_readable(index):
            raise missing_frame(view.header, view.states, index, is_terminal=view.is_terminal)

    def _latest(self, p: _Parked) -> Answer | None:
        view = self._view(p.request.stream)
        newest = view.states.readable(p.request.after + 1)[-1:]
        if newest.size:
            frame = self._frame(view, int(newest[0]))
            return _frames(p.request.id, [frame], int(newest[0]) + 1)
        if view.is_terminal or _overdue(p):
            return _frames(p.request.id, [], view.states.announced, is_end=view.is_terminal)
        return None

    def _next_frames(self, p: _Parked) -> Answer | None:
        request, view = p.request, self._view(p.request.stream)
        group = self._group(request.stream, request.group)
        frames: list[RawFrame] = []
        leases = []
        member, lease_s = check_name(request.member, "member"), _bounded(request.lease_s, 0.05, _MAX_WAIT_S)
        credit = min(max(request.max_bytes, 1), p.client.credit, _MOST_BYTES_AN_ANSWER)
        while len(frames) < min(max(request.max_frames, 1), _MOST_FRAMES_AT_ONCE) and credit > 0:
            index = group.next_index(view.states)
            if index is None:
                break
            try:
                frame = self._frame(view, index)
            except CorruptFrame as error:
                # No member will ever get it, and the group must go on.
                log.error("group %s goes on without a damaged frame: %s", request.group, error)
                group.set_aside(index)
                continue
            leases.append(group.lease(index, member, lease_s))
            frames.append(frame)
            credit -= frame.nbytes + _ROW_BYTES
        is_end = not frames and view.is_terminal and group.is_drained(view.states)
        if not frames and not is_end and not _overdue(p):
            return None
        reply, payload = _frames(request.id, frames, group.cursor, is_end=is_end)
        reply.leases = [lease.number for lease in leases]
        reply.deliveries = [lease.delivery for lease in leases]
        return reply, payload

    def _acknowledge(self, p: _Parked) -> Answer:
        self._view(p.request.stream)  # or the error that there is no such stream
        group = self._group(p.request.stream, p.request.group)
        stale = []
        for frame_index, number in p.request.leases:
            if p.request.give_back:
                group.give_back(frame_index, number)
                continue
            try:
                group.acknowledge(frame_index, number)
            except NearlineError as error:
                stale.append(error)
        # Other members may wait for what was given back, or for the end of the stream.
        self.changed(p.request.stream.key)
        if stale:
            raise stale[0]
        return wire.Done(id=p.request.id), _NO_PAYLOAD

    def _wait_chunk(self, p: _Parked) -> Answer | None:
        view = self._view(p.request.stream)
        commit = view.commit(p.request.chunk)
        if commit is None and not view.is_terminal and not _overdue(p):
            return None
        return wire.ChunkReply(id=p.request.id, commit=commit, is_terminal=view.is_terminal), _NO_PAYLOAD

    def _get_plane(self, p: _Parked) -> Answer:
        ref = p.request.stream
        self._view(ref)  # or the error that there is no such stream
        plane = read_plane(self._folder(ref.experiment, ref.run).stream(ref.data_source).zarr, p.request.name)
        if plane is None:
            return wire.PlaneReply(id=p.request.id), _NO_PAYLOAD
        return wire.PlaneReply(id=p.request.id, dtype=plane.dtype.str, shape=plane.shape), [plane.data]

    def _get_ledger(self, p: _Parked) -> Answer:
        return _json(p.request.id, self._view(p.request.stream).ledger().model_dump(mode="json"))

    def _start_run(self, p: _Parked) -> Answer:
        r = p.request
        meta_bytes(r.user_data)  # or the error that it is not plain JSON
        folder = self._recorder.start_run(r.experiment, r.run, sample=r.sample, user_data=r.user_data)
        return _json(r.id, {"experiment": folder.header.experiment, "run": folder.header.run})

    def _start_stream(self, p: _Parked) -> Answer:
        try:
            header = StreamHeader.model_validate_json(p.request.header)
        except ValidationError as error:
            raise ProtocolError(f"not a stream header: {error}") from None
        check_name(header.data_source, "data source")
        folder = self._folder(header.experiment, header.run)
        if header.parent is None and folder.state.is_terminal:
            raise ProtocolError(
                f"run {run_key(header.experiment, header.run)} has ended; start a new run for new frames"
            )
        mask = _mask_of(p.parts, header)
        live = self._recorder.find((header.experiment, header.run, header.data_source))
        if live is not None and live.header == header and not live.store.is_finished:
            return wire.Done(id=p.request.id), _NO_PAYLOAD  # a producer that comes back
        try:
            if not self._recorder.take_up_stream(folder, header):
                self._recorder.start_stream(folder, header, pixel_mask=mask)
        except FileExistsError as error:
            raise ProtocolError(f"{error}; give the data source another name") from None
        return wire.Done(id=p.request.id), _NO_PAYLOAD

    def _put_frames(self, p: _Parked) -> Answer | None:
        request = p.request
        stream = self._writable(request.stream)
        frames = list(zip(request.infos, split_payload(request.infos, p.parts), strict=True))
        identity, is_stored = p.identity, request.ack == "stored"

        def done(outcomes: list[str]) -> None:
            if is_stored:
                self._answer_later(identity, wire.PutReply(id=request.id, outcomes=outcomes))

        if not self._recorder.submit(stream, frames, timeout=0.0, done=done):
            return None
        if is_stored:
            return _LATER
        return wire.PutReply(id=request.id, outcomes=["buffered"] * len(frames)), _NO_PAYLOAD

    def _finish_stream(self, p: _Parked) -> Answer:
        stream = self._writable(p.request.stream)
        identity, request_id = p.identity, p.request.id

        def done(error: NearlineError | None) -> None:
            answer = wire.Done(id=request_id) if error is None else _failure(request_id, error)[0]
            self._answer_later(identity, answer)

        self._recorder.finish_stream(stream, p.request.announced, aborted=p.request.aborted, done=done)
        return _LATER

    def _writable(self, ref: wire.StreamRef) -> LiveStream:
        stream = self._recorder.find(ref.key)
        if stream is None or stream.store.is_finished:
            raise StreamNotOpen(
                f"stream {run_key(ref.experiment, ref.run)}/{ref.data_source} is not open for writing; start it first"
            )
        return stream


@dataclass(slots=True)
class _StreamView:
    """A stream to be served, open for writing here or read from its folder."""

    header: StreamHeader
    states: IndexStates
    is_terminal: bool
    live: LiveStream | None = None
    source: FolderSource | None = None

    def status(self) -> StreamStatus:
        if self.source is not None:
            return self.source.status()
        assert self.live is not None
        return StreamStatus(
            announced=self.states.announced,
            watermark=self.states.watermark,
            n_sealed=len(self.live.store.sealed),
            is_terminal=self.is_terminal,
        )

    def commit(self, chunk: int) -> bytes | None:
        """A sealed chunk's commit as JSON."""
        if self.source is not None:
            commit = self.source.wait_chunk(chunk, 0.0)
        else:
            assert self.live is not None
            commit = self.live.store.sealed.get(chunk)
        return commit.model_dump_json().encode() if commit else None

    def ledger(self) -> StreamLedger:
        if self.source is not None:
            return self.source.ledger()
        assert self.live is not None
        return self.live.ledger()


def _frames(request_id: int, frames: list[RawFrame], next_index: int, *, is_end: bool = False) -> tuple[Any, list[Any]]:
    reply = wire.Frames(id=request_id, infos=[f.info for f in frames], next=next_index, is_end=is_end)
    return reply, glue_payload([f.blob for f in frames])


def _json(request_id: int, content: Any) -> Answer:
    return wire.JsonReply(id=request_id, body=json.dumps(content).encode()), _NO_PAYLOAD


def _failure(request_id: int, error: NearlineError) -> Answer:
    return wire.Failure(id=request_id, error=type(error).__name__, message=str(error)), _NO_PAYLOAD


def _bounded(value: float, low: float, high: float) -> float:
    """A client's number within bounds; NaN, which compares with nothing, is the lower one."""
    return min(max(value, low), high) if value == value else low


def _overdue(parked: _Parked) -> bool:
    return time.monotonic() >= parked.deadline


def _mask_of(parts: list[zmq.Frame], header: StreamHeader) -> np.ndarray | None:
    if not parts:
        return None
    raw = np.frombuffer(parts[0].buffer, np.uint8)
    if raw.size != 4 * int(np.prod(header.shape, dtype=np.int64)):
        raise ProtocolError(f"pixel mask of {raw.size} bytes does not cover frames of shape {header.shape} as uint32")
    return raw.view("<u4").reshape(header.shape)


_HANDLERS: dict[type, Callable[[Server, _Parked], Answer | None]] = {
    wire.Hello: Server._hello,
    wire.ListRuns: Server._list_runs,
    wire.OpenRun: Server._open_run,
    wire.GetStatus: Server._get_status,
    wire.Wait: Server._wait,
    wire.Read: Server._read,
    wire.Latest: Server._latest,
    wire.NextFrames: Server._next_frames,
    wire.Acknowledge: Server._acknowledge,
    wire.WaitChunk: Server._wait_chunk,
    wire.GetPlane: Server._get_plane,
    wire.GetLedger: Server._get_ledger,
    wire.StartRun: Server._start_run,
    wire.StartStream: Server._start_stream,
    wire.PutFrames: Server._put_frames,
    wire.FinishStream: Server._finish_stream,
}
