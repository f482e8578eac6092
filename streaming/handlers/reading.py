"""Reading a stream: how far it is, frames by range, the newest, chunks, planes, the ledger."""

from typing import Any

from storage.errors import CorruptFrame, FrameMissing, NearlineError
from storage.frame import RawFrame
from storage.masks import read_plane
from storage.stored_frames import missing_frame
from streaming import wire
from streaming.handlers.desk import (
    LATER,
    MOST_BYTES_AN_ANSWER,
    NO_PAYLOAD,
    ROW_BYTES,
    Answer,
    Call,
    Desk,
    StreamView,
    failure,
    frames_answer,
    json_answer,
)

__all__ = ["get_ledger", "get_plane", "latest", "read", "wait", "wait_chunk"]

MOST_FRAMES_AT_ONCE = 4096


def wait(desk: Desk, call: Call) -> Answer | None:
    view = desk.view(call.request.stream)
    if view is None:
        return None
    status = view.status
    if status.watermark > call.request.above or status.is_terminal or call.is_overdue:
        return wire.JsonReply(id=call.request.id, body=status.model_dump_json().encode()), NO_PAYLOAD
    return None


def read(desk: Desk, call: Call) -> Answer | None:
    request, view = call.request, desk.view(call.request.stream)
    if view is None:
        return None
    if request.exact:
        indices, stop = [request.start], request.start + 1
        if not view.states.is_readable(request.start):
            raise missing_frame(view.header, view.states, request.start, is_terminal=view.is_terminal)
    else:
        start = max(request.start, 0)
        stop = max(min(request.stop, start + MOST_FRAMES_AT_ONCE, view.states.announced), start)
        indices = view.states.readable(start, stop).tolist()
    if request.rows_only:
        desk.librarian.do(lambda: _answer_with(desk, call, lambda: _rows(view, call, stop)))
        return LATER
    credit = min(request.max_bytes, call.client.credit, MOST_BYTES_AN_ANSWER)
    answer = _from_memory(desk, view, call, indices, stop, credit)
    if answer is None:
        desk.librarian.do(lambda: _answer_with(desk, call, lambda: _from_disk(desk, view, call, indices, stop, credit)))
        return LATER
    return answer


def latest(desk: Desk, call: Call) -> Answer | None:
    request, view = call.request, desk.view(call.request.stream)
    if view is None:
        return None
    index: int | None
    if request.group is not None:
        index = desk.group(request.stream, request.group).take_latest(view.states)
    else:
        newest = view.states.readable(request.after + 1)[-1:]
        index = int(newest[0]) if newest.size else None
    if index is not None:
        found, credit = [index], MOST_BYTES_AN_ANSWER
        answer = _from_memory(desk, view, call, found, index + 1, credit)
        if answer is None:
            desk.librarian.do(
                lambda: _answer_with(desk, call, lambda: _from_disk(desk, view, call, found, found[0] + 1, credit))
            )
            return LATER
        return answer
    if view.is_terminal or call.is_overdue:
        return frames_answer(call, [], view.states.announced, is_end=view.is_terminal)
    return None


def wait_chunk(desk: Desk, call: Call) -> Answer | None:
    view = desk.view(call.request.stream)
    if view is None:
        return None
    commit = view.commit(call.request.chunk)
    if commit is None and not view.is_terminal and not call.is_overdue:
        return None
    body = commit.model_dump_json().encode() if commit else None
    return wire.ChunkReply(id=call.request.id, commit=body, is_terminal=view.is_terminal), NO_PAYLOAD


def get_plane(desk: Desk, call: Call) -> Answer | None:
    ref = call.request.stream
    if desk.view(ref) is None:
        return None

    def plane() -> Answer:
        found = read_plane(desk.folder(ref.experiment, ref.run).stream(ref.data_source).zarr, call.request.name)
        if found is None:
            return wire.PlaneReply(id=call.request.id), NO_PAYLOAD
        return wire.PlaneReply(id=call.request.id, dtype=found.dtype.str, shape=found.shape), [found.data]

    desk.librarian.do(lambda: _answer_with(desk, call, plane))
    return LATER


def get_ledger(desk: Desk, call: Call) -> Answer | None:
    view = desk.view(call.request.stream)
    if view is None:
        return None
    desk.librarian.do(
        lambda: _answer_with(desk, call, lambda: json_answer(call, view.ledger().model_dump(mode="json")))
    )
    return LATER


def _from_memory(desk: Desk, view: StreamView, call: Call, indices: list[int], stop: int, credit: int) -> Answer | None:
    """Frames from the front of the range that are in memory; None if the first one is not."""
    frames: list[RawFrame] = []
    for index in indices:
        if frames and credit <= 0:
            return frames_answer(call, frames, index)
        parts = desk.in_memory(view, index)
        if parts is None:
            return frames_answer(call, frames, index) if frames else None
        frames += parts
        credit -= sum(part.nbytes + ROW_BYTES for part in parts)
    return frames_answer(call, frames, stop)


def _from_disk(desk: Desk, view: StreamView, call: Call, indices: list[int], stop: int, credit: int) -> Answer:
    """Frames from the front of the range, wherever they are."""
    frames: list[RawFrame] = []
    for index in indices:
        if frames and credit <= 0:
            return frames_answer(call, frames, index)
        try:
            parts = desk.from_disk(view, index)
        except FrameMissing:
            if getattr(call.request, "exact", False):
                raise
            continue  # in memory only, and it has made room just now
        except CorruptFrame:
            if not frames:
                raise
            # Those before it are good; the next request names the damaged one.
            return frames_answer(call, frames, index)
        frames += parts
        credit -= sum(part.nbytes + ROW_BYTES for part in parts)
    return frames_answer(call, frames, stop)


def _rows(view: StreamView, call: Call, stop: int) -> Answer:
    store: Any = view.live.store if view.live else view.source
    infos = list(store.infos(max(getattr(call.request, "start", 0), 0), stop))
    return wire.Frames(id=call.request.id, infos=infos, next=stop), NO_PAYLOAD


def _answer_with(desk: Desk, call: Call, make: Any) -> None:
    """Make an answer in the librarian's thread, and have it sent."""
    try:
        answer = make()
    except NearlineError as error:
        answer = failure(call.request.id, error)
    except OSError as error:
        answer = failure(call.request.id, CorruptFrame(f"the files of this stream cannot be read: {error}"))
    desk.do_later(lambda: desk.send(call, answer))
