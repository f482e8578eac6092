"""Outputs of steps, addressed by what went into them; and processings, which are lists of such outputs.

``steps/<digest>/`` holds the tables of one step on one chunk. The digest is over everything the
result depends on, so an output is never overwritten: it is there, or it is computed. A
processing is a manifest: for each chunk the digests of its steps.
"""

import fcntl
import json
import logging
import os
import shutil
import socket
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from storage.agents import publish_environment, this_agent
from storage.errors import BadRecipe, DamagedOutput, ProcessingBusy, RunNotFound
from storage.files import is_local, publish, readable, replace, sync_folder
from storage.frame_table import table_bytes
from storage.geometry_snapshot import GeometrySnapshot
from storage.models import Record
from storage.names import check_name
from storage.run_folder import parse_file
from storage.table_digest import table_digest

__all__ = ["ChunkManifest", "Claim", "Manifest", "Processing", "StepStore", "Tables", "find_processings"]

log = logging.getLogger("nearline.steps")

Tables = Mapping[str, pa.Table]

_PARQUET_ENDS = b"PAR1"
# The one column that a later step may say anew.
_REVISED = "hit"
# Whoever asks whether a processing is claimed (`is_claimed`) holds the lock for an instant.
_CLAIM_PATIENCE_S, _CLAIM_PAUSE_S = 0.2, 0.02
# Outputs that this process has made last: who makes one mostly reads it next.
_KEEP_RECENT = 8
_recent: OrderedDict[Path, dict[str, pa.Table]] = OrderedDict()
_recent_lock = threading.Lock()


class StoredTables(Tables):
    """The tables of one step output, each read when it is first asked for."""

    def __init__(self, folder: Path, names: list[str], known: dict[str, pa.Table]) -> None:
        self._folder, self._names, self._known = folder, names, dict(known)

    def __getitem__(self, name: str) -> pa.Table:
        """One table.

        Raises
        ------
        DamagedOutput : it cannot be read; the whole output is removed, so that it is computed again.
        """
        if name not in self._names:
            raise KeyError(name)
        if name not in self._known:
            self._known[name] = self._read(name)
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def _read(self, name: str) -> pa.Table:
        try:
            return pq.read_table(readable(self._folder / f"{name}.parquet"))
        except (OSError, ValueError, pa.ArrowException) as error:
            shutil.rmtree(self._folder, ignore_errors=True)
            raise DamagedOutput(
                f"the table {name} of step output {self._folder} was damaged ({error}) and has been removed; "
                "process the run again, and it is computed anew"
            ) from error


class StepStore:
    """The ``steps/`` folder of a run."""

    def __init__(self, run: Path) -> None:
        self._run, self._root = run, run / "steps"

    def record(self, digest: str) -> dict[str, Any] | None:
        """What a step output was computed from, what its tables say (digests), and who made it; None if not there."""
        path = self._root / digest / "step.json"
        content: dict[str, Any] | None = json.loads(path.read_bytes()) if path.exists() else None
        return content

    def find(self, digest: str) -> StoredTables | None:
        """The output of a step if all of it is there, its tables not read yet; None if it has to be computed."""
        folder = self._root / digest
        try:
            content = (folder / "step.json").read_bytes()
        except OSError:
            return None
        try:
            names = list(json.loads(content)["tables"])
            for name in names:
                _require_whole(folder / f"{name}.parquet")
        except (OSError, ValueError, KeyError) as error:
            # Damaged from outside: it can be computed again, so it is.
            log.warning("step output %s is damaged and will be computed again: %s", folder, error)
            shutil.rmtree(folder, ignore_errors=True)
            return None
        with _recent_lock:
            return StoredTables(folder, names, _recent.get(folder, {}))

    def load(self, digest: str) -> dict[str, pa.Table] | None:
        """The tables of a step output, read; None if it has not been computed."""
        found = self.find(digest)
        return None if found is None else dict(found)

    def read(self, digest: str, table: str) -> pa.Table | None:
        """One table of a step output; None if the step makes no such table."""
        path = self._root / digest / f"{table}.parquet"
        return pq.read_table(readable(path)) if path.exists() else None

    def save(self, digest: str, key: dict[str, Any], tables: Tables) -> None:
        """Publish a step's tables in one step, with what they were computed from."""
        aside = self._root / f".{digest}.{os.getpid()}.{os.urandom(4).hex()}"
        aside.mkdir(parents=True)
        try:
            for name, table in tables.items():
                publish(aside / f"{check_name(name, 'table')}.parquet", table_bytes(table))
            content = key | {
                "tables": sorted(tables),
                "content": {name: table_digest(table) for name, table in tables.items()},
                "made": {"at": datetime.now(UTC).isoformat(), **this_agent().model_dump()},
            }
            publish_environment(self._run)
            publish(aside / "step.json", json.dumps(content, indent=1, sort_keys=True, default=str).encode())
            aside.rename(self._root / digest)
            _remember(self._root / digest, tables)
        except OSError:
            # Someone else was faster; the same digest means the same content. Anything else is a failure.
            if self.load(digest) is None:
                raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        sync_folder(self._root)


