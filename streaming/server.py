"""The service's voice: one thread, one ROUTER, every request of the native protocol.

A handler returns its reply, or None: then the request is parked and tried again when its
stream changes, a lease runs out, credit comes back, or its time-out is over. The thread does no
waiting anywhere else, so no client can hold up another.
"""

import json
import logging
import os
import threading
import time
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zmq
from pydantic import ValidationError

from storage.errors import CorruptFrame, NearlineError, ProtocolError, RunNotFound
from storage.frame import RawFrame
from storage.masks import read_plane
from storage.models import StreamHeader
from storage.names import check_name, check_run, run_key
from storage.run_folder import RunFolder
from storage.states import FrameState, IndexStates, StreamLedger
from storage.stream_source import FolderSource, StreamStatus
from storage.stream_store import missing_frame
from streaming import wire
from streaming.errors import SourceBusy
from streaming.groups import Group, GroupLog
from streaming.payload import glue_payload, split_payload
from streaming.recorder import LiveStream, Recorder, StreamKey

__all__ = ["Server"]

log = logging.getLogger("nearline.server")

_SAVE_GROUPS_S = 0.05
_IDLE_POLL_S = 1.0
_KEEP_FOLDERS = 32
_MAX_WAIT_S = 3600.0
_MAX_FRAMES_A_READ = 4096
_NO_PAYLOAD: list[Any] = []
Answer = tuple[wire.Reply, list[Any]]
# The handler has arranged for the answer to be sent when the work is done.
_LATER: Answer = (wire.Reply(id=-1), _NO_PAYLOAD)


@dataclass(slots=True)
class _Client:
    """One connection: its window and how much of it is used."""

    window_bytes: int = wire.WINDOW_BYTES
    sent_bytes: int = 0
    received_bytes: int = 0

    @property
    def credit(self) -> int:
        return self.window_bytes - (self.sent_bytes - self.received_bytes)


@dataclass(slots=True, eq=False)
class _Parked:
    """A request waiting for its answer."""

    identity: bytes
    request: Any
    parts: list[Any]
    deadline: float
    key: StreamKey | None = None


