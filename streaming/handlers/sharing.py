"""Consumer groups: frames leased to members, acknowledged, given back; looking after groups."""

import logging
from collections import deque
from typing import Any

from storage.errors import CorruptFrame, FrameMissing, NearlineError
from storage.frame import RawFrame
from storage.names import check_name
from streaming import wire
from streaming.groups import Group, GroupKey, Lease
from streaming.handlers.desk import (
    LATER,
    MOST_BYTES_AN_ANSWER,
    ROW_BYTES,
    Answer,
    Call,
    Desk,
    StreamView,
    bounded,
    done,
    frames_answer,
    json_answer,
)
from streaming.handlers.reading import MOST_FRAMES_AT_ONCE

__all__ = ["acknowledge", "dead_letters", "get_groups", "next_frames", "seek_group", "take_back"]

log = logging.getLogger("nearline.groups")

_MAX_LEASE_S = 3600.0
_MOST_DELIVERIES = 1_000_000
# Frames fetched from disk for one answer, before their sizes are known.
_MOST_FROM_DISK = 256
_KEEP_SIZES = 256


def next_frames(desk: Desk, call: Call) -> Answer | None:
    request, view = call.request, desk.view(call.request.stream)
    if view is None:
        return None
    group = desk.group(request.stream, request.group)
    if request.max_deliveries is not None:
        group.max_deliveries = int(bounded(request.max_deliveries, 1, _MOST_DELIVERIES))
    if request.done:
        _acknowledge_all(group, request.done)
        request.done = []
        desk.changed(request.stream.key)
    return _hand_out(desk, call, view, group)


def acknowledge(desk: Desk, call: Call) -> Answer | None:
    request = call.request
    if desk.view(request.stream) is None:  # or the error that there is no such stream
        return None
    group = desk.group(request.stream, request.group)
    if request.give_back:
        for frame_index, number in request.leases:
            group.give_back(frame_index, number, bounded(request.delay_s, 0.0, _MAX_LEASE_S), counts=not request.unseen)
        stale = None
    else:
        stale = _acknowledge_all(group, request.leases)
    if request.leaves:
        desk.hasten(call.client)
    # Other members may wait for what was given back, or for the end of the stream.
    desk.changed(request.stream.key)
    if stale:
        raise stale
    return done(call)


def get_groups(desk: Desk, call: Call) -> Answer | None:
    ref = call.request.stream
    view = desk.view(ref)
    if view is None:
        return None
    names = set(desk.group_log.names(ref.key)) | {key[3] for key in desk.groups if key[:3] == ref.key}
    return json_answer(call, {name: desk.group(ref, name).describe(view.states) for name in sorted(names)})


def seek_group(desk: Desk, call: Call) -> Answer | None:
    request, view = call.request, desk.view(call.request.stream)
    if view is None:
        return None
    group = desk.group(request.stream, request.group)
    group.seek(int(bounded(request.frame_index, 0, view.states.announced)))
    desk.changed(request.stream.key)
    return json_answer(call, group.describe(view.states))


def dead_letters(desk: Desk, call: Call) -> Answer | None:
    request, view = call.request, desk.view(call.request.stream)
    if view is None:
        return None
    group = desk.group(request.stream, request.group)
    indices = sorted(group.dead_letters) if request.indices is None else request.indices
    chosen = [index for index in indices if index in group.dead_letters]
    (group.retry_dead if request.action == "retry" else group.drop_dead)(chosen)
    desk.changed(request.stream.key)
    return json_answer(call, {"action": request.action, "indices": chosen})


def take_back(desk: Desk, request: Any, reply: Any) -> None:
    """What was leased to a member that is gone goes to the next one at once; nobody has looked at it."""
    if isinstance(request, wire.NextFrames) and isinstance(reply, wire.Frames):
        group = desk.group(request.stream, request.group)
        for info, lease in zip(reply.infos, reply.leases, strict=True):
            group.give_back(info.frame_index, lease, counts=False)
        desk.changed(request.stream.key)


