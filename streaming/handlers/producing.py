"""Frames from programs: room is found here, hashing and writing happen in other threads."""

from typing import Any

from storage.errors import BufferFull, NearlineError, ProtocolError, StorageFull, StreamNotOpen
from storage.names import run_key
from streaming import wire
from streaming.handlers.desk import LATER, NO_PAYLOAD, Answer, Call, Desk, done, failure
from streaming.live_stream import LiveStream, Put
from streaming.payload import split_payload

__all__ = ["finish_stream", "put_frames"]

# Larger messages are checked and hashed by the intake thread; for smaller ones the way there costs more.
_SMALL_BYTES = 256 << 10


def put_frames(desk: Desk, call: Call) -> Answer | None:
    request = call.request
    if call.prepared is None:
        call.prepared = _prepare(desk, call)
    put: Put = call.prepared
    if not put.stream.is_open:
        raise _not_open(request.stream)
    if not desk.recorder.buffer.reserve(sum(frame.cost_bytes for frame in put.frames), 0.0):
        return None
    call.let_go()
    if call.payload_bytes <= _SMALL_BYTES:
        desk.recorder.take(put)
    else:
        desk.intake.do(lambda: _take(desk, call, put))
    return LATER


def finish_stream(desk: Desk, call: Call) -> Answer:
    request, ref = call.request, call.request.stream
    stream = desk.recorder.find(ref.key)
    if (stream is None or not stream.is_open) and desk.folder(ref.experiment, ref.run).finished(ref.data_source):
        return done(call)  # asked once more, because the answer was lost
    # Asked once more while it is ending: the recorder tells this call, too, when it has.
    if stream is None:
        raise _not_open(ref)

    def ended(error: NearlineError | None) -> None:
        answer = done(call) if error is None else failure(request.id, error)
        desk.do_later(lambda: desk.send(call, answer))

    def finish() -> None:
        try:
            if request.next_run is not None:
                stream.folder.add_event("next_run", {"run": request.next_run})
            desk.recorder.finish_stream(
                stream, request.announced, aborted=request.aborted, producer=request.producer, done=ended
            )
        except NearlineError as error:
            ended(error)
        except OSError as error:
            ended(StorageFull(f"the end of {stream.header.data_source} could not be recorded ({error}); try again"))

    desk.intake.do(finish)  # behind the frames that were put before
    return LATER


def _prepare(desk: Desk, call: Call) -> Put:
    request, stream = call.request, _writable(desk, call.request.stream)
    if stream.header.is_online and request.ack != "buffered":
        raise ProtocolError(
            f"{stream.header.data_source} is in memory only, so no frame of it is ever {request.ack}; send with "
            "ack='buffered', or start the stream with persistence='stored'"
        )
    frames = list(zip(request.infos, split_payload(request.infos, call.parts), strict=True))
    raw = desk.recorder.weigh(stream, frames)
    cost = sum(frame.cost_bytes for frame in raw)
    if cost > desk.recorder.buffer.budget_bytes and len(raw) > 1:
        raise BufferFull(
            f"{len(raw)} frames of {cost} bytes in one message are more than the service's memory; send fewer at once"
        )

    def settled(indices: list[int], outcomes: list[str]) -> None:
        reply = wire.PutReply(id=request.id, indices=indices, outcomes=outcomes)
        desk.do_later(lambda: desk.send(call, (reply, NO_PAYLOAD)))

    return Put(stream, raw, request.ack, settled)


def _take(desk: Desk, call: Call, put: Put) -> None:
    """In the intake thread."""
    try:
        desk.recorder.take(put)
    except NearlineError as error:
        answer = failure(call.request.id, error)
        desk.do_later(lambda: desk.send(call, answer))


def _writable(desk: Desk, ref: wire.StreamRef) -> LiveStream:
    stream: Any = desk.recorder.find(ref.key)
    if stream is None or not stream.is_open:
        raise _not_open(ref)
    return stream


def _not_open(ref: wire.StreamRef) -> StreamNotOpen:
    return StreamNotOpen(
        f"stream {run_key(ref.experiment, ref.run)}/{ref.data_source} is not open for writing; start it first"
    )
