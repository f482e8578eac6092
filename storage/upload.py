"""Runs to an object store, or to another folder: as they are sealed, or afterwards.

The target holds a run as its folder does, so whoever reads it there needs no word of this. Order
makes it safe: shard → frame table → commit, events last; the commit is created without replacing.
What is there already is not sent again, so an upload that was interrupted is taken up by the next
one. Journals stay: what is not sealed is on the local disk only.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage.errors import DamagedFile, NearlineError, RunNotFound, UploadConflict
from storage.files import file_sizes, is_local, publish_copy, remote_errors, remove, replace_copy, to_path
from storage.models import Model, RunState
from storage.names import run_key
from storage.run_folder import LOCAL_EVENTS, RunFolder, StreamPaths, find_runs

__all__ = ["RunUpload", "UploadSummary", "Uploader", "upload_run"]

log = logging.getLogger("nearline.upload")

_FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 60.0
_COMPARE_BYTES = 16 << 20


class UploadSummary(Model):
    """What an upload sent, and where to."""

    run: str
    target: str
    n_files: int
    n_bytes: int
    n_there: int
    n_removed: int = 0


@dataclass(frozen=True, slots=True)
class _File:
    """A file of a run, by its name inside the run folder; a final one never changes."""

    name: str
    n_bytes: int
    is_final: bool


class RunUpload:
    """One run on its way to one target; used by one thread."""

    def __init__(self, folder: RunFolder, target: Path) -> None:
        if not is_local(folder.path):
            raise RunNotFound(f"{folder.path} is not a folder of this machine; only such a run can be uploaded")
        self.folder = folder
        self.target = target / folder.header.experiment / str(folder.header.run)
        self.is_begun = False
        self.n_sent = 0
        self._there: dict[str, int] = {}
        self._sent: dict[str, tuple[int, int]] = {}

    def begin(self) -> int:
        """Look at what is there, and refuse a target that holds something else; the number of files there.

        Raises
        ------
        UploadConflict : another run, or another version of this one, has its place.
        """
        self._there = file_sizes(self.target)
        n_there = len(self._there)
        if not self._put(self._file("run.json", is_final=True)):
            self._refuse_others("run.json", "another run of that name")
        for name in self.folder.data_sources():
            paths = self.folder.stream(name)
            common = [k for k in paths.commits() if self._name(paths.commit(k)) in self._there]
            if common:
                self._refuse_others(self._name(paths.commit(common[-1])), "another version of this run")
        self.is_begun = True
        return n_there

    def waiting(self) -> list[_File]:
        """Everything that is not at the target as it is here, in the order in which it has to be sent."""
        if self.folder.state is RunState.deleted:
            return []
        # Events are listed first and sent last: an end that is listed says that its chunks are.
        events = list(self._events())
        files = [*self._headers(), *self._chunks(), *self._others(), *events]
        return [file for file in files if not self._is_there(file)]

    def send(self, file: _File) -> bool:
        """Send one file; False if it is there already.

        Raises
        ------
        UploadConflict : the target has other content under a name that never changes.
        """
        if self._put(file):
            return True
        if not self._has_content_of(file):
            self._refuse_others(file.name, "other content")
        return False

    def chunk(self, data_source: str, chunk: int) -> list[_File]:
        """What of one sealed chunk, and of its stream's headers, is not at the target; in order."""
        paths = self.folder.stream(data_source)
        header = self._file(self._name(paths.header))
        files = [header, *self._group(paths), *self._chunk_files(paths, chunk), *self._length(paths)]
        return [file for file in files if not self._is_there(file)]

    def remove_sent(self) -> int:
        """Remove the shards of an ended run that are at the target; their number. Readers then go there."""
        remote, n_removed = file_sizes(self.target), 0
        for name in self.folder.data_sources():
            paths = self.folder.stream(name)
            if self.folder.finished(name) is None:
                continue
            for chunk in paths.commits():
                shards = [f for f in self._chunk_files(paths, chunk) if f.name.startswith(self._name(paths.array))]
                is_sealed_there = self._name(paths.commit(chunk)) in remote
                for shard in shards:
                    if is_sealed_there and remote.get(shard.name) == shard.n_bytes:
                        remove(self.folder.path / shard.name)
                        n_removed += 1
        return n_removed

    # ---- what is here ---------------------------------------------------------------------------

    def _headers(self) -> Iterator[_File]:
        for name in self.folder.data_sources():
            yield self._file(self._name(self.folder.stream(name).header))

    def _chunks(self) -> Iterator[_File]:
        for name in self.folder.data_sources():
            paths = self.folder.stream(name)
            yield from self._group(paths)
            for chunk in paths.commits():
                yield from self._chunk_files(paths, chunk)
            yield from self._length(paths)
            yield from self._amendments(paths)

    def _group(self, paths: StreamPaths) -> Iterator[_File]:
        """The Zarr group's metadata, and the masks in it."""
        for path in _files_below(paths.zarr, skip=paths.array):
            yield self._file(self._name(path))

    def _chunk_files(self, paths: StreamPaths, chunk: int) -> Iterator[_File]:
        commit = paths.commit(chunk)
        if not commit.exists():
            return
        shards = list(_files_below(paths.array / "c" / str(chunk)))
        if not shards and self._name(commit) not in self._there:
            self._check_empty(paths, chunk)
        for path in (*shards, *_files_below(paths.frame_table(chunk)), commit):
            yield self._file(self._name(path), is_final=True)

    def _check_empty(self, paths: StreamPaths, chunk: int) -> None:
        """A commit whose frames are not here must not be published there."""
        has_payload = self.folder.stream_header(paths.data_source).kind == "frames"
        if has_payload and paths.read_commit(chunk).n_frames:
            where = ", ".join(_uploaded_to(self.folder)) or "no place that is known; `nearline verify` says more"
            shard = paths.array / "c" / str(chunk)
            raise DamagedFile(f"{shard} is gone, so its chunk cannot be uploaded; the frames are in {where}")

    def _length(self, paths: StreamPaths) -> Iterator[_File]:
        for path in _files_below(paths.array / "zarr.json"):
            yield self._file(self._name(path))

    def _amendments(self, paths: StreamPaths) -> Iterator[_File]:
        """Sealed segments of late frames, commit last; an open one is still being written."""
        for commit in sorted(paths.amendments.glob("[0-9]*.json")):
            for path in (commit.with_suffix(".segment"), commit.with_suffix(".parquet"), commit):
                yield self._file(self._name(path), is_final=True)

    def _others(self) -> Iterator[_File]:
        """Claims, amendments, results: whatever is in the folder and is neither above nor for this machine only."""
        run = self.folder.path
        done = {run / "run.json", run / "events"}
        for name in self.folder.data_sources():
            paths = self.folder.stream(name)
            done |= {paths.header, paths.zarr, paths.frames, paths.chunks, paths.journal}
            done |= {paths.amendments, paths.claims / "lock"}
        for path in sorted(run.iterdir()):
            if path not in done:
                for file in _files_below(path):
                    if file not in done and not (file.name == "claim" and file.parent.parent.name == "processed"):
                        yield self._file(self._name(file))

    def _events(self) -> Iterator[_File]:
        for path in sorted((self.folder.path / "events").glob("[0-9]*.json")):
            if path.stem.partition("-")[2] not in LOCAL_EVENTS:
                yield self._file(self._name(path), is_final=True)

    def _file(self, name: str, *, is_final: bool = False) -> _File:
        return _File(name, (self.folder.path / name).stat().st_size, is_final)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder.path).as_posix()

    # ---- what is there --------------------------------------------------------------------------

    def _is_there(self, file: _File) -> bool:
        if self._sent.get(file.name) == self._stamp(file.name):
            return True
        if self._there.get(file.name) != file.n_bytes:
            return False
        # A shard without its commit may be what a crash, or somebody else, left: `send` looks into it.
        commit = _commit_of(file.name)
        is_addressed = file.name.startswith("steps/")
        is_there = commit in self._there if commit else is_addressed or self._has_content_of(file)
        if is_there:
            self._sent[file.name] = self._stamp(file.name)
        return is_there

    def _put(self, file: _File) -> bool:
        copy = publish_copy if file.is_final else replace_copy
        stamp = self._stamp(file.name)
        if not copy(self.folder.path / file.name, self.target / file.name):
            return False
        self.n_sent += 1
        self._sent[file.name] = stamp
        self._there[file.name] = file.n_bytes
        return True

    def _has_content_of(self, file: _File) -> bool:
        """Whether the target has the same bytes under that name."""
        with remote_errors(self.target), open(self.folder.path / file.name, "rb") as ours:
            try:
                with (self.target / file.name).open("rb") as theirs:
                    while block := ours.read(_COMPARE_BYTES):
                        if theirs.read(len(block)) != block:
                            return False
                    return not theirs.read(1)
            except FileNotFoundError:
                return False

    def _refuse_others(self, name: str, what: str) -> None:
        if not self._has_content_of(self._file(name)):
            raise UploadConflict(
                f"{self.target / name} differs from {self.folder.path / name}: the target holds {what}; "
                "upload to another place, or move what is there away"
            )

    def _stamp(self, name: str) -> tuple[int, int]:
        stat = (self.folder.path / name).stat()
        return stat.st_size, stat.st_mtime_ns


