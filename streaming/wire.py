"""The native wire protocol: MessagePack headers, payload parts untouched.

A request is ``[header, payload…]`` from a DEALER to the service's ROUTER, a reply the same
way back with the request's ``id``. The header is one of the structs below, told apart by its
tag. Waiting is done by the service: a request with ``timeout_s`` is answered as soon as there
is an answer, or at the time-out with what there is.

Payloads: ``Frames.infos`` says how long each frame's bytes are; frames travel in parts of their
own, or, when all of them together are small, glued in one part.

A connection begins with `Hello`: protocol, token and window; everything else is refused before.
`Welcome.session` is the service's life: another one on a later connection means that it was restarted.

Credit: each request says how many bytes of answers its client has taken in since its hello; the
service sends frames within the client's window beyond that. A client that asks on without
reading gets no further answers once its window, or 64 of them, are under way; at most 16 of its
requests may wait at a time.
"""

from typing import Any, Literal

import msgspec

from storage.errors import ProtocolError
from storage.frame import FrameInfo

__all__ = [
    "DEFAULT_ADDRESS",
    "GLUE_BYTES",
    "MAX_HEADER_BYTES",
    "MAX_MESSAGE_BYTES",
    "PROTOCOL",
    "WINDOW_BYTES",
    "AckLevel",
    "Acknowledge",
    "AddEvent",
    "Annotate",
    "AnnotationsReply",
    "ChunkReply",
    "DeadLetters",
    "Done",
    "Failure",
    "FinishStream",
    "Frames",
    "GetAnnotations",
    "GetEvents",
    "GetGroups",
    "GetLedger",
    "GetPlane",
    "GetStatus",
    "Hello",
    "JsonReply",
    "Latest",
    "ListRuns",
    "NextFrames",
    "OpenRun",
    "PlaneReply",
    "PutFrames",
    "PutReply",
    "Read",
    "Reply",
    "Request",
    "SayHello",
    "SeekGroup",
    "StartRun",
    "StartStream",
    "StopRun",
    "StreamRef",
    "Wait",
    "WaitChunk",
    "Welcome",
    "decode_reply",
    "decode_request",
    "encode",
]

PROTOCOL = 3
DEFAULT_ADDRESS = "tcp://127.0.0.1:5600"
WINDOW_BYTES = 128 << 20
GLUE_BYTES = 64 << 10
MAX_MESSAGE_BYTES = 1 << 30
MAX_HEADER_BYTES = 64 << 20


AckLevel = Literal["buffered", "stored", "durable"]


class StreamRef(msgspec.Struct, frozen=True, array_like=True):
    """Which stream."""

    experiment: str
    run: int
    data_source: str

    @property
    def key(self) -> tuple[str, int, str]:
        return (self.experiment, self.run, self.data_source)


class Request(msgspec.Struct, tag=True, kw_only=True):
    """What every request carries: its number, and the bytes of answers taken in so far (credit)."""

    id: int
    received_bytes: int = 0


class Hello(Request):
    """First message of a connection; ``token`` where the service asks for one.

    ``is_anew`` : the link broke under it. What the client still waits for is forgotten, for it will ask again, and its
    credit is whole: it cannot tell which answers were lost.
    """

    protocol: int
    window_bytes: int = WINDOW_BYTES
    token: str | None = None
    is_anew: bool = False


class ListRuns(Request):
    experiment: str | None = None


class OpenRun(Request):
    """A run's header, state and data sources; without a number the newest run of the experiment."""

    experiment: str
    run: int | None = None


class Wait(Request):
    """The stream's status once its watermark exceeds ``above`` or it has ended."""

    stream: StreamRef
    above: int = -1
    timeout_s: float = 0.0


class Read(Request):
    """Stored frames of ``start <= frame_index < stop``, up to ``max_bytes`` but at least one.

    With ``exact`` a single frame is meant, and its absence is an error that says why. With
    ``rows_only`` the rows come without the frames' bytes.
    """

    stream: StreamRef
    start: int
    stop: int
    max_bytes: int = 32 << 20
    exact: bool = False
    rows_only: bool = False


class Latest(Request):
    """The newest stored frame above ``after``; with a group, each only once for all its members."""

    stream: StreamRef
    after: int = -1
    group: str | None = None
    timeout_s: float = 0.0


class NextFrames(Request):
    """Frames leased to a member of a group for ``lease_s``; ``done`` are (frame_index, lease) of earlier ones.

    ``max_deliveries`` is the group's, set by whoever asks first: a frame given out so often
    without being acknowledged becomes a dead letter.
    """

    stream: StreamRef
    group: str
    member: str
    max_frames: int = 16
    max_bytes: int = 32 << 20
    lease_s: float = 60.0
    timeout_s: float = 0.0
    done: list[tuple[int, int]] = []
    max_deliveries: int | None = None


class Acknowledge(Request):
    """(frame_index, lease) pairs that are done, or given back.

    A frame given back is delivered again after ``delay_s``; with ``unseen`` nobody has looked at
    it, and the delivery does not count. A client that ``leaves`` has what it still waits for
    answered at once.
    """

    stream: StreamRef
    group: str
    leases: list[tuple[int, int]]
    give_back: bool = False
    delay_s: float = 0.0
    unseen: bool = False
    leaves: bool = False


class GetGroups(Request):
    """The consumer groups of a stream: where each is, who has what, dead letters."""

    stream: StreamRef


class SeekGroup(Request):
    """Put a group's cursor on a frame: what is behind it is delivered again, what is before is skipped."""

    stream: StreamRef
    group: str
    frame_index: int