def _hand_out(desk: Desk, call: Call, view: StreamView, group: Group) -> Answer | None:
    request, member = call.request, check_name(call.request.member, "member")
    if _key(call) in desk.fetching:
        # An empty answer now would overtake the one that is being fetched; only who leaves gets it.
        return None if call.deadline else _answer(call, [], [], group)
    lease_s = bounded(request.lease_s, 0.05, _MAX_LEASE_S)
    credit = min(max(request.max_bytes, 1), call.client.credit, MOST_BYTES_AN_ANSWER)
    room = 1 + credit // (desk.typical_bytes.get(request.stream.key, 0) + ROW_BYTES)
    leases = group.take(view.states, member, lease_s, min(max(request.max_frames, 1), MOST_FRAMES_AT_ONCE, room))
    if not leases:
        is_end = view.is_terminal and group.is_drained(view.states)
        return _answer(call, [], [], group, is_end=is_end) if is_end or call.is_overdue else None
    given: list[Lease] = []
    frames: list[RawFrame] = []
    for at, lease in enumerate(leases):
        parts = desk.in_memory(view, lease.frame_index)
        if parts is None or (frames and credit <= 0):
            rest = leases[at:]
            if not frames:
                return _fetch(desk, call, view, group, rest, credit)
            _untake(group, rest)
            break
        given += [lease] * len(parts)
        frames += parts
        credit -= sum(part.nbytes + ROW_BYTES for part in parts)
    _note_size(desk, call, frames)
    return _answer(call, frames, given, group)


def _fetch(desk: Desk, call: Call, view: StreamView, group: Group, leases: list[Lease], credit: int) -> Answer:
    """Frames that are on disk only: the librarian reads them, within the client's credit."""
    _untake(group, leases[_MOST_FROM_DISK:])
    wanted = deque(leases[:_MOST_FROM_DISK])
    desk.fetching.add(_key(call))

    def fetch() -> None:
        found: list[tuple[Lease, list[RawFrame]]] = []
        damaged: list[tuple[Lease, str]] = []
        gone: list[Lease] = []
        left = credit
        try:
            while wanted and left > 0:
                lease = wanted[0]
                try:
                    parts = desk.from_disk(view, lease.frame_index)
                    found.append((lease, parts))
                    left -= sum(part.nbytes + ROW_BYTES for part in parts)
                except FrameMissing:  # in memory only, and it has made room just now: the group will pass it
                    gone.append(lease)
                except (CorruptFrame, OSError) as error:
                    damaged.append((lease, str(error)))
                wanted.popleft()
        finally:
            desk.do_later(lambda: _fetched(desk, call, group, found, damaged, [*gone, *wanted]))

    desk.librarian.do(fetch)
    return LATER


def _fetched(
    desk: Desk,
    call: Call,
    group: Group,
    found: list[tuple[Lease, list[RawFrame]]],
    damaged: list[tuple[Lease, str]],
    rest: list[Lease],
) -> None:
    """In the server thread: answer with what was read; the rest is as if it had never been taken."""
    desk.fetching.discard(_key(call))
    for lease, why in damaged:
        # No member will ever get it, and the group must go on.
        log.error("group %s goes on without a damaged frame: %s", call.request.group, why)
        group.set_aside(lease, why)
    _untake(group, rest)
    frames = [part for _, parts in found for part in parts]
    given = [lease for lease, parts in found for _ in parts]
    _note_size(desk, call, frames)
    desk.send(call, _answer(call, frames, given, group))
    # For those who wait behind it.
    desk.changed(call.request.stream.key)


def _key(call: Call) -> GroupKey:
    return (*call.request.stream.key, call.request.group)


def _note_size(desk: Desk, call: Call, frames: list[RawFrame]) -> None:
    if frames:
        desk.typical_bytes[call.request.stream.key] = frames[-1].nbytes
        while len(desk.typical_bytes) > _KEEP_SIZES:
            desk.typical_bytes.pop(next(iter(desk.typical_bytes)))


def _untake(group: Group, leases: list[Lease]) -> None:
    for lease in reversed(leases):
        group.untake(lease)


def _answer(call: Call, frames: list[RawFrame], leases: list[Lease], group: Group, *, is_end: bool = False) -> Answer:
    reply, payload = frames_answer(call, frames, group.cursor, is_end=is_end)
    reply.leases = [lease.number for lease in leases]
    reply.deliveries = [lease.delivery for lease in leases]
    reply.late = [lease.number for lease in leases if lease.is_late]
    return reply, payload


def _acknowledge_all(group: Group, leases: list[tuple[int, int]]) -> NearlineError | None:
    """Acknowledge each; the first refusal, if any."""
    stale = None
    for frame_index, number in leases:
        try:
            group.acknowledge(frame_index, number)
        except NearlineError as error:
            stale = stale or error
    return stale
