"""What the handlers of requests work with: one desk for all, one call for each request.

A handler returns its answer, `LATER` when it has arranged for one, or None: then the call is
parked and the handler asked again when its stream changes, or its time is over.
"""

import json
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from storage.catalog import Catalog
from storage.errors import NearlineError, RunNotFound
from storage.frame import RawFrame
from storage.models import StreamHeader
from storage.names import check_name, check_run, run_key
from storage.run_folder import ChunkCommit, RunFolder
from storage.states import IndexStates, StreamLedger
from storage.stream_source import FolderSource, StreamStatus
from streaming import wire
from streaming.groups import Group, GroupKey, GroupLog
from streaming.live_stream import LiveStream, StreamKey
from streaming.payload import glue_payload
from streaming.recorder import Recorder
from streaming.worker import Worker

__all__ = [
    "LATER", "MOST_BYTES_AN_ANSWER", "NO_PAYLOAD", "ROW_BYTES", "Answer", "Call", "Client", "Desk", "StreamView",
    "bounded", "done", "failure", "frames_answer", "json_answer",
]  # fmt: skip

MOST_BYTES_AN_ANSWER = 32 << 20
NO_PAYLOAD: list[Any] = []
Answer = tuple[wire.Reply, list[Any]]
LATER: Answer = (wire.Reply(id=-1), NO_PAYLOAD)

# What a row takes in an answer, about; so that rows without pixels use up credit too.
ROW_BYTES = 256
_KEEP_VIEWS = 32
_KEEP_GROUPS = 256
# A folder that somebody else writes is looked at again so often.
_LOOK_AGAIN_S = 0.2


@dataclass(slots=True)
class Client:
    """One connection: its window, how much of it is used, and what it waits for."""

    window_bytes: int = wire.WINDOW_BYTES
    sent_bytes: int = 0
    received_bytes: int = 0
    n_parked: int = 0
    n_refused: int = 0
    grant: Any = None

    @property
    def credit(self) -> int:
        return self.window_bytes - (self.sent_bytes - self.received_bytes)


@dataclass(slots=True, eq=False)
class Call:
    """One request, and who asks."""

    identity: bytes
    client: Client
    request: Any
    parts: list[Any]
    deadline: float
    key: StreamKey | None = None
    # What a handler that waits has prepared, so as not to do it again each time.
    prepared: Any = None
    payload_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.payload_bytes = sum(map(len, self.parts))

    def let_go(self) -> None:
        """The payload is on its way: kept here, it would stay in memory until somebody looks for cycles."""
        self.parts, self.prepared = [], None

    @property
    def is_overdue(self) -> bool:
        return time.monotonic() >= self.deadline

    def require(self, scope: str, experiment: str | None) -> None:
        """AccessDenied if the client's token does not allow this, or no longer."""
        if self.client.grant is not None:
            self.client.grant.require(scope, experiment)


class StreamView:
    """A stream to be served, open for writing here or read from its folder."""

    def __init__(self, live: LiveStream | None, source: FolderSource | None) -> None:
        self.live, self.source = live, source
        self.looked_at = time.monotonic()
        self._status = source.status() if source is not None else None

    @property
    def header(self) -> StreamHeader:
        return self.live.header if self.live else self._folder.header

    @property
    def states(self) -> IndexStates:
        return self.live.store.states if self.live else self._folder.states

    @property
    def is_terminal(self) -> bool:
        return self.live.is_ended if self.live else self._known_status.is_terminal

    @property
    def status(self) -> StreamStatus:
        if self.live is None:
            return self._known_status
        states = self.live.store.states
        return StreamStatus(
            announced=states.announced,
            watermark=states.watermark,
            n_sealed=len(self.live.store.sealed),
            is_terminal=self.live.is_ended,
        )

    def look(self) -> None:
        """Take in what another writer of the folder has done; in the librarian's thread."""
        self._status, self.looked_at = self._folder.status(), time.monotonic()

    def commit(self, chunk: int) -> ChunkCommit | None:
        """A sealed chunk's commit."""
        return self.live.store.sealed.get(chunk) if self.live else self._folder.commits.get(chunk)

    def ledger(self) -> StreamLedger:
        return self.live.ledger() if self.live else self._folder.ledger()

    @property
    def _folder(self) -> FolderSource:
        assert self.source is not None
        return self.source

    @property
    def _known_status(self) -> StreamStatus:
        assert self._status is not None
        return self._status