class DeadLetters(Request):
    """Dead letters of a group: deliver them again (``retry``) or give them up (``drop``); all, or these."""

    stream: StreamRef
    group: str
    action: Literal["retry", "drop"]
    indices: list[int] | None = None


class WaitChunk(Request):
    """The commit of chunk k once it is sealed."""

    stream: StreamRef
    chunk: int
    timeout_s: float = 0.0


class GetPlane(Request):
    stream: StreamRef
    name: str


class GetLedger(Request):
    stream: StreamRef


class GetStatus(Request):
    """The service's own condition."""


class StartRun(Request):
    """A new run; the next free number if none is given.

    ``request_key`` makes repeating safe: a run that was started with it is answered again. With
    ``is_open`` detector series of this experiment go into this run until `StopRun`.
    """

    experiment: str
    run: int | None = None
    sample: str | None = None
    user_data: dict[str, Any] = {}
    request_key: str | None = None
    is_open: bool = False


class StopRun(Request):
    """The end of a run that was started with ``is_open``; answered when its streams have ended."""

    experiment: str
    run: int
    aborted: str | None = None


class AddEvent(Request):
    """A fact about a run, such as a ``comment`` or ``metadata``; appended, never changed."""

    experiment: str
    run: int
    kind: str
    payload: dict[str, Any]


class GetEvents(Request):
    """The facts about a run in order, of one kind or all."""

    experiment: str
    run: int
    kind: str | None = None


class Annotate(Request):
    """Keep annotations of a run's frames; payload: one `storage.annotations.AnnotationBatch` as JSON."""

    experiment: str
    run: int


class GetAnnotations(Request):
    """The batches of annotations with a number above ``after``, in order."""

    experiment: str
    run: int
    after: int = 0


class StartStream(Request):
    """A new stream, or one more producer for it; ``header`` is a StreamHeader as JSON.

    Payload: the pixel mask as raw uint32, or nothing. The stream ends when every ``producer``
    that has started it has finished it.
    """

    header: bytes
    producer: str = ""


class PutFrames(Request):
    """Frames of a producer, answered when each has reached ``ack``.

    A row with ``frame_index`` −1 gets the next free index. A row whose ``producer`` and
    ``sequence`` have been stored already is answered with the index it has.
    """

    stream: StreamRef
    infos: list[FrameInfo]
    ack: AckLevel = "stored"


class FinishStream(Request):
    """The end of a producer's part in a stream; ``aborted`` says why when it is not a regular one.

    ``next_run`` tells readers where the experiment goes on.
    """

    stream: StreamRef
    announced: int = 0
    aborted: str | None = None
    producer: str = ""
    next_run: int | None = None


class Reply(msgspec.Struct, tag=True, kw_only=True):
    id: int


class Welcome(Reply):
    """``session`` names this life of the service."""

    protocol: int
    service: str
    session: str = ""


class SayHello(Reply):
    """The service does not know this client: it has been restarted, mostly. Say hello, then ask again."""


class JsonReply(Reply):
    """A model as JSON; which one follows from the request."""

    body: bytes


class Frames(Reply):
    """Frames, and where to go on reading; leases and deliveries are given for groups only.

    ``late`` are the leases of frames that the group had passed before they came.
    """

    infos: list[FrameInfo]
    next: int
    is_end: bool = False
    leases: list[int] = []
    deliveries: list[int] = []
    late: list[int] = []


class ChunkReply(Reply):
    """A ChunkCommit as JSON, or None if the stream ended without it or the time ran out."""

    commit: bytes | None
    is_terminal: bool


class PlaneReply(Reply):
    """An array's dtype and shape, its bytes as payload; dtype None when there is no such plane."""

    dtype: str | None = None
    shape: tuple[int, ...] = ()


class AnnotationsReply(Reply):
    """A payload part for each of these batches; not ``is_end``: go on after the last of them."""

    numbers: list[int]
    is_end: bool


class PutReply(Reply):
    """What became of each frame, in the order sent, and under which index.

    ``kept`` (it has reached the level asked for), ``duplicate``, ``late`` (kept in an amendment
    segment), ``ended`` (behind the stream's end, not kept), ``conflict`` or ``failed``.
    """

    indices: list[int]
    outcomes: list[str]


class Done(Reply):
    pass


class Failure(Reply):
    """An error of `storage.errors` by its class name."""

    error: str
    message: str


_REQUESTS = (
    Hello | ListRuns | OpenRun | Wait | Read | Latest | NextFrames | Acknowledge | GetGroups | SeekGroup
    | DeadLetters | WaitChunk | GetPlane | GetLedger | GetStatus | StartRun | StopRun | AddEvent | GetEvents
    | Annotate | GetAnnotations | StartStream | PutFrames | FinishStream
)  # fmt: skip
_REPLIES = (
    Welcome | SayHello | JsonReply | Frames | ChunkReply | PlaneReply | AnnotationsReply | PutReply | Done | Failure
)  # fmt: skip
_request_decoder = msgspec.msgpack.Decoder(_REQUESTS)
_reply_decoder = msgspec.msgpack.Decoder(_REPLIES)
encode = msgspec.msgpack.Encoder().encode


def decode_request(header: Any) -> Any:
    """A request's struct; ProtocolError for anything else."""
    if header.nbytes > MAX_HEADER_BYTES:
        raise ProtocolError(f"request header of {header.nbytes} bytes; at most {MAX_HEADER_BYTES}, send fewer frames")
    try:
        return _request_decoder.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a request of protocol {PROTOCOL}: {error}") from None


def decode_reply(header: Any) -> Any:
    """A reply's struct; ProtocolError for anything else."""
    try:
        return _reply_decoder.decode(header)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a reply of protocol {PROTOCOL}: {error}") from None