def _require_whole(path: Path) -> None:
    """ValueError unless a Parquet file begins and ends as one."""
    with open(path, "rb") as file:
        begins = file.read(len(_PARQUET_ENDS))
        file.seek(-len(_PARQUET_ENDS), os.SEEK_END)
        if begins != _PARQUET_ENDS or file.read() != _PARQUET_ENDS:
            raise ValueError(f"{path.name} has been cut")


def _remember(folder: Path, tables: Tables) -> None:
    with _recent_lock:
        _recent[folder] = dict(tables)
        while len(_recent) > _KEEP_RECENT:
            _recent.popitem(last=False)


class ChunkManifest(Record):
    """What a processing made of one chunk."""

    chunk: int
    start: int
    stop: int
    chunk_digest: str
    steps: dict[str, str] = Field(description="step name → digest, in the recipe's order")
    n_frames: int
    n_hits: int
    n_indexed: int
    seconds: dict[str, float] = Field(default_factory=dict, description="step name → wall time, s; 0 when reused")
    geometry: int = Field(0, description="number of the geometry snapshot it was analysed with; 0 is the recipe's")


class Manifest(Record):
    """A processing as it was asked for, and where it came from."""

    processing: str
    data_source: str
    recipe: dict[str, Any]
    recipe_digest: str
    code_digest: str = Field("", description="of the source and library versions of all steps")
    started_at: datetime
    versions: dict[str, str]
    host: str = ""
    flow_run_id: str | None = None
    flow_run_url: str | None = None
    part: tuple[int, int] | None = Field(None, description="of a canary: frames [start, stop); None for the whole run")


class Claim(Record):
    """Who works on a processing, or did last."""

    pid: int
    host: str
    flow_run_id: str | None = None
    since: datetime

    def __str__(self) -> str:
        of = f", flow run {self.flow_run_id}" if self.flow_run_id else ""
        return f"pid {self.pid} on {self.host}{of}, since {self.since:%Y-%m-%d %H:%M:%S} UTC"


