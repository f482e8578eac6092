"""Annotations of a run's frames: kept and read for those who cannot see its folder."""

from collections.abc import Callable

from storage.annotations import Annotations, FolderAnnotations, accept_batch
from storage.errors import NearlineError, ProtocolError, StorageFull, StreamNotFound
from storage.names import run_key
from streaming import wire
from streaming.handlers.desk import LATER, MOST_BYTES_AN_ANSWER, Answer, Call, Desk, failure, json_answer

__all__ = ["annotate", "get_annotations"]

_MOST_BATCHES = 4096


def annotate(desk: Desk, call: Call) -> Answer:
    if len(call.parts) != 1:
        raise ProtocolError(f"annotations come as one batch in one payload part, not in {len(call.parts)}")
    return _in_librarian(desk, call, lambda: _keep(desk, call))


def get_annotations(desk: Desk, call: Call) -> Answer:
    return _in_librarian(desk, call, lambda: _read(desk, call))


def _keep(desk: Desk, call: Call) -> Answer:
    request = call.request
    folder, batch = desk.folder(request.experiment, request.run), accept_batch(bytes(call.parts[0].buffer))
    if batch.data_source is not None and batch.data_source not in folder.data_sources():
        raise StreamNotFound(
            f"run {run_key(request.experiment, request.run)} has no data source {batch.data_source!r}; "
            f"it has: {', '.join(folder.data_sources())}"
        )
    return json_answer(call, {"batch": Annotations(FolderAnnotations(folder.path)).add(batch)})


def _read(desk: Desk, call: Call) -> Answer:
    """Batches from the front, as many as fit into one answer, at least one."""
    request = call.request
    store = FolderAnnotations(desk.folder(request.experiment, request.run).path)
    waiting = store.numbers(request.after)
    numbers: list[int] = []
    batches: list[bytes] = []
    credit = min(call.client.credit, MOST_BYTES_AN_ANSWER)
    for number in waiting[:_MOST_BATCHES]:
        batch = store.read(number)
        if batches and len(batch) > credit:
            break
        credit -= len(batch)
        numbers.append(number)
        batches.append(batch)
    reply = wire.AnnotationsReply(id=call.request.id, numbers=numbers, is_end=len(numbers) == len(waiting))
    return reply, batches


def _in_librarian(desk: Desk, call: Call, make: Callable[[], Answer]) -> Answer:
    """Touch files in the librarian's thread only, and have the answer sent from the server's."""

    def work() -> None:
        try:
            answer = make()
        except NearlineError as error:
            answer = failure(call.request.id, error)
        except OSError as error:
            answer = failure(call.request.id, StorageFull(f"the annotations' files cannot be reached: {error}"))
        desk.do_later(lambda: desk.send(call, answer))

    desk.librarian.do(work)
    return LATER
