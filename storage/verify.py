"""Reading a whole run to see whether it is still what was stored.

Every frame's crc32c and digest, every chunk's digest and frame table against its commit, shard
indices, amendments, headers, events and Zarr metadata. What is wrong is a finding: which file and
frame, and what to do. Frames that never came are no damage; they are listed as holes.
"""

import json
import mmap
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from storage.amendments import AmendmentCommit, view_segment
from storage.errors import CorruptFrame, NearlineError, PlaceUnavailable
from storage.files import file_sizes, is_local, readable
from storage.frame import FrameInfo, chunk_digest, file_digest, has_digest
from storage.frame_table import read_frame_table
from storage.journal import CRC_BYTES, MAGIC, Journal
from storage.masks import PLANES, read_plane
from storage.models import Model, RunHeader, StreamHeader
from storage.online_account import OnlineAccount
from storage.run_folder import ChunkCommit, Event, StreamPaths, has_writer, latest_epoch, parse_file
from storage.shard import ShardReader
from storage.states import READABLE, FrameState, StateRange
from storage.zarr_layout import array_metadata

__all__ = ["Finding", "Hole", "VerifyReport", "verify_run"]

# Frames read at once: neighbours behind a URL come with one request.
_BATCH = 32
_RESTORE = "restore it from a copy"
_COMPLETE = "run `nearline veto` on the run again: it completes what was begun"
_OTHER_TABLE = "is not the table that was sealed: its digest is not that of the commit"
_STREAM_PARTS = (".stream.json", ".zarr", ".frames", ".chunks", ".journal", ".claims", ".amendments")


class Finding(Model):
    """Something that is not as it was stored."""

    file: str = Field(description="inside the run folder")
    frame: int | None = Field(None, description="frame_index, where it concerns one frame")
    what: str
    remedy: str


class Hole(Model):
    """Frames that were announced and are not there, with the cause; accounted for, so no damage."""

    data_source: str
    frames: StateRange


class VerifyReport(Model):
    """What was read, and what was found."""

    folder: str
    n_files: int
    n_frames: int
    n_bytes: int
    seconds: float
    holes: list[Hole]
    findings: list[Finding]

    @property
    def is_sound(self) -> bool:
        return not self.findings


def verify_run(folder: Path, progress: Callable[[int, int], None] | None = None) -> VerifyReport:
    """Read everything of a run, on disk or behind a URL.

    Parameters
    ----------
    progress : told of the bytes read and to read.
    """
    started = time.monotonic()
    check = _RunCheck(folder, progress)
    check.run()
    return VerifyReport(
        folder=str(folder),
        n_files=len(check.sizes),
        n_frames=check.n_frames,
        n_bytes=check.n_bytes,
        seconds=round(time.monotonic() - started, 3),
        holes=check.holes,
        findings=check.findings,
    )


