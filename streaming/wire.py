"""The native wire protocol: MessagePack headers, payload parts untouched.

A request is ``[header, payload…]`` from a DEALER to the service's ROUTER, a reply the same
way back with the request's ``id``. The header is one of the structs below, told apart by its
tag. Waiting is done by the service: a request with ``timeout_s`` is answered as soon as there
is an answer, or at the time-out with what there is.

Payloads: ``Frames.infos`` says how long each frame's bytes are; frames travel in parts of their
own, or, when all of them together are small, glued in one part.

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
    "Acknowledge",
    "ChunkReply",
    "Done",
    "Failure",
    "FinishStream",
    "Frames",
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
    "StartRun",
    "StartStream",
    "StreamRef",
    "Wait",
    "WaitChunk",
    "Welcome",
    "decode_reply",
    "decode_request",
    "encode",
]

PROTOCOL = 1
DEFAULT_ADDRESS = "tcp://127.0.0.1:5600"
WINDOW_BYTES = 128 << 20
GLUE_BYTES = 64 << 10
MAX_MESSAGE_BYTES = 1 << 30
MAX_HEADER_BYTES = 64 << 20


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
    """First message of a connection."""

    protocol: int
    window_bytes: int = WINDOW_BYTES


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

    With ``exact`` a single frame is meant, and its absence is an error that says why.
    """

    stream: StreamRef
    start: int
    stop: int
    max_bytes: int = 32 << 20
    exact: bool = False


class Latest(Request):
    """The newest stored frame above ``after``."""

    stream: StreamRef
    after: int = -1
    timeout_s: float = 0.0


class NextFrames(Request):
    """Frames leased to a member of a group for ``lease_s``; `Acknowledge` says that they are done."""

    stream: StreamRef
    group: str
    member: str
    max_frames: int = 16
    max_bytes: int = 32 << 20
    lease_s: float = 60.0
    timeout_s: float = 0.0


class Acknowledge(Request):
    """(frame_index, lease) pairs that are done, or given back."""

    stream: StreamRef
    group: str
    leases: list[tuple[int, int]]
    give_back: bool = False


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
    experiment: str
    run: int | None = None
    sample: str | None = None
    user_data: dict[str, Any] = {}


class StartStream(Request):
    """A new stream; ``header`` is a StreamHeader as JSON. Payload: the pixel mask as raw uint32, or nothing."""

    header: bytes


class PutFrames(Request):
    """Frames of a producer, answered when each has reached ``ack`` (``buffered`` or ``stored``)."""

    stream: StreamRef
    infos: list[FrameInfo]
    ack: Literal["buffered", "stored"] = "stored"


class FinishStream(Request):
    """The end of a producer's stream; ``aborted`` says why when it is not a regular one."""

    stream: StreamRef
    announced: int = 0
    aborted: str | None = None


class Reply(msgspec.Struct, tag=True, kw_only=True):
    id: int


class Welcome(Reply):
    protocol: int
    service: str


class JsonReply(Reply):
    """A model as JSON; which one follows from the request."""

    body: bytes


class Frames(Reply):
    """Frames, and where to go on reading; leases and deliveries are given for groups only."""

    infos: list[FrameInfo]
    next: int
    is_end: bool = False
    leases: list[int] = []
    deliveries: list[int] = []


class ChunkReply(Reply):
    """A ChunkCommit as JSON, or None if the stream ended without it or the time ran out."""

    commit: bytes | None
    is_terminal: bool


class PlaneReply(Reply):
    """An array's dtype and shape, its bytes as payload; dtype None when there is no such plane."""

    dtype: str | None = None
    shape: tuple[int, ...] = ()


class PutReply(Reply):
    """What became of each frame, in the order sent: stored, duplicate, late, conflict, failed or buffered."""

    outcomes: list[str]


class Done(Reply):
    pass


class Failure(Reply):
    """An error of `storage.errors` by its class name."""

    error: str
    message: str


_REQUESTS = (
    Hello | ListRuns | OpenRun | Wait | Read | Latest | NextFrames | Acknowledge | WaitChunk
    | GetPlane | GetLedger | GetStatus | StartRun | StartStream | PutFrames | FinishStream
)  # fmt: skip
_REPLIES = Welcome | JsonReply | Frames | ChunkReply | PlaneReply | PutReply | Done | Failure
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