@dataclass(slots=True, eq=False)
class Desk:
    """Everything a handler may need; used by the server thread alone.

    ``do_later`` has a callable run in the server thread; ``send`` gives an answer to a call;
    ``changed`` has the calls on a stream tried again, ``hasten`` ends the waiting of a client.
    """

    recorder: Recorder
    catalog: Catalog
    librarian: Worker
    intake: Worker
    group_log: GroupLog
    do_later: Callable[[Callable[[], None]], None]
    send: Callable[[Call, Answer], None]
    changed: Callable[[StreamKey], None]
    hasten: Callable[[Client], None]
    status: Callable[[], dict[str, Any]]
    admit: Callable[[str | None], Any]
    name: str
    session: str
    groups: OrderedDict[GroupKey, Group] = field(default_factory=OrderedDict)
    # What a frame of a stream took when it was last handed out: no more are leased than an answer can carry.
    typical_bytes: dict[StreamKey, int] = field(default_factory=dict)
    # Groups for which the librarian is at the disk: whoever asks meanwhile waits, or would overtake it.
    fetching: set[GroupKey] = field(default_factory=set)
    _views: OrderedDict[StreamKey, StreamView] = field(default_factory=OrderedDict)
    _opening: set[StreamKey] = field(default_factory=set)
    _errors: dict[StreamKey, NearlineError] = field(default_factory=dict)

    def folder(self, experiment: str, run: int | None) -> RunFolder:
        """A run of this service's data folder; without a number the newest of the experiment."""
        check_name(experiment, "experiment")
        if run is None:
            numbers = [int(p.name) for p in (self.recorder.root / experiment).glob("[0-9]*") if p.name.isdecimal()]
            if not numbers:
                raise RunNotFound(f"experiment {experiment!r} has no runs here; `nearline runs` lists what there is")
            run = max(numbers)
        check_run(run)
        path = self.recorder.root / experiment / str(run)
        if not (path / "run.json").exists():
            raise RunNotFound(
                f"no run {run_key(experiment, run)} at this service; `nearline runs` lists the runs there are"
            )
        return RunFolder.open(path)

    def view(self, ref: wire.StreamRef) -> StreamView | None:
        """A stream; None while it is being opened or looked at again: the call is tried again afterwards.

        Raises
        ------
        RunNotFound, StreamNotFound
        """
        live = self.recorder.find(ref.key)
        if live is not None:
            self._views.pop(ref.key, None)
            return StreamView(live, None)
        if ref.key in self._errors:
            raise self._errors.pop(ref.key)
        view = self._views.get(ref.key)
        is_fresh = view and (view.is_terminal or time.monotonic() - view.looked_at < _LOOK_AGAIN_S)
        if view is None or not is_fresh:
            self._look(ref, view)
        return view if is_fresh else None

    def group(self, ref: wire.StreamRef, name: str) -> Group:
        """A consumer group, as it was last saved."""
        key = (*ref.key, check_name(name, "group"))
        if key not in self.groups:
            self.groups[key] = self.group_log.load(key)
        self.groups.move_to_end(key)
        return self.groups[key]

    def is_watched(self, key: StreamKey | None) -> bool:
        """Whether a stream is written by somebody else, so that only looking again tells what is new."""
        view = self._views.get(key) if key else None
        return view is not None and not view.is_terminal

    def forget_idle_groups(self) -> None:
        """They are loaded again when someone asks."""
        while len(self.groups) > _KEEP_GROUPS and not next(iter(self.groups.values())).is_busy:
            self.groups.popitem(last=False)

    def in_memory(self, view: StreamView, index: int) -> list[RawFrame] | None:
        """The parts of a frame if reading it costs no disk access."""
        if view.live is None:
            return None
        return self.recorder.buffer.get(view.live.key, index, view.header.parts)

    def from_disk(self, view: StreamView, index: int) -> list[RawFrame]:
        """The parts of a frame from journal or shard; in the librarian's thread."""
        if view.live is not None:
            return self.in_memory(view, index) or view.live.store.read_parts(index)
        assert view.source is not None
        return view.source.read_parts(index)

    def _look(self, ref: wire.StreamRef, view: StreamView | None) -> None:
        if ref.key in self._opening:
            return
        self._opening.add(ref.key)

        def look() -> None:
            found, error = view, None
            try:
                if found is None:
                    found = StreamView(None, FolderSource(self.folder(ref.experiment, ref.run), ref.data_source))
                else:
                    found.look()
            except NearlineError as problem:
                error = problem
            except Exception as problem:
                error = NearlineError(f"{run_key(ref.experiment, ref.run)}/{ref.data_source} cannot be read: {problem}")
            self.do_later(lambda: self._looked(ref, found, error))

        self.librarian.do(look)

    def _looked(self, ref: wire.StreamRef, view: StreamView | None, error: NearlineError | None) -> None:
        self._opening.discard(ref.key)
        if error is not None:
            self._errors[ref.key] = error
            self._views.pop(ref.key, None)
        elif view is not None:
            self._views[ref.key] = view
            self._views.move_to_end(ref.key)
            if len(self._views) > _KEEP_VIEWS:
                self._views.popitem(last=False)
        self.changed(ref.key)


def json_answer(call: Call, content: Any) -> Answer:
    return wire.JsonReply(id=call.request.id, body=json.dumps(content).encode()), NO_PAYLOAD


def done(call: Call) -> Answer:
    return wire.Done(id=call.request.id), NO_PAYLOAD


def failure(request_id: int, error: NearlineError) -> Answer:
    return wire.Failure(id=request_id, error=type(error).__name__, message=str(error)), NO_PAYLOAD


def frames_answer(call: Call, frames: list[RawFrame], following: int, *, is_end: bool = False) -> Any:
    reply = wire.Frames(id=call.request.id, infos=[f.info for f in frames], next=following, is_end=is_end)
    return reply, glue_payload([f.blob for f in frames])


def bounded(value: float, low: float, high: float) -> float:
    """A client's number within bounds; NaN, which compares with nothing, is the lower one."""
    return min(max(value, low), high) if value == value else low
