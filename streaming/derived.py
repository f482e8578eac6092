"""Writing a derived stream (results, binned frames) beside its parent: through the service that has
the run, or straight into the folder of a run that no service has.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from storage.codec import Buffer
from storage.errors import StreamNotOpen
from storage.frame import FrameInfo, blob_crc32c, blob_digest
from storage.metadata import pack_meta
from storage.models import StreamHeader
from storage.run_folder import RunFolder
from storage.stream_store import Admission, StreamStore
from streaming.producer import Producer
from streaming.retrieval import Run

__all__ = ["DerivedStream", "Row", "open_derived"]


class Row(NamedTuple):
    """One frame of a derived stream, or one part of it: its bytes (None in a table) and metadata."""

    frame_index: int
    blob: Buffer | None
    meta: dict[str, Any]
    part: int = 0


# Few large frames or many small rows.
_ROWS_A_MESSAGE, _BYTES_A_MESSAGE = 500, 32 << 20


class DerivedStream(Protocol):
    """Takes rows; the parent's index, sparse."""

    def send(self, rows: list[Row]) -> None:
        """Store rows; they are on disk when this returns. Rows sent before are left as they are."""
        ...

    def finish(self, announced: int) -> None:
        """End the stream; indices below ``announced`` that never came are missing."""
        ...


def open_derived(run: Run, header: StreamHeader, *, producer: str | None = None) -> DerivedStream:
    """A derived stream of a run, open for writing.

    Parameters
    ----------
    producer : name under which this and others fill the stream together: it ends with the first that finishes it,
        and one that died without finishing it is not waited for.

    Raises
    ------
    ProtocolError, FileExistsError : it exists and has ended.
    """
    if run.service_address is not None:
        return _ThroughService(run.service_address, header, producer)
    return _IntoFolder(RunFolder.open(run.folder), header)


class _ThroughService:
    def __init__(self, address: str, header: StreamHeader, producer: str | None) -> None:
        self._producer = Producer(address, header.experiment, header.data_source, name=producer)
        self._header = header
        self._stream = self._producer.derived(header.run, header)

    def send(self, rows: list[Row]) -> None:
        for message in _messages(rows):
            self._send(message)

    def _send(self, rows: list[Row]) -> None:
        try:
            self._stream.send_many(list(rows))
        except StreamNotOpen:
            # The service was restarted after the run had ended: it has to be told of this stream again.
            self._stream.start(self._header)
            self._stream.send_many(list(rows))

    def finish(self, announced: int) -> None:
        self._stream.finish(announced)
        self._producer.close()


def _messages(rows: list[Row]) -> Iterator[list[Row]]:
    """Rows in their order, as many at a time as go into one message."""
    message: list[Row] = []
    n_bytes = 0
    for row in rows:
        size = 0 if row.blob is None else memoryview(row.blob).nbytes
        if message and (len(message) == _ROWS_A_MESSAGE or n_bytes + size > _BYTES_A_MESSAGE):
            yield message
            message, n_bytes = [], 0
        message.append(row)
        n_bytes += size
    if message:
        yield message


class _IntoFolder:
    def __init__(self, folder: RunFolder, header: StreamHeader) -> None:
        exists = header.data_source in folder.data_sources()
        if exists and folder.finished(header.data_source):
            raise FileExistsError(f"stream {header.data_source} of {folder.path} has ended already")
        self._store = StreamStore.recover(folder, header.data_source) if exists else StreamStore.create(folder, header)

    def send(self, rows: list[Row]) -> None:
        for index, blob, meta, part in rows:
            blob = b"" if blob is None else blob
            info = FrameInfo(
                frame_index=index, size_bytes=memoryview(blob).nbytes, meta_json=pack_meta(meta), part=part
            )
            info.crc32c, info.digest = blob_crc32c(blob), blob_digest(blob)
            admission = self._store.admit(info)
            if admission is Admission.new:
                self._store.append(info, blob)
            elif admission is Admission.late:
                self._store.append_late(info, blob)
        self._store.seal_complete()

    def finish(self, announced: int) -> None:
        self._store.finish(announced, "not derived: the parent's frame is missing")
        self._store.close()