@dataclass(slots=True)
class _Inbox:
    """What other threads leave for the server thread, and the pipe that wakes it."""

    changed: set[StreamKey] = field(default_factory=set)
    finished: list[tuple[bytes, Answer]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    pipe: tuple[int, int] = field(default_factory=os.pipe)

    def wake(self) -> None:
        os.write(self.pipe[1], b"!")

    def take(self) -> tuple[set[StreamKey], list[tuple[bytes, Answer]]]:
        with self.lock:
            os.read(self.pipe[0], 4096)
            changed, finished = self.changed, self.finished
            self.changed, self.finished = set(), []
            return changed, finished


class Server(threading.Thread):
    """Answers requests until `stop`.

    Raises
    ------
    SourceBusy : the address is in use; raised here, not in the thread.
    """

    def __init__(self, recorder: Recorder, bind: str, status: Callable[[], dict[str, Any]], name: str) -> None:
        super().__init__(name="server", daemon=True)
        self._recorder, self._status, self._service_name = recorder, status, name
        self._groups_log = GroupLog(recorder.root / "groups.sqlite")
        self._groups: dict[tuple[str, int, str, str], Group] = {}
        self._clients: dict[bytes, _Client] = defaultdict(_Client)
        self._parked: list[_Parked] = []
        self._folders: OrderedDict[StreamKey, FolderSource] = OrderedDict()
        self._inbox = _Inbox()
        self._is_stopping = False
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 500)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_MESSAGE_BYTES)
        # The byte window of each client bounds what is queued; a ROUTER at its high-water mark would drop silently.
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        try:
            self._socket.bind(bind)
        except zmq.ZMQError as error:
            self._socket.close()
            raise SourceBusy(
                f"cannot listen on {bind}: {error.strerror}; another service may be running there, "
                "stop it or choose another address with --bind"
            ) from error
        self.address: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    # ---- called from other threads --------------------------------------------------------------

    def changed(self, key: StreamKey) -> None:
        """Something is new in a stream: look at the requests that wait for it."""
        with self._inbox.lock:
            if key not in self._inbox.changed:
                self._inbox.changed.add(key)
                self._inbox.wake()

    def stop(self) -> None:
        """Answer nothing more and close."""
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
                changed, finished = self._inbox.take()
                for identity, answer in finished:
                    self._send(identity, answer)
                self._retry(changed)
            if self._socket in ready:
                self._receive_all()
            self._retry_overdue()
            if time.monotonic() - last_save > _SAVE_GROUPS_S:
                self._groups_log.save(self._groups)
                last_save = time.monotonic()
        self._groups_log.save(self._groups)
        self._groups_log.close()
        self._socket.close()

    def _poll_seconds(self) -> float:
        """Until the next thing that happens by itself: a time-out, a lease running out, a save."""
        now = time.monotonic()
        times = [p.deadline for p in self._parked]
        if any(isinstance(p.request, wire.NextFrames) for p in self._parked):
            times += [d for d in (g.next_deadline() for g in self._groups.values()) if d is not None]
        if any(g.is_dirty for g in self._groups.values()):
            times.append(now + _SAVE_GROUPS_S)
        return min(max(min(times, default=now + _IDLE_POLL_S) - now, 0.0), _IDLE_POLL_S)

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
        client = self._clients[identity]
        client.received_bytes = min(max(client.received_bytes, request.received_bytes), client.sent_bytes)
        timeout = min(max(getattr(request, "timeout_s", 0.0), 0.0), _MAX_WAIT_S)
        stream = getattr(request, "stream", None)
        parked = _Parked(identity, request, parts[1:], time.monotonic() + timeout, stream.key if stream else None)
        if not self._try(parked):
            self._parked.append(parked)

    def _retry(self, changed: set[StreamKey]) -> None:
        """Try again what waits for these streams, and producers, who wait for room that any stream may have freed."""
        self._parked = [
            p
            for p in self._parked
            if not (p.key in changed or isinstance(p.request, wire.PutFrames)) or not self._try(p)
        ]

    def _retry_overdue(self) -> None:
        """Parked requests whose time is over, whose client has credit again, or whose group has an expired lease."""
        now = time.monotonic()
        due = {p.key for p in self._parked if p.deadline <= now}
        for key, group in self._groups.items():
            deadline = group.next_deadline()
            if deadline is not None and deadline <= now:
                due.add(key[:3])
        if due:
            self._retry(due)  # type: ignore[arg-type]

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
        if answer is not _LATER:
            self._send(parked.identity, answer)
        return True

    def _send(self, identity: bytes, answer: Answer) -> None:
        reply, payload = answer
        self._clients[identity].sent_bytes += sum(memoryview(part).nbytes for part in payload)
        try:
            self._socket.send_multipart([identity, wire.encode(reply), *payload], zmq.NOBLOCK, copy=False)
        except zmq.ZMQError as error:
            log.warning("could not answer a client: %s", error)

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
            return _StreamView(live.header, live.store.states, live.store.is_finished, live=live)
        source = self._folders.get(ref.key)
        if source is None:
            source = FolderSource(self._folder(ref.experiment, ref.run), ref.data_source)
            self._folders[ref.key] = source
            if len(self._folders) > _KEEP_FOLDERS:
                self._folders.popitem(last=False)
        self._folders.move_to_end(ref.key)
        return _StreamView(source.header, source.states, is_terminal=True, source=source)

    def _frame(self, view: "_StreamView", index: int) -> RawFrame:
        if view.live is None:
            return view.source.read_one(index)  # type: ignore[union-attr]
        return self._recorder.buffer.get(view.live.key, index) or view.live.store.read(index)

    def _group(self, ref: wire.StreamRef, name: str) -> Group:
        key = (*ref.key, check_name(name, "group"))
        if key not in self._groups:
            self._groups[key] = self._groups_log.load(key)
        return self._groups[key]

    # ---- handlers: reply, or None to wait ---------------------------------------------------------

    def _hello(self, p: _Parked) -> Answer:
        if p.request.protocol != wire.PROTOCOL:
            raise ProtocolError(
                f"client speaks protocol {p.request.protocol}, this service {wire.PROTOCOL}; install matching versions"
            )
        self._clients[p.identity] = _Client(min(max(p.request.window_bytes, 1 << 20), wire.WINDOW_BYTES))
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
                "state": folder.state.value,
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

    def _read(self, p: _Parked) -> Answer | None:
        request, view = p.request, self._view(p.request.stream)
        if request.exact:
            self._require_stored(view, request.start)
        if self._has_unread(p.identity):
            return None
        start = max(request.start, 0)
        stop = max(min(request.stop, start + _MAX_FRAMES_A_READ, view.states.announced), start)
        credit = min(request.max_bytes, self._clients[p.identity].credit)
        frames: list[RawFrame] = []
        for index in view.states.indices(FrameState.stored, start, stop):
            if frames and credit <= 0:
                return _frames(request.id, frames, int(index))
            frame = self._readable(view, int(index), is_exact=request.exact)
            if frame is not None:
                frames.append(frame)
                credit -= frame.nbytes
        return _frames(request.id, frames, stop)

    def _readable(self, view: "_StreamView", index: int, *, is_exact: bool) -> RawFrame | None:
        """The frame; a damaged one is left out of a range with a word in the log, and an error when asked for."""
        try:
            return self._frame(view, index)
        except CorruptFrame as error:
            if is_exact:
                raise
            log.error("%s", error)
            return None

    def _require_stored(self, view: "_StreamView", index: int) -> None:
        if view.states[index] is not FrameState.stored:
            raise missing_frame(view.header, view.states, index, is_terminal=view.is_terminal)

    def _latest(self, p: _Parked) -> Answer | None:
        view = self._view(p.request.stream)
        newest = view.states.indices(FrameState.stored, max(p.request.after + 1, 0))[-1:]
        if newest.size and not self._has_unread(p.identity):
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
        credit = min(request.max_bytes, self._clients[p.identity].credit)
        while len(frames) < max(request.max_frames, 1) and credit > 0:
            index = group.next_index(view.states)
            if index is None:
                break
            frame = self._frame(view, index)
            leases.append(group.lease(index, request.member, min(max(request.lease_s, 0.05), _MAX_WAIT_S)))
            frames.append(frame)
            credit -= frame.nbytes
        is_end = not frames and view.is_terminal and group.is_drained(view.states)
        if not frames and not is_end and not _overdue(p):
            return None
        reply, payload = _frames(request.id, frames, group.cursor, is_end=is_end)
        reply.leases = [lease.number for lease in leases]
        reply.deliveries = [lease.delivery for lease in leases]
        return reply, payload

    def _acknowledge(self, p: _Parked) -> Answer:
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
        name = check_name(p.request.name, "plane")
        plane = read_plane(self._folder(ref.experiment, ref.run).stream(ref.data_source).zarr, name)
        if plane is None:
            return wire.PlaneReply(id=p.request.id), _NO_PAYLOAD
        return wire.PlaneReply(id=p.request.id, dtype=plane.dtype.str, shape=plane.shape), [plane.tobytes()]

    def _get_ledger(self, p: _Parked) -> Answer:
        return _json(p.request.id, self._view(p.request.stream).ledger().model_dump(mode="json"))

    def _start_run(self, p: _Parked) -> Answer:
        r = p.request
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
        reply = wire.Done(id=p.request.id)
        identity = p.identity
        self._recorder.finish_stream(stream, p.request.announced, done=lambda: self._answer_later(identity, reply))
        return _LATER

    def _has_unread(self, identity: bytes) -> bool:
        """The client still has answers on their way that use up its window."""
        client = self._clients[identity]
        return client.credit <= 0 and client.sent_bytes > client.received_bytes

    def _writable(self, ref: wire.StreamRef) -> LiveStream:
        stream = self._recorder.find(ref.key)
        if stream is None or stream.store.is_finished:
            raise ProtocolError(
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
