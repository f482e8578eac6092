"""What the service does for each request, by topic; the table says who may ask.

``runs`` (what there is), ``reading`` (frames), ``sharing`` (consumer groups), ``producing``
(frames from programs), ``annotations`` (what is said of frames afterwards). A new request is a
struct in `streaming.wire`, a function here and a row.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from streaming import wire
from streaming.handlers import annotations, producing, reading, runs, sharing
from streaming.handlers.desk import Answer, Call, Client, Desk

__all__ = ["HANDLERS", "Answer", "Call", "Client", "Desk", "Handler", "Scope"]

Scope = Literal["read", "write", "admin"]


@dataclass(frozen=True, slots=True)
class Handler:
    """``answer`` gives a reply, or None to be asked again; ``scope`` is what a token must allow."""

    answer: Callable[[Desk, Call], Answer | None]
    scope: Scope


HANDLERS: dict[type, Handler] = {
    wire.ListRuns: Handler(runs.list_runs, "read"),
    wire.OpenRun: Handler(runs.open_run, "read"),
    wire.GetEvents: Handler(runs.get_events, "read"),
    wire.GetStatus: Handler(runs.get_status, "read"),
    wire.StartRun: Handler(runs.start_run, "write"),
    wire.StopRun: Handler(runs.stop_run, "write"),
    wire.AddEvent: Handler(runs.add_event, "write"),
    wire.Annotate: Handler(annotations.annotate, "write"),
    wire.GetAnnotations: Handler(annotations.get_annotations, "read"),
    wire.StartStream: Handler(runs.start_stream, "write"),
    wire.PutFrames: Handler(producing.put_frames, "write"),
    wire.FinishStream: Handler(producing.finish_stream, "write"),
    wire.Wait: Handler(reading.wait, "read"),
    wire.Read: Handler(reading.read, "read"),
    wire.Latest: Handler(reading.latest, "read"),
    wire.WaitChunk: Handler(reading.wait_chunk, "read"),
    wire.GetPlane: Handler(reading.get_plane, "read"),
    wire.GetLedger: Handler(reading.get_ledger, "read"),
    wire.NextFrames: Handler(sharing.next_frames, "read"),
    wire.Acknowledge: Handler(sharing.acknowledge, "read"),
    wire.GetGroups: Handler(sharing.get_groups, "read"),
    wire.SeekGroup: Handler(sharing.seek_group, "write"),
    wire.DeadLetters: Handler(sharing.dead_letters, "write"),
}