class Processing:
    """One processing of a run: ``processed/<id>/``."""

    def __init__(self, run: Path, processing: str) -> None:
        self.run, self.name = run, check_name(processing, "processing")
        self.folder = run / "processed" / processing
        self._steps = StepStore(run)

    @classmethod
    def create(cls, run: Path, manifest: Manifest) -> "Processing":
        """Begin a processing; FileExistsError if that id is taken."""
        processing = cls(run, manifest.processing)
        if not publish(processing.folder / "manifest.json", manifest.model_dump_json(indent=1).encode()):
            raise FileExistsError(f"processing {manifest.processing} exists already in {run}")
        return processing

    @property
    def manifest(self) -> Manifest:
        try:
            return parse_file(Manifest, self.folder / "manifest.json")
        except FileNotFoundError:
            raise RunNotFound(f"no processing {self.name} in {self.run}; `nearline process` makes one") from None

    @property
    def is_finished(self) -> bool:
        return (self.folder / "summary.json").exists()

    @property
    def summary(self) -> dict[str, Any] | None:
        """What came out, once finished."""
        path = self.folder / "summary.json"
        content: dict[str, Any] | None = json.loads(path.read_bytes()) if path.exists() else None
        return content

    def finish(self, summary: dict[str, Any]) -> None:
        """Record the end, with what came out; a resumed processing replaces its summary."""
        content = summary | {"finished_at": datetime.now(UTC).isoformat()}
        replace(self.folder / "summary.json", json.dumps(content, indent=1, default=str).encode())

    def claim(self, flow_run_id: str | None = None) -> int:
        """Become the one process that works on this; the claim ends with the process (or `os.close`).

        The lock is the kernel's. Hosts that share a file system whose ``flock`` reaches no further than one host see
        none of it: there `claimed_by` is what tells who works on this.

        Parameters
        ----------
        flow_run_id : the Prefect run that claims, for whoever asks.

        Raises
        ------
        ProcessingBusy : somebody else has it.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        fd = os.open(self._claim_path, os.O_CREAT | os.O_RDWR, 0o644)
        try:
            if not _lock_soon(fd):
                who = self.claimed_by or "another process"
                raise ProcessingBusy(
                    f"processing {self.name} of {self.run} is being worked on by {who}; "
                    "wait for it, or process with another recipe"
                )
            claim = Claim(pid=os.getpid(), host=socket.gethostname(), flow_run_id=flow_run_id, since=datetime.now(UTC))
            content = claim.model_dump_json().encode() + b"\n"
            # In one write, and cut afterwards: who reads it meanwhile finds a whole first line.
            os.pwrite(fd, content, 0)
            os.ftruncate(fd, len(content))
        except BaseException:
            os.close(fd)
            raise
        return fd

    @property
    def is_claimed(self) -> bool:
        """Whether a live process holds the claim, as far as this host's locks reach; an object store has none."""
        if not is_local(self.folder):
            return False
        try:
            fd = os.open(self._claim_path, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        finally:
            os.close(fd)
        return False

    @property
    def claimed_by(self) -> "Claim | None":
        """Who claimed this last, also when the claim has ended (`is_claimed`); None if nobody has said so."""
        try:
            first, _, _ = self._claim_path.read_bytes().partition(b"\n")
            return Claim.model_validate_json(first)
        except (FileNotFoundError, ValidationError):  # never claimed, or by a version that wrote no such line
            return None

    def add_chunk(self, chunk: ChunkManifest) -> None:
        """Record a chunk as done."""
        publish(self._chunk_path(chunk.chunk), chunk.model_dump_json(indent=1).encode())

    def chunk(self, number: int) -> ChunkManifest | None:
        """What was made of a chunk, or None if it has not been processed."""
        path = self._chunk_path(number)
        return parse_file(ChunkManifest, path) if path.exists() else None

    def chunks(self) -> Iterator[ChunkManifest]:
        """All processed chunks, in order."""
        for path in sorted((self.folder / "chunks").glob("[0-9]*.json")):
            yield parse_file(ChunkManifest, path)

    def add_geometry(self, snapshot: GeometrySnapshot) -> None:
        """Record a refined geometry, before the first chunk that is analysed with it."""
        publish(self._geometry_path(snapshot.number), snapshot.model_dump_json(indent=1).encode())

    def geometries(self) -> list[GeometrySnapshot]:
        """The refined geometries, in order; none where the recipe's held to the end, or nobody looked."""
        paths = sorted((self.folder / "geometry").glob("[0-9]*.json"))
        return [parse_file(GeometrySnapshot, path) for path in paths]

    @property
    def newest_geometry(self) -> int:
        """Number of the geometry snapshot that its last chunk was analysed with; 0 is the recipe's."""
        paths = sorted((self.folder / "chunks").glob("[0-9]*.json"))
        return parse_file(ChunkManifest, paths[-1]).geometry if paths else 0

    def geometry_file(self, number: int, suffix: str = ".geom") -> Path:
        """Where a snapshot is kept for other programs."""
        return self._geometry_path(number).with_suffix(suffix)

    def table(self, name: str, *, geometry: int | None = None) -> pa.Table:
        """One result table (``frames``, ``peaks``, ``crystals``, ``reflections`` …) over all chunks.

        ``frames`` joins the per-frame columns of all steps on ``frame_index``.

        Parameters
        ----------
        geometry : only of chunks that were analysed with this geometry snapshot.

        Raises
        ------
        KeyError : there is none.
        """
        parts = []
        for chunk in self.chunks():
            if geometry is not None and chunk.geometry != geometry:
                continue
            if name == "frames":
                parts.append(join_frames([self._steps.read(d, "frames") for d in chunk.steps.values()]))
            else:
                found = [self._steps.read(digest, name) for digest in chunk.steps.values()]
                parts += [table for table in found if table is not None]
        if not parts:
            raise KeyError(f"processing {self.name} has no table {name!r}")
        return pa.concat_tables(parts, promote_options="permissive")

    @property
    def frames(self) -> pa.Table:
        return self.table("frames")

    @property
    def peaks(self) -> pa.Table:
        return self.table("peaks")

    @property
    def crystals(self) -> pa.Table:
        return self.table("crystals")

    @property
    def reflections(self) -> pa.Table:
        return self.table("reflections")

    def __repr__(self) -> str:
        return f"<Processing {self.name} of {self.run}, {'finished' if self.is_finished else 'unfinished'}>"

    @property
    def _claim_path(self) -> Path:
        return self.folder / "claim"

    def _geometry_path(self, number: int) -> Path:
        return self.folder / "geometry" / f"{number:03d}.json"

    def _chunk_path(self, number: int) -> Path:
        return self.folder / "chunks" / f"{number:05d}.json"


def _lock_soon(fd: int) -> bool:
    """Take the lock on a claim, with a little patience."""
    deadline = time.monotonic() + _CLAIM_PATIENCE_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            if time.monotonic() > deadline:
                return False
        time.sleep(_CLAIM_PAUSE_S)


def join_frames(tables: list[pa.Table | None]) -> pa.Table:
    """Per-frame tables of one chunk, in the order of their steps, side by side; they have the same frames in one order.

    Of ``hit`` the last word holds: indexing knows more of a frame than its number of peaks.
    """
    joined: pa.Table | None = None
    for table in tables:
        if table is None:
            continue
        if joined is None:
            joined = table
            continue
        for name in table.column_names:
            if name == "frame_index":
                continue
            if name == _REVISED and name in joined.column_names:
                joined = joined.set_column(joined.column_names.index(name), name, table.column(name))
                continue
            if name in joined.column_names:
                raise BadRecipe(f"two steps make the column {name!r}; let one of them name it otherwise")
            joined = joined.append_column(name, table.column(name))
    return joined if joined is not None else pa.table({"frame_index": pa.array([], pa.int64())})


def find_processings(run: Path) -> dict[str, Processing]:
    """All processings of a run by id, oldest first."""
    names = [p.parent.name for p in (run / "processed").glob("*/manifest.json")]
    return {name: Processing(run, name) for name in sorted(names, key=lambda n: (len(n), n))}
