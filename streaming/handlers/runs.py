"""Runs and their facts: hello, listing, opening, starting, events, the service's own condition."""

from typing import Any

import numpy as np
from pydantic import ValidationError

from storage.errors import ProtocolError
from storage.metadata import pack_meta
from storage.models import StreamHeader
from storage.names import check_name, run_key
from streaming import wire
from streaming.handlers.desk import LATER, NO_PAYLOAD, Answer, Call, Desk, done, failure, json_answer

__all__ = [
    "add_event", "get_events", "get_status", "hello", "list_runs", "open_run", "start_run", "start_stream", "stop_run",
]  # fmt: skip

_LEAST_WINDOW_BYTES = 1 << 20
# What people and programs may add to a run by themselves; the rest is the service's to say.
_EVENT_KINDS = ("comment", "metadata", "annotation")


def hello(desk: Desk, call: Call) -> Answer:
    request = call.request
    if request.protocol != wire.PROTOCOL:
        raise ProtocolError(
            f"client speaks protocol {request.protocol}, this service {wire.PROTOCOL}; install matching versions"
        )
    call.client.grant = desk.admit(request.token)
    call.client.window_bytes = min(max(request.window_bytes, _LEAST_WINDOW_BYTES), wire.WINDOW_BYTES)
    reply = wire.Welcome(id=request.id, protocol=wire.PROTOCOL, service=desk.name, session=desk.session)
    return reply, NO_PAYLOAD


def list_runs(desk: Desk, call: Call) -> Answer:
    experiment, grant = call.request.experiment, call.client.grant

    def answer() -> None:
        found = [row for row in desk.catalog.runs(experiment) if grant is None or grant.covers(row.experiment)]
        rows = [row.model_dump(mode="json") for row in found]
        desk.do_later(lambda: desk.send(call, json_answer(call, rows)))

    desk.librarian.do(answer)
    return LATER


def open_run(desk: Desk, call: Call) -> Answer:
    folder = desk.folder(call.request.experiment, call.request.run)
    return json_answer(
        call,
        {
            "header": folder.header.model_dump(mode="json"),
            "state": desk.recorder.state_of(folder).value,
            "folder": str(folder.path.absolute()),
            "streams": {n: folder.stream_header(n).model_dump(mode="json") for n in folder.data_sources()},
            "next_run": _next_run(folder),
        },
    )


def get_status(desk: Desk, call: Call) -> Answer:
    status, grant = desk.status(), call.client.grant
    if grant is not None:
        for what in ("streams", "groups"):
            status[what] = [row for row in status[what] if grant.covers(row["experiment"])]
    return json_answer(call, status)


def start_run(desk: Desk, call: Call) -> Answer:
    r = call.request
    pack_meta(r.user_data)  # or the error that it is not plain JSON
    folder = desk.recorder.start_run(
        r.experiment, r.run, sample=r.sample, user_data=r.user_data, request_key=r.request_key, is_open=r.is_open
    )
    return json_answer(call, {"experiment": folder.header.experiment, "run": folder.header.run})


def stop_run(desk: Desk, call: Call) -> Answer:
    r = call.request
    folder = desk.folder(r.experiment, r.run)

    def ended(error: Any) -> None:
        answer = done(call) if error is None else failure(r.id, error)
        desk.do_later(lambda: desk.send(call, answer))

    desk.recorder.stop_run(folder, aborted=r.aborted, done=ended)
    return LATER


def add_event(desk: Desk, call: Call) -> Answer:
    r = call.request
    if r.kind not in _EVENT_KINDS:
        raise ProtocolError(f"event kind {r.kind[:40]!r} is not yours to add; use one of {', '.join(_EVENT_KINDS)}")
    pack_meta(r.payload)
    event = desk.folder(r.experiment, r.run).add_event(r.kind, r.payload)
    return json_answer(call, event.model_dump(mode="json"))


def get_events(desk: Desk, call: Call) -> Answer:
    r = call.request
    kind = None if r.kind is None else check_name(r.kind, "event kind")
    events = [event.model_dump(mode="json") for event in desk.folder(r.experiment, r.run).events(kind)]
    return json_answer(call, events)


def start_stream(desk: Desk, call: Call) -> Answer:
    try:
        header = StreamHeader.model_validate_json(call.request.header)
    except ValidationError as error:
        raise ProtocolError(f"not a stream header: {error}") from None
    call.require("write", header.experiment)
    check_name(header.data_source, "data source")
    folder = desk.folder(header.experiment, header.run)
    recorder = desk.recorder
    if header.parent is None and folder.state.is_terminal:
        raise ProtocolError(f"run {run_key(header.experiment, header.run)} has ended; start a new run for new frames")
    stream = recorder.find((header.experiment, header.run, header.data_source))
    if stream is None or not stream.is_open:
        mask = _mask_of(call.parts, header)
        try:
            stream = recorder.take_up_stream(folder, header) or recorder.start_stream(folder, header, pixel_mask=mask)
        except FileExistsError as error:
            raise ProtocolError(f"{error}; give the data source another name") from None
    elif stream.header != header:
        raise ProtocolError(
            f"{header.data_source} of run {run_key(header.experiment, header.run)} is being filled already; a second "
            "producer must give the same header, and frames of another kind need another data source"
        )
    # New, or one more producer, or one that comes back.
    recorder.join(stream, call.request.producer)
    return done(call)


def _next_run(folder: Any) -> int | None:
    """Where the experiment goes on, if a producer has said so."""
    pointers = [event.payload["run"] for event in folder.events("next_run")]
    return pointers[-1] if pointers else None


def _mask_of(parts: list[Any], header: StreamHeader) -> Any:
    if not parts:
        return None
    raw = np.frombuffer(parts[0].buffer, np.uint8)
    for shape in (header.shape, header.image_shape):
        if raw.size == 4 * int(np.prod(shape, dtype=np.int64)):
            return raw.view("<u4").reshape(shape)
    raise ProtocolError(f"pixel mask of {raw.size} bytes does not cover frames of shape {header.image_shape} as uint32")
