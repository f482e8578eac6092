"""Frames that came after their chunk was sealed without them.

A sealed chunk does not change, so what comes late goes to a segment file beside the chunks: in
the journal's format, one for each service that wrote the stream, named by its epoch. At the
stream's end a segment gets a frame table and a commit, and does not change any more either.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from storage.codec import Buffer
from storage.files import is_local, make_folder, publish, replace, sync_folder
from storage.frame import FrameInfo, RawFrame, chunk_digest, file_digest
from storage.frame_table import frame_table, table_bytes
from storage.journal import Journal
from storage.models import Record

__all__ = ["AmendmentCommit", "Amendments", "view_segment"]

_SUFFIX = ".segment"
# A segment takes frames of any index.
_ANY = 1 << 62


class AmendmentCommit(Record):
    """What a sealed segment holds; its digests are made as a chunk's."""

    segment: int
    n_frames: int
    size_bytes: int
    digest: str
    table_digest: str
    epoch: int
    sealed_at: datetime


class Amendments:
    """The late frames of a stream, by slot (``frame_index * parts + part``).

    One thread changes it; reading is for any.
    """

    def __init__(self, folder: Path, parts: int) -> None:
        self.folder, self._parts = folder, parts
        self._segments: dict[int, Journal] = {}
        self._places: dict[int, Journal] = {}
        self._has_new_name = False

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, slot: int) -> bool:
        return slot in self._places

    def info(self, slot: int) -> FrameInfo | None:
        """The row of a late frame or part; None if there is none."""
        journal = self._places.get(slot)
        return None if journal is None else journal.infos[slot]

    def read(self, slot: int) -> RawFrame:
        """A late frame or part; KeyError if there is none."""
        return self._places[slot].read(slot)

    def slots(self) -> list[int]:
        """All of them, rising."""
        return sorted(self._places)

    # ---- the writer ---------------------------------------------------------------------------

    def append(self, epoch: int, info: FrameInfo, blob: Buffer) -> None:
        """Write one frame to this epoch's segment; when this returns, `kill -9` cannot lose it.

        Raises
        ------
        StorageFull : the disk refused; nothing has changed.
        """
        segment = self._segments.get(epoch)
        if segment is None:
            make_folder(self.folder)
            segment = Journal.create(self._path(epoch), 0, _ANY, self._parts)
            self._segments[epoch], self._has_new_name = segment, True
        segment.append(info, blob)
        self._places[info.frame_index * self._parts + info.part] = segment

    def recover(self) -> list[FrameInfo]:
        """Take up what earlier services left, whole records only; its rows in the order they came."""
        found: list[FrameInfo] = []
        for epoch in self._epochs():
            is_sealed = self._path(epoch).with_suffix(".json").exists()
            take_up = Journal.view if is_sealed else Journal.recover
            found += self._adopt(epoch, take_up(self._path(epoch), 0, _ANY, self._parts))
        return found

    def sync(self) -> None:
        """Make them durable; from any thread."""
        for segment in list(self._segments.values()):
            segment.sync()
        if self._has_new_name:
            self._has_new_name = False
            sync_folder(self.folder)

    def seal(self, epoch: int) -> None:
        """Publish table and commit of every segment that has none; after an OSError, call it again."""
        for number, segment in self._segments.items():
            commit = self._path(number).with_suffix(".json")
            if commit.exists():
                continue
            segment.sync()
            table = table_bytes(frame_table(segment.infos.values()))
            replace(commit.with_suffix(".parquet"), table)
            publish(commit, self._commit_of(number, segment, table, epoch).model_dump_json(indent=1).encode())

    # ---- readers elsewhere --------------------------------------------------------------------

    def look(self) -> list[FrameInfo]:
        """Take in what has come since the last look; its rows in the order they came."""
        found: list[FrameInfo] = []
        for epoch in self._epochs():
            segment = self._segments.get(epoch)
            if segment is None:
                found += self._adopt(epoch, view_segment(self._path(epoch), self._parts))
            else:
                n_known = len(segment.infos)
                segment.look_again()
                found += self._index(segment, list(segment.infos)[n_known:])
        return found

    def _adopt(self, epoch: int, segment: Journal) -> list[FrameInfo]:
        self._segments[epoch] = segment
        return self._index(segment, segment.infos)

    def _index(self, segment: Journal, slots: Iterable[int]) -> list[FrameInfo]:
        self._places.update(dict.fromkeys(slots, segment))
        return [segment.infos[slot] for slot in slots]

    def _epochs(self) -> Iterator[int]:
        names = (p.name.removesuffix(_SUFFIX) for p in self.folder.glob(f"*{_SUFFIX}"))
        return iter(sorted(int(name) for name in names if name.isdecimal()))

    def _path(self, epoch: int) -> Path:
        return self.folder / f"{epoch:05d}{_SUFFIX}"

    @staticmethod
    def _commit_of(number: int, segment: Journal, table: bytes, epoch: int) -> AmendmentCommit:
        return AmendmentCommit(
            segment=number,
            n_frames=len({info.frame_index for info in segment.infos.values()}),
            size_bytes=sum(info.size_bytes for info in segment.infos.values()),
            digest=chunk_digest(segment.infos),
            table_digest=file_digest(table),
            epoch=epoch,
            sealed_at=datetime.now(UTC),
        )


def view_segment(path: Path, parts: int) -> Journal:
    """A segment for reading only, on disk or behind a URL."""
    if is_local(path):
        return Journal.view(path, 0, _ANY, parts, checks_blobs=False)
    # On an object store it is sealed, and small: a local copy without a name serves.
    with path.open("rb") as there, tempfile.TemporaryFile() as here:
        shutil.copyfileobj(there, here)
        here.flush()
        return Journal.of_file(path, os.dup(here.fileno()), 0, _ANY, parts, checks_blobs=False)