class _RunCheck:
    """One pass over a run folder; finds rather than raises."""

    def __init__(self, folder: Path, progress: Callable[[int, int], None] | None) -> None:
        self.folder, self._progress = folder, progress
        self.sizes = {n: size for n, size in file_sizes(folder).items() if not Path(n).name.startswith(".")}
        self.findings: list[Finding] = []
        self.holes: list[Hole] = []
        self.n_frames = self.n_bytes = 0
        self._read: set[str] = set()
        self._n_read = 0

    def run(self) -> None:
        with self.finding("run.json"):
            self.parse(RunHeader, self.folder / "run.json")
        events = list(self._events())
        is_deleted = any(event.kind == "run_deleted" for event in events)
        for name in self._data_sources():
            _StreamCheck(self, StreamPaths(self.folder, name), events).run(is_deleted=is_deleted)
        self._other_files()

    # ---- what all checks use --------------------------------------------------------------------

    def found(self, file: Path | str, what: str, remedy: str, frame: int | None = None) -> None:
        name = file if isinstance(file, str) else self.name(file)
        self.findings.append(Finding(file=name, frame=frame, what=what, remedy=remedy))

    @contextmanager
    def finding(self, file: Path | str, remedy: str = _RESTORE, frame: int | None = None) -> Iterator[None]:
        """Whatever cannot be read in this block is a finding, and the check goes on behind it."""
        try:
            yield
        except PlaceUnavailable:
            raise
        except FileNotFoundError:
            self.found(file, "is gone", remedy, frame)
        except (NearlineError, OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
            self.found(file, f"cannot be read: {_short(error)}", remedy, frame)

    def parse(self, model: type[Any], path: Path) -> Any:
        self.done(path)
        return parse_file(model, path)

    def name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def exists(self, path: Path) -> bool:
        return self.name(path) in self.sizes

    def below(self, folder: Path) -> list[str]:
        """Names of the files in a folder, sorted."""
        prefix = self.name(folder) + "/"
        return sorted(name for name in self.sizes if name.startswith(prefix))

    def done(self, path: Path) -> None:
        """A file has been read."""
        name = self.name(path)
        if name in self.sizes and name not in self._read:
            self._read.add(name)
            self.advance(self.sizes[name])

    def advance(self, n_bytes: int) -> None:
        self._n_read += n_bytes
        if self._progress:
            total = sum(self.sizes.values())
            self._progress(min(self._n_read, total), total)

    # ---- the run itself -------------------------------------------------------------------------

    def _events(self) -> Iterator[Event]:
        expected = 1
        for name in self.below(self.folder / "events"):
            with self.finding(name):
                event: Event = self.parse(Event, self.folder / name)
                number, _, kind = Path(name).stem.partition("-")
                if event.kind != kind or f"{event.number:06d}" != number:
                    self.found(name, f"says it is event {event.number}, {event.kind}", _RESTORE)
                yield event
            number = Path(name).name[:6]
            if number.isdecimal():
                if int(number) > expected:
                    self.found(f"events/{expected:06d}-….json", "is gone: its number is left out", _RESTORE)
                expected = int(number) + 1

    def _data_sources(self) -> list[str]:
        """All streams of which anything is there, so that one without a header is noticed."""
        tops = {name.partition("/")[0] for name in self.sizes}
        return sorted({top.removesuffix(part) for top in tops for part in _STREAM_PARTS if top.endswith(part)})

    def _other_files(self) -> None:
        """Results, annotations and whatever else is there: as far as their format tells, they are whole."""
        for name in sorted(self.sizes.keys() - self._read):
            path = self.folder / name
            with self.finding(name, "make it again, or restore it from a copy"):
                if name.endswith(".json"):
                    json.loads(path.read_bytes())
                elif name.endswith(".parquet"):
                    pq.read_table(readable(path))
            self.done(path)


class _StreamCheck:
    """One pass over the files of one stream."""

    def __init__(self, run: _RunCheck, paths: StreamPaths, events: Sequence[Event]) -> None:
        self.run_check, self.paths = run, paths
        mine = [e.payload for e in events if e.kind == "stream_finished"]
        ends = [payload for payload in mine if payload.get("data_source") == paths.data_source]
        self.announced: int | None = ends[0].get("announced") if ends else None
        self.is_ended = bool(ends)
        self.online_account = OnlineAccount.model_validate(ends[0]) if ends and "ranges" in ends[0] else None
        self.has_run_ended = any(e.kind == "run_finished" for e in events)

    def run(self, *, is_deleted: bool) -> None:
        header = self._header()
        if header is None:
            return
        commits = self._commits(header)
        self._list_holes(commits.values())
        if header.is_online:
            self._check_online(header)
            return
        if is_deleted:
            return
        self._check_completeness(header, commits)
        for commit in commits.values():
            self._check_chunk(header, commit)
        if header.kind == "frames":
            self._check_zarr(header, commits)
            for plane in PLANES:
                self._check_plane(plane, header)
        self._check_journals(header, commits)
        self._check_amendments(header)

    # ---- headers and commits --------------------------------------------------------------------

    def _header(self) -> StreamHeader | None:
        check, path = self.run_check, self.paths.header
        has_copy = check.exists(self.paths.zarr / "zarr.json")
        remedy = f"{_RESTORE}, or from attributes.nearline in {check.name(self.paths.zarr)}/zarr.json"
        with check.finding(path, remedy if has_copy else _RESTORE):
            header: StreamHeader = check.parse(StreamHeader, path)
            if header.data_source != self.paths.data_source:
                check.found(path, f"is the header of {header.data_source}", _RESTORE)
            return header
        return None

    def _commits(self, header: StreamHeader) -> dict[int, ChunkCommit]:
        check, found = self.run_check, {}
        newest = latest_epoch(self.paths)
        for name in check.below(self.paths.chunks):
            with check.finding(name):
                commit: ChunkCommit = check.parse(ChunkCommit, check.folder / name)
                for problem in _contradictions(commit, header, int(Path(name).stem)):
                    check.found(name, problem, _RESTORE)
                if commit.epoch > newest:
                    check.found(name, f"names epoch {commit.epoch}, which nobody claimed", _RESTORE)
                found[int(Path(name).stem)] = commit
        return found

    def _check_completeness(self, header: StreamHeader, commits: dict[int, ChunkCommit]) -> None:
        """Every chunk of an ended stream has a commit; no other has a shard or a table without a journal."""
        check, size = self.run_check, header.frames_per_chunk
        if self.is_ended:
            expected = set(range(-(-(self.announced or 0) // size)))
        else:
            expected = {int(Path(name).stem) for name in check.below(self.paths.frames) if Path(name).stem.isdecimal()}
            expected -= {
                int(Path(name).stem) for name in check.below(self.paths.journal) if Path(name).stem.isdecimal()
            }
        unreadable = {
            int(Path(f.file).stem) for f in check.findings if f.file.startswith(check.name(self.paths.chunks))
        }
        for chunk in sorted(expected - commits.keys() - unreadable):
            stop = min((chunk + 1) * size, self.announced or (chunk + 1) * size)
            check.found(
                self.paths.commit(chunk),
                f"is gone, so frames {chunk * size} to {stop - 1} cannot be read",
                _RESTORE,
            )
        if self.has_run_ended and not self.is_ended and header.parent is None:
            check.found("events", f"the end of {header.data_source} is not recorded", _RESTORE)

    def _numbers(self, folder: Path) -> set[int]:
        """Chunks that have a file in a folder."""
        stems = (Path(name).stem for name in self.run_check.below(folder))
        return {int(stem) for stem in stems if stem.isdecimal()}

    def _list_holes(self, commits: Iterable[ChunkCommit]) -> None:
        for commit in commits:
            for part in commit.ranges:
                if FrameState[part.state] not in (FrameState.stored, FrameState.left_out):
                    self.run_check.holes.append(Hole(data_source=self.paths.data_source, frames=part))

    def _check_online(self, header: StreamHeader) -> None:
        """Of a stream in memory only there is nothing to read but masks; its frames are holes."""
        check = self.run_check
        account = self.online_account
        if account is None and check.exists(self.paths.online_account):
            with check.finding(self.paths.online_account):
                account = check.parse(OnlineAccount, self.paths.online_account)
        for part in account.ranges if account else []:
            check.holes.append(Hole(data_source=header.data_source, frames=part))
        for plane in PLANES:
            self._check_plane(plane, header)
        if self.has_run_ended and not self.is_ended and header.parent is None:
            check.found("events", f"the end of {header.data_source} is not recorded", _RESTORE)

    # ---- chunks ---------------------------------------------------------------------------------

    def _check_chunk(self, header: StreamHeader, commit: ChunkCommit) -> None:
        rows = self._rows(header, commit)
        if header.kind == "table":
            self.run_check.n_frames += commit.n_frames
        elif commit.n_frames:
            self._check_shard(header, commit, rows)

    def _rows(self, header: StreamHeader, commit: ChunkCommit) -> dict[int, FrameInfo] | None:
        """A chunk's frame table by slot, checked against its commit; None if it cannot be read."""
        check, path = self.run_check, self.paths.frame_table(commit.chunk)
        with check.finding(path):
            content = path.read_bytes()
            check.done(path)
            if commit.table_digest and file_digest(content) != commit.table_digest:
                check.found(path, _OTHER_TABLE, _RESTORE)
            rows = {info.frame_index * header.parts + info.part: info for info in read_frame_table(path)}
            gone = commit.vetoed
            kept = {slot: info for slot, info in rows.items() if info.frame_index not in gone}
            for problem in _differences(kept, commit, header):
                check.found(path, problem, _RESTORE)
            if commit.vetoes and len(commit.vetoes) == 1 and chunk_digest(rows) != commit.vetoes[0].digest:
                check.found(path, "its rows of vetoed frames differ from what was sealed", _RESTORE)
            return kept
        return None

    def _check_shard(self, header: StreamHeader, commit: ChunkCommit, rows: dict[int, FrameInfo] | None) -> None:
        check, n_slots = self.run_check, header.frames_per_chunk * header.parts
        path = self.paths.stored_shard(commit.chunk, len(header.array_shape))
        local = self.paths.shard(commit.chunk, len(header.array_shape))
        first = commit.chunk * n_slots
        with check.finding(local, f"{_RESTORE}; its frames cannot be read"):
            reader = ShardReader(path, first, n_slots)
            there = [slot for slot in range(first, first + n_slots) if slot in reader]
            if rows is not None and commit.vetoes and rows.keys() < set(there):
                check.found(local, "still has frames that were vetoed: the veto was interrupted", _COMPLETE)
                there = sorted(rows)
            if rows is not None and rows.keys() != set(there):
                odd = sorted(rows.keys() ^ set(there))[0] // header.parts
                check.found(local, "its index and the frame table name different frames", _RESTORE, odd)
            for at in range(0, len(there), _BATCH):
                self._check_frames(reader, local, there[at : at + _BATCH], rows or {}, header.parts)
            reader.close()
        # What lies between the frames is read by nobody once the chunk is sealed.
        check.done(local)

    def _check_frames(
        self, reader: ShardReader, path: Path, slots: list[int], rows: dict[int, FrameInfo], parts: int
    ) -> None:
        try:
            blobs: list[bytes | None] = list(reader.read_many(slots))
        except (CorruptFrame, OSError) as error:
            if isinstance(error, PlaceUnavailable):
                raise
            blobs = [self._one_frame(reader, path, slot, parts) for slot in slots]
        for slot, blob in zip(slots, blobs, strict=True):
            if blob is not None:
                self._check_blob(path, slot // parts, blob, rows.get(slot))

    def _one_frame(self, reader: ShardReader, path: Path, slot: int, parts: int) -> bytes | None:
        with self.run_check.finding(path, "restore the file from a copy, or leave the frame out", slot // parts):
            return reader.read(slot)
        return None

    def _check_blob(self, path: Path, frame_index: int, blob: bytes, info: FrameInfo | None) -> None:
        check = self.run_check
        check.n_frames += 1
        check.n_bytes += len(blob)
        if info is not None and not has_digest(blob, info.digest):
            remedy = "restore shard and frame table from a copy, or leave the frame out"
            check.found(path, "its bytes are not those that were received: the digest differs", remedy, frame_index)

    # ---- Zarr -----------------------------------------------------------------------------------

    def _check_zarr(self, header: StreamHeader, commits: dict[int, ChunkCommit]) -> None:
        check, length = self.run_check, max((c.stop for c in commits.values()), default=0)
        remedy = "start a service on the data folder, or restore it from a copy; frames are read without it"
        array, group = self.paths.array / "zarr.json", self.paths.zarr / "zarr.json"
        with check.finding(array, remedy):
            content = json.loads(array.read_bytes())
            check.done(array)
            shown = content["shape"][0]
            if content != array_metadata(header, shown):
                check.found(array, "does not describe the stream that its header does", remedy)
            # While the stream is open, the length may lag behind.
            if shown > length or (self.is_ended and shown != length):
                check.found(array, f"says {shown} frames, the commits say {length}", remedy)
        with check.finding(group, remedy):
            content = json.loads(group.read_bytes())
            check.done(group)
            if StreamHeader.model_validate(content["attributes"]["nearline"]) != header:
                remedy = (
                    f"compare it with attributes.nearline in {check.name(group)}, and restore the one that is wrong"
                )
                check.found(self.paths.header, f"differs from its copy in {check.name(group)}", remedy)

    def _check_plane(self, plane: str, header: StreamHeader) -> None:
        """A mask or flat field of which anything is there is whole."""
        check, folder = self.run_check, self.paths.zarr / plane
        names = check.below(folder)
        if not names:
            return
        expected = folder / "c" / "/".join("0" * len(header.array_shape))
        for path in (folder / "zarr.json", expected):
            if not check.exists(path):
                check.found(path, "is gone", _RESTORE)
                return
        with check.finding(expected):
            array = read_plane(self.paths.zarr, plane)
            if array is not None and array.shape != tuple(header.array_shape):
                check.found(folder / "zarr.json", f"has shape {array.shape}, the frames {header.array_shape}", _RESTORE)
        for name in names:
            check.done(check.folder / name)

    # ---- what is not sealed, and what came late -------------------------------------------------

    def _check_journals(self, header: StreamHeader, commits: dict[int, ChunkCommit]) -> None:
        if not is_local(self.paths.journal):
            return
        check, size = self.run_check, header.frames_per_chunk
        is_written = has_writer(self.paths)
        for chunk, path in self.paths.journals():
            with check.finding(path):
                if chunk in commits:
                    if not is_written:
                        check.found(path, "is left over: its chunk is sealed", "start a service on the data folder")
                    continue
                journal = Journal.view(path, chunk * size, size, header.parts, checks_blobs=False)
                self._check_records(path, journal, header.parts)
                if not is_written:
                    self._check_tail(path, journal.end)
        with check.finding(self.paths.accounts):
            if check.exists(self.paths.accounts) and not is_written:
                self._check_tail(self.paths.accounts, Journal.view(self.paths.accounts, 0, 0).end)
        for name in check.below(self.paths.journal):
            check.done(check.folder / name)

    def _check_records(self, path: Path, journal: Journal, parts: int) -> None:
        for slot, info in list(journal.infos.items()):
            with self.run_check.finding(path, "leave the frame out, or restore the file from a copy", slot // parts):
                self._check_blob(path, slot // parts, journal.read(slot).blob, info)
                place = journal.locations[slot]
                behind = os.pread(journal.fd, CRC_BYTES, place.offset + place.length)
                if int.from_bytes(behind, "little") != info.crc32c:
                    self.run_check.found(path, "the checksum behind the frame is another", _RESTORE, slot // parts)

    def _check_tail(self, path: Path, end: int) -> None:
        """A torn record at the end was never acknowledged; whole ones behind it are frames that are lost to us."""
        n_bytes = path.stat().st_size - end
        if n_bytes <= 0:
            return
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            has_more = content.find(MAGIC, end + 1) >= 0
        if has_more:
            self.run_check.found(path, f"is damaged at byte {end}; the records behind it cannot be reached", _RESTORE)
        else:
            self.run_check.found(
                path,
                f"ends in the middle of a record, {n_bytes} bytes: left by a crash and never acknowledged, or damaged",
                "start a service on the data folder: it goes on behind the last whole record",
            )

    def _check_amendments(self, header: StreamHeader) -> None:
        check = self.run_check
        names = check.below(self.paths.amendments)
        for name in names:
            if name.endswith(".segment") and (self.is_ended or not is_local(check.folder)):
                self._check_segment(check.folder / name, header)
            elif name.endswith(".json") and name.removesuffix(".json") + ".segment" not in names:
                check.found(name.removesuffix(".json") + ".segment", "is gone", f"{_RESTORE}; it holds late frames")
        for name in names:
            check.done(check.folder / name)

    def _check_segment(self, path: Path, header: StreamHeader) -> None:
        check = self.run_check
        with check.finding(path.with_suffix(".json")):
            commit: AmendmentCommit = check.parse(AmendmentCommit, path.with_suffix(".json"))
            with check.finding(path):
                segment = view_segment(path, header.parts)
                if chunk_digest(segment.infos) != commit.digest:
                    check.found(path, f"does not hold the {commit.n_frames} late frames that were sealed", _RESTORE)
                self._check_records(path, segment, header.parts)
            table = path.with_suffix(".parquet")
            with check.finding(table):
                if file_digest(table.read_bytes()) != commit.table_digest:
                    check.found(table, _OTHER_TABLE, _RESTORE)
                read_frame_table(table)


def _contradictions(commit: ChunkCommit, header: StreamHeader, chunk: int) -> Iterator[str]:
    """What in a commit cannot be, in words."""
    size = header.frames_per_chunk
    if commit.chunk != chunk or commit.start != chunk * size or not 0 < commit.stop - commit.start <= size:
        yield f"speaks of chunk {commit.chunk}, frames {commit.start} to {commit.stop - 1}"
    edges = [commit.start, *(part.stop for part in commit.ranges)]
    if [part.start for part in commit.ranges] != edges[:-1] or edges[-1] != commit.stop:
        yield "its ranges do not cover its frames"
    n_there = sum(part.stop - part.start for part in commit.ranges if FrameState[part.state] in READABLE)
    n_there -= len(commit.vetoed)
    if n_there != commit.n_frames:
        yield f"says {commit.n_frames} frames, its ranges {n_there}"


def _differences(rows: dict[int, FrameInfo], commit: ChunkCommit, header: StreamHeader) -> Iterator[str]:
    """How a frame table differs from the commit of its chunk, in words."""
    indices = {slot // header.parts for slot in rows}
    if len(indices) != commit.n_frames:
        yield f"has {len(indices)} frames, the commit {commit.n_frames}"
    n_bytes = sum(info.size_bytes for info in rows.values())
    if n_bytes != commit.size_bytes:
        yield f"speaks of {n_bytes} bytes, the commit of {commit.size_bytes}"
    if chunk_digest(rows) != commit.digest:
        yield "its rows differ from what was sealed: the chunk's digest is another"


def _short(error: Exception) -> str:
    """An error's own words, on one line."""
    words = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error) or type(error).__name__
    return " ".join(words.split())[:300]