def upload_run(
    folder: RunFolder,
    target: Path,
    *,
    remove_local: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> UploadSummary:
    """Bring a run to a target, where it becomes ``target/experiment/run``; what is there is not sent again.

    Parameters
    ----------
    remove_local : afterwards remove the shards here, if the run has ended; it is then read from the target.
    progress : told of the bytes sent and to send.

    Raises
    ------
    UploadConflict, PlaceUnavailable
    """
    upload = RunUpload(folder, target)
    n_there = upload.begin()
    waiting = upload.waiting()
    total = sum(file.n_bytes for file in waiting)
    n_bytes = 0
    for file in waiting:
        upload.send(file)
        n_bytes += file.n_bytes
        if progress:
            progress(n_bytes, total)
    n_removed = _close_upload(upload, remove_local=remove_local)
    return UploadSummary(
        run=_key(folder),
        target=str(upload.target),
        n_files=upload.n_sent,
        n_bytes=n_bytes,
        n_there=n_there,
        n_removed=n_removed,
    )


def _close_upload(upload: RunUpload, *, remove_local: bool) -> int:
    """Record that an ended run is at the target, and remove its shards if that is wanted; how many."""
    state = upload.folder.state
    if not state.is_terminal or state is RunState.deleted:
        return 0
    url = str(upload.target)
    if url not in _uploaded_to(upload.folder):
        upload.folder.add_event("run_uploaded", {"to": url})
    return upload.remove_sent() if remove_local else 0


@dataclass
class _Waiting:
    """What is to be sent of one run, and its bytes by file; a chunk's are under its commit's name."""

    upload: RunUpload
    chunks: list[tuple[str, int]] = field(default_factory=list)
    n_bytes: dict[str, int] = field(default_factory=dict)
    is_whole: bool = False


class Uploader:
    """Sends runs to a target in a thread of its own, as they are recorded; recording never waits for it.

    A target that does not answer is tried again after a pause, longer each time. Nothing is kept
    over a restart: `resume` finds what is missing by looking.
    """

    def __init__(self, target: str | Path, *, remove_local: bool = False) -> None:
        self._target, self._remove_local = to_path(target), remove_local
        self._changed = threading.Condition()
        self._waiting: dict[Path, _Waiting] = {}
        self._uploads: dict[Path, RunUpload] = {}
        self._refused: dict[str, str] = {}
        self._is_closed = False
        self._error: str | None = None
        self._failing_since: float | None = None
        self._n_files = self._n_bytes = 0
        self._thread = threading.Thread(target=self._run, name="upload", daemon=True)
        self._thread.start()

    def chunk_sealed(self, folder: RunFolder, data_source: str, chunk: int) -> None:
        """Send a chunk whose commit is there; returns at once."""
        paths = folder.stream(data_source)
        n_bytes = sum(p.stat().st_size for p in _files_below(paths.array / "c" / str(chunk)))
        with self._changed:
            if _key(folder) in self._refused:
                return
            entry = self._entry(folder)
            entry.chunks.append((data_source, chunk))
            entry.n_bytes[_name(folder, paths.commit(chunk))] = n_bytes
            self._changed.notify_all()

    def run_changed(self, folder: RunFolder) -> None:
        """Send whatever of a run is not at the target: at its start, and at its end; returns at once."""
        with self._changed:
            self._entry(folder).is_whole = True
            self._refused.pop(_key(folder), None)
            self._changed.notify_all()

    def resume(self, root: Path) -> None:
        """After a restart: send what earlier runs of a data folder miss at the target."""
        for folder in find_runs(root):
            if str(RunUpload(folder, self._target).target) not in _uploaded_to(folder):
                self.run_changed(folder)

    def status(self) -> dict[str, Any]:
        """How far behind the target is, and why.

        ``chunks`` and ``bytes`` wait to be sent, of ``runs``; ``error`` is that of the last
        attempt, and ``refused`` names the runs that are not tried again, each with the reason.
        """
        with self._changed:
            waiting = [item for entry in self._waiting.values() for item in entry.n_bytes.items()]
            failing_s = 0.0 if self._failing_since is None else time.monotonic() - self._failing_since
            return {
                "target": str(self._target),
                "runs": len(self._waiting),
                "chunks": sum(".chunks/" in name for name, _ in waiting),
                "bytes": sum(n_bytes for _, n_bytes in waiting),
                "sent_files": self._n_files,
                "sent_bytes": self._n_bytes,
                "error": self._error,
                "failing_s": round(failing_s, 1),
                "refused": dict(self._refused),
            }

    def flush(self, timeout: float) -> bool:
        """Wait until nothing is left to send; whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._waiting, timeout)

    def close(self, timeout: float = 10.0) -> bool:
        """Send what is waiting, but for no longer than ``timeout`` s, and stop; whether all was sent."""
        is_sent = self.flush(timeout)
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(timeout if is_sent else 0)
        return is_sent

    def _run(self) -> None:
        try:
            self._send_until_closed()
        finally:
            if not self._is_closed:  # a fault of ours: it must not look like an upload that has nothing to do
                self._error = "the upload has stopped, the log says why; restart the service"

    def _send_until_closed(self) -> None:
        pause = _FIRST_RETRY_S
        while (entry := self._next()) is not None:
            try:
                self._send_waiting(entry)
            except OSError as problem:
                self._failed(entry, str(problem))
                with self._changed:
                    self._changed.wait_for(lambda: self._is_closed, pause)
                pause = min(2 * pause, _LAST_RETRY_S)
            except NearlineError as problem:
                self._refuse(entry, str(problem))
            else:
                pause = _FIRST_RETRY_S

    def _next(self) -> _Waiting | None:
        """The run that has waited longest; None when closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            return None if self._is_closed else next(iter(self._waiting.values()))

    def _send_waiting(self, entry: _Waiting) -> None:
        """Send the chunks told of one run; if it was asked for, everything else of it; let others have their turn."""
        upload = entry.upload
        if not upload.is_begun:
            upload.begin()
        with self._changed:
            chunks, is_whole = list(entry.chunks), entry.is_whole
            entry.is_whole = False
        for data_source, chunk in chunks:
            if not self._send(entry, upload.chunk(data_source, chunk)):
                return
            with self._changed:
                entry.chunks.remove((data_source, chunk))
                entry.n_bytes.pop(_name(upload.folder, upload.folder.stream(data_source).commit(chunk)), None)
        if is_whole:
            files = upload.waiting()
            with self._changed:
                entry.n_bytes.update({file.name: file.n_bytes for file in files})
            if not self._send(entry, files):
                return
            _close_upload(upload, remove_local=self._remove_local)
        self._had_its_turn(entry)

    def _send(self, entry: _Waiting, files: list[_File]) -> bool:
        """Send some files; False if the uploader was closed meanwhile."""
        for file in files:
            if self._is_closed:
                return False
            is_new = entry.upload.send(file)
            with self._changed:
                self._n_files += is_new
                self._n_bytes += is_new * file.n_bytes
                self._error = self._failing_since = None
                entry.n_bytes.pop(file.name, None)
        return True

    def _had_its_turn(self, entry: _Waiting) -> None:
        path = entry.upload.folder.path
        with self._changed:
            self._waiting.pop(path)
            if entry.chunks or entry.is_whole:
                self._waiting[path] = entry
            elif entry.upload.folder.state.is_terminal:
                self._uploads.pop(path)
            self._changed.notify_all()

    def _failed(self, entry: _Waiting, error: str) -> None:
        """Try a run again later, from the top: what the target has now must be looked at anew."""
        path = entry.upload.folder.path
        with self._changed:
            if error != self._error:
                log.error("the upload is behind, and goes on when it can: %s", error)
            self._error = error
            self._failing_since = self._failing_since or time.monotonic()
            entry.is_whole, entry.upload.is_begun = True, False
            self._waiting.pop(path)
            if (path / "run.json").exists():
                self._waiting[path] = entry
            self._changed.notify_all()

    def _refuse(self, entry: _Waiting, why: str) -> None:
        with self._changed:
            log.error("not uploaded: %s", why)
            self._refused[_key(entry.upload.folder)] = why
            self._waiting.pop(entry.upload.folder.path)
            self._uploads.pop(entry.upload.folder.path)
            self._changed.notify_all()

    def _entry(self, folder: RunFolder) -> _Waiting:
        if folder.path not in self._waiting:
            upload = self._uploads.setdefault(folder.path, RunUpload(folder, self._target))
            self._waiting[folder.path] = _Waiting(upload)
        return self._waiting[folder.path]


def _uploaded_to(folder: RunFolder) -> list[str]:
    """The targets that hold the whole of an ended run."""
    return [event.payload["to"] for event in folder.events("run_uploaded")]


def _commit_of(name: str) -> str | None:
    """The commit that speaks for a shard or frame table."""
    folder, _, rest = name.partition("/")
    if folder.endswith(".frames"):
        return f"{folder.removesuffix('.frames')}.chunks/{Path(rest).stem}.json"
    if folder.endswith(".zarr") and rest.startswith("data/c/"):
        return f"{folder.removesuffix('.zarr')}.chunks/{int(rest.split('/')[2]):05d}.json"
    return None


def _files_below(path: Path, skip: Path | None = None) -> Iterator[Path]:
    """A file, or all files of a folder, by name; not those that are just being written."""
    if path == skip or path.name.startswith("."):
        return
    if path.is_dir():
        for entry in sorted(path.iterdir()):
            yield from _files_below(entry, skip)
    elif path.exists():
        yield path


def _name(folder: RunFolder, path: Path) -> str:
    return path.relative_to(folder.path).as_posix()


def _key(folder: RunFolder) -> str:
    return run_key(folder.header.experiment, folder.header.run)
