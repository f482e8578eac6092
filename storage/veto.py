"""Vetoing: the frames of an ended run that nobody wants go, and what they were stays known.

A veto is planned (nothing changes), marked (recorded with the time at which it is due; it can be undone) and
carried out. `docs/decisions/0030-vetoes.md` says why each step is safe. In the run's folder::

    vetoes/v1/plan.json              which frames, by whom, why, when; the control sample
    vetoes/v1/background.npy         sum of the vetoed frames, and background-count.npy, how many of them had the pixel
    vetoes/v1/commits/00000.json     the commit of each changed chunk as it was before
"""

import fcntl
import io
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

import blake3
import numpy as np
from pydantic import Field

from storage.amendments import Amendments
from storage.annotations import FolderAnnotations, make_batch
from storage.codec import decode
from storage.errors import CorruptFrame, ProcessingBusy, RunBusy, VetoRefused
from storage.files import file_sizes, is_local, make_folder, publish, remove, replace, sync_folder
from storage.frame import FrameInfo, chunk_digest, file_digest, has_digest
from storage.frame_table import read_frame_table
from storage.journal import Journal, shard_bytes
from storage.models import Record, RunState, StreamHeader
from storage.names import run_key
from storage.retention import all_claimed
from storage.run_folder import ChunkCommit, ChunkVeto, RunFolder, StreamPaths, latest_epoch, parse_file
from storage.shard import ShardReader
from storage.states import FrameState
from storage.stream_source import FolderSource, state_of

__all__ = [
    "Background", "ChunkPlan", "VetoPlan", "VetoRecord", "carry_out_veto", "find_veto", "hold_frames", "mark_veto",
    "plan_veto", "read_background", "undo_veto", "veto_of", "veto_stages",
]  # fmt: skip

Stage = Literal["marked", "begun", "done", "undone"]
Progress = Callable[[int, int], None]
_STAGES: dict[str, Stage] = {
    "veto_marked": "marked", "veto_begun": "begun", "frames_vetoed": "done", "veto_undone": "undone",
}  # fmt: skip
_CONTROL = "veto_control"


class ChunkPlan(Record):
    """What goes of one chunk: ``starts[i] <= frame_index < stops[i]``."""

    chunk: int
    starts: list[int]
    stops: list[int]
    digest: str = Field(description="of the chunk when this was planned")
    bytes_before: int = Field(description="of its shard")
    bytes_after: int

    def indices(self) -> list[int]:
        pairs = zip(self.starts, self.stops, strict=True)
        return [index for start, stop in pairs for index in range(start, stop)]


class VetoPlan(Record):
    """Which frames a veto takes, and why; sizes in bytes."""

    veto: str
    data_source: str
    processing: str
    condition: str = Field(description="of the frames that stay")
    by: str
    why: str = ""
    planned_at: datetime
    due_at: datetime
    keep_fraction: float = Field(description="of the unwanted frames, kept as a random control sample")
    seed: str = Field(description="blake3 of the chunks' digests, of which the sample was drawn")
    control: list[int] = Field(description="the sample: frame indices, rising")
    n_frames: int = Field(description="readable before")
    n_vetoed: int
    bytes_before: int = Field(description="all files of the run")
    bytes_after: int = Field(description="predicted: without what is freed, with the background")
    copies: list[str] = Field(default_factory=list, description="where whole copies were uploaded to; those stay")
    chunks: list[ChunkPlan]

    @property
    def cause(self) -> str:
        """Goes on from "was vetoed"."""
        why = f" ({self.why})" if self.why else ""
        copies = f"; whole copies are in {', '.join(self.copies)}" if self.copies else ""
        return (
            f"on {self.planned_at:%Y-%m-%d} by {self.by}, because it is not {self.condition} in "
            f"{self.processing}{why}; the sum of all such frames is in vetoes/{self.veto}/background.npy{copies}"
        )


class VetoRecord(Record):
    """What became of one frame: the answer for what is gone, or is about to go."""

    frame_index: int
    plan: VetoPlan
    stage: Stage
    at: datetime = Field(description="when it came to this stage")
    digest: str = Field(description="of the frame's bytes, hex")
    size_bytes: int


class Background(Record):
    """The sum of the vetoed frames."""

    n_frames: int
    dtype: str
    sum_digest: str = Field(description="blake3 of background.npy")
    count_digest: str = Field(description="blake3 of background-count.npy")


# ---- planning -----------------------------------------------------------------------------------


def plan_veto(
    folder: RunFolder,
    data_source: str,
    unwanted: Iterable[int],
    *,
    processing: str,
    condition: str,
    by: str,
    why: str = "",
    keep_fraction: float = 0.01,
    grace: timedelta = timedelta(days=7),
    now: datetime | None = None,
) -> VetoPlan:
    """What a veto of these frames would do; changes nothing.

    Frames of which anything came late stay, as do a random sample of the unwanted and frames that are not readable.

    Raises
    ------
    VetoRefused : the run is not in a folder here, or its frames are elsewhere, or there is nothing to veto.
    RunBusy : the run, or the stream, has not ended.
    """
    if not 0 <= keep_fraction < 1:
        raise VetoRefused(f"a fraction of {keep_fraction} cannot be kept as a control sample; give 0 to below 1")
    _check_possible(folder, data_source)
    now = now or datetime.now(UTC)
    header, paths = folder.stream_header(data_source), folder.stream(data_source)
    source = FolderSource(folder, data_source)
    commits = source.commits
    late = {info.frame_index for info in Amendments(paths.amendments, header.parts).look()}
    may_go = (FrameState.stored, FrameState.incomplete)
    candidates = [i for i in sorted(set(unwanted)) if source.states[i] in may_go and i not in late]
    seed = blake3.blake3("".join(commits[k].digest for k in sorted(commits)).encode()).hexdigest()
    control = _sample(candidates, keep_fraction, seed)
    vetoed = np.setdiff1d(np.array(candidates, np.int64), np.array(control, np.int64))
    if not vetoed.size:
        raise VetoRefused(f"no frame of {_key(folder)}/{data_source} is to go: none is without {condition}")
    numbers = vetoed // header.frames_per_chunk
    chunks = [_plan_chunk(paths, header, commits[int(k)], vetoed[numbers == k]) for k in np.unique(numbers)]
    before = sum(file_sizes(folder.path).values())
    freed = sum(chunk.bytes_before - chunk.bytes_after for chunk in chunks)
    return VetoPlan(
        veto=f"v{1 + max((int(p.name[1:]) for p in (folder.path / 'vetoes').glob('v[0-9]*')), default=0)}",
        data_source=data_source,
        processing=processing,
        condition=condition,
        by=by,
        why=why,
        planned_at=now,
        due_at=now + grace,
        keep_fraction=keep_fraction,
        seed=seed,
        control=control,
        n_frames=len(source.states.readable()),
        n_vetoed=len(vetoed),
        bytes_before=before,
        bytes_after=before - freed + sum(len(_npy(array)) for array in _empty_sums(header)),
        copies=[event.payload["to"] for event in folder.events("run_uploaded")],
        chunks=chunks,
    )


def _check_possible(folder: RunFolder, data_source: str) -> None:
    if not is_local(folder.path):
        raise VetoRefused(f"{folder.path} is a copy in an object store; frames are vetoed in the run's own folder only")
    header = folder.stream_header(data_source)
    state = state_of(folder)
    if state is RunState.deleted:
        raise VetoRefused(f"run {_key(folder)} is deleted; there is nothing left to veto")
    if not state.is_terminal or folder.finished(data_source) is None:
        raise RunBusy(f"{data_source} of run {_key(folder)} has not ended; let it end, or start a service to end it")
    if header.kind == "table" or header.is_online:
        raise VetoRefused(f"{data_source} of run {_key(folder)} has no frames on disk; name the detector's data source")


def _plan_chunk(paths: StreamPaths, header: StreamHeader, commit: ChunkCommit, indices: np.ndarray) -> ChunkPlan:
    shard = paths.shard(commit.chunk, len(header.array_shape))
    if not shard.exists():
        raise VetoRefused(f"{shard} is not here; its frames are where the run was uploaded to, and take no room here")
    edges = np.flatnonzero(np.diff(indices) != 1)
    gone = commit.vetoed | set(indices.tolist())
    kept = _survivors(paths, header, commit.chunk, gone)
    return ChunkPlan(
        chunk=commit.chunk,
        starts=indices[np.r_[0, edges + 1]].tolist(),
        stops=(indices[np.r_[edges, len(indices) - 1]] + 1).tolist(),
        digest=commit.digest,
        bytes_before=shard.stat().st_size,
        bytes_after=shard_bytes(kept.values(), header.frames_per_chunk * header.parts) if kept else 0,
    )


def _survivors(paths: StreamPaths, header: StreamHeader, chunk: int, gone: set[int]) -> dict[int, FrameInfo]:
    """The rows of a chunk by slot, without those of frames that are gone."""
    rows = read_frame_table(paths.frame_table(chunk))
    return {row.frame_index * header.parts + row.part: row for row in rows if row.frame_index not in gone}


def _sample(candidates: list[int], fraction: float, seed: str) -> list[int]:
    """So many of them, at least one if any; the same for the same run."""
    n_kept = min(len(candidates), max(round(fraction * len(candidates)), 1)) if fraction else 0
    rng = np.random.default_rng(int(seed[:32], 16))
    return sorted(rng.choice(candidates, n_kept, replace=False).tolist()) if n_kept else []


# ---- marking and undoing ------------------------------------------------------------------------


def mark_veto(folder: RunFolder, plan: VetoPlan) -> VetoPlan:
    """Record a veto; its frames stay readable until it is carried out.

    Raises
    ------
    VetoRefused : there is one that has not been carried out or undone.
    """
    with _alone(folder):
        found = find_veto(folder)
        if found is not None:
            raise VetoRefused(
                f"veto {found[0].veto} of run {_key(folder)} is {found[1]}; carry it out, or undo it first"
            )
        publish(_folder_of(folder, plan.veto) / "plan.json", plan.model_dump_json(indent=1).encode())
        _note(folder, "veto_marked", plan)
    return plan


def undo_veto(folder: RunFolder, by: str) -> VetoPlan:
    """Take a marked veto back; VetoRefused if there is none, or frames have begun to go."""
    with _alone(folder):
        found = find_veto(folder)
        if found is None:
            raise VetoRefused(f"run {_key(folder)} has no veto that could be undone; one carried out cannot")
        plan, stage = found
        if stage != "marked":
            raise VetoRefused(f"veto {plan.veto} of run {_key(folder)} has begun; run it again to complete it")
        folder.add_event("veto_undone", {"veto": plan.veto, "by": by})
    return plan


def find_veto(folder: RunFolder) -> tuple[VetoPlan, Stage] | None:
    """The veto that is marked, or was begun and not completed; None if there is none."""
    for veto, (stage, _) in _stages(folder).items():
        if stage in ("marked", "begun"):
            return parse_file(VetoPlan, _folder_of(folder, veto) / "plan.json"), stage
    return None


def veto_stages(folder: RunFolder) -> tuple[Stage, ...]:
    """How far each veto of a run is, oldest first."""
    return tuple(stage for stage, _ in _stages(folder).values())


def veto_of(folder: RunFolder, data_source: str, frame_index: int) -> VetoRecord | None:
    """Which veto took a frame, or is to take it; None if none does."""
    for veto, (stage, at) in _stages(folder).items():
        if stage == "undone":
            continue
        plan = parse_file(VetoPlan, _folder_of(folder, veto) / "plan.json")
        header, paths = folder.stream_header(plan.data_source), folder.stream(plan.data_source)
        number = frame_index // header.frames_per_chunk
        mine = [chunk for chunk in plan.chunks if chunk.chunk == number]
        if plan.data_source == data_source and mine and frame_index in mine[0].indices():
            rows = [row for row in read_frame_table(paths.frame_table(number)) if row.frame_index == frame_index]
            return VetoRecord(
                frame_index=frame_index,
                plan=plan,
                stage=stage,
                at=at,
                digest=rows[0].digest.hex(),
                size_bytes=sum(row.size_bytes for row in rows),
            )
    return None


def _stages(folder: RunFolder) -> dict[str, tuple[Stage, datetime]]:
    """How far each veto of the run is, and since when."""
    found: dict[str, tuple[Stage, datetime]] = {}
    for event in folder.events():
        if event.kind in _STAGES:
            found[event.payload["veto"]] = _STAGES[event.kind], event.at
    return found


def _note(folder: RunFolder, kind: str, plan: VetoPlan) -> None:
    facts = plan.model_dump(mode="json", exclude={"chunks", "control"})
    folder.add_event(kind, facts | {"n_control": len(plan.control)})


# ---- carrying out -------------------------------------------------------------------------------


def carry_out_veto(
    folder: RunFolder,
    *,
    now: datetime | None = None,
    despite_processing: bool = False,
    progress: Progress = lambda done, total: None,
) -> VetoPlan:
    """Remove the frames of the veto that is due. Interrupted at any point, calling it again completes it.

    Raises
    ------
    VetoRefused : there is none, or it is not due.
    StreamOwned, ProcessingBusy : the run is being written, or processed.
    CorruptFrame : a frame that would stay is damaged; nothing of its chunk has changed.
    """
    owner = f"veto by pid {os.getpid()} on {socket.gethostname()}"
    with _alone(folder), all_claimed(folder, owner, processings=not despite_processing), _no_reader(folder):
        found = find_veto(folder)
        if found is None:
            raise VetoRefused(f"run {_key(folder)} has no veto to carry out; mark one first")
        plan, stage = found
        if stage == "marked":
            if (now or datetime.now(UTC)) < plan.due_at:
                raise VetoRefused(f"veto {plan.veto} of run {_key(folder)} is due at {plan.due_at:%Y-%m-%d %H:%M} UTC")
            _check_possible(folder, plan.data_source)
            _check_unchanged(folder, plan)
            _note(folder, "veto_begun", plan)
        _Removal(folder, plan, progress).carry_out()
        return plan


def _check_unchanged(folder: RunFolder, plan: VetoPlan) -> None:
    paths = folder.stream(plan.data_source)
    commits = paths.read_commits([chunk.chunk for chunk in plan.chunks])
    for chunk, commit in zip(plan.chunks, commits, strict=True):
        if commit.digest != chunk.digest:
            raise VetoRefused(
                f"chunk {chunk.chunk} is not what it was when {plan.veto} was planned; undo it, plan anew"
            )


class _Removal:
    """A veto being carried out; whatever was done before is found done."""

    def __init__(self, folder: RunFolder, plan: VetoPlan, progress: Progress) -> None:
        self._folder, self._plan, self._progress = folder, plan, progress
        self._header, self._paths = folder.stream_header(plan.data_source), folder.stream(plan.data_source)
        self._place = _folder_of(folder, plan.veto)
        self._n_slots = self._header.frames_per_chunk * self._header.parts
        self._n_done = 0

    def carry_out(self) -> None:
        # First: from here on there are frames of which nothing else is left.
        if not (self._place / "background.json").exists():
            self._sum_up()
        for chunk in self._plan.chunks:
            self._reduce(chunk)
        if self._plan.control:
            said = make_batch(
                {_CONTROL: self._plan.veto}, frames=self._plan.control, data_source=self._plan.data_source, by="veto"
            )
            FolderAnnotations(self._folder.path).append(said.encode())
        _note(self._folder, "frames_vetoed", self._plan)

    def _sum_up(self) -> None:
        total, n_valid = _empty_sums(self._header)
        source = FolderSource(self._folder, self._plan.data_source)
        for index in (index for chunk in self._plan.chunks for index in chunk.indices()):
            for raw in source.read_parts(index):
                where = (raw.info.part, ...) if self._header.parts > 1 else ...
                _add(total[where], n_valid[where], self._decoded(raw.blob))
            self._n_done += 1
            self._progress(self._n_done, self._plan.n_vetoed)
        contents = [_npy(total), _npy(n_valid)]
        for name, content in zip(("background", "background-count"), contents, strict=True):
            replace(self._place / f"{name}.npy", content)
        digests = [file_digest(content) for content in contents]
        background = Background(
            n_frames=self._plan.n_vetoed, dtype=str(total.dtype), sum_digest=digests[0], count_digest=digests[1]
        )
        publish(self._place / "background.json", background.model_dump_json(indent=1).encode())

    def _decoded(self, blob: bytes) -> np.ndarray:
        return decode(blob, self._header.shape, self._header.dtype, self._header.codec)

    def _reduce(self, chunk: ChunkPlan) -> None:
        """Shard aside, checked; then the commit, then the shard: who misses a frame finds in the commit why."""
        commit = self._paths.read_commit(chunk.chunk)
        is_noted = any(veto.veto == self._plan.veto for veto in commit.vetoes)
        kept = _survivors(self._paths, self._header, chunk.chunk, commit.vetoed | set(chunk.indices()))
        shard = self._paths.shard(chunk.chunk, len(self._header.array_shape))
        aside = self._place / f".{chunk.chunk:05d}.shard"
        is_swapped = is_noted and self._slots(shard, chunk.chunk) == kept.keys()
        if kept and not is_swapped:
            self._write_shard(aside, shard, chunk.chunk, kept)
        if not is_noted:
            publish(self._place / "commits" / f"{chunk.chunk:05d}.json", self._paths.commit(chunk.chunk).read_bytes())
            amended = self._amended(commit, chunk, kept)
            replace(self._paths.commit(chunk.chunk), amended.model_dump_json(indent=1).encode())
        if not is_swapped:
            if kept:
                os.replace(aside, shard)
            else:
                shard.unlink(missing_ok=True)
            sync_folder(shard.parent)

    def _slots(self, shard: Path, chunk: int) -> set[int]:
        if not shard.exists():
            return set()
        first = chunk * self._n_slots
        reader = ShardReader(shard, first, self._n_slots)
        return {slot for slot in range(first, first + self._n_slots) if slot in reader}

    def _write_shard(self, aside: Path, shard: Path, chunk: int, kept: dict[int, FrameInfo]) -> None:
        """The frames that stay, byte for byte, in a shard of their own; read back before it counts."""
        header = self._header
        remove(aside)
        try:
            reader = ShardReader(shard, chunk * self._n_slots, self._n_slots)
            journal = Journal.create(aside, chunk * header.frames_per_chunk, header.frames_per_chunk, header.parts)
            for slot in sorted(kept):
                journal.append(kept[slot], reader.read(slot))
            journal.write_index()
            journal.close()
            written = ShardReader(aside, chunk * self._n_slots, self._n_slots)
            for slot, info in kept.items():
                if not has_digest(written.read(slot), info.digest):
                    raise CorruptFrame(
                        f"frame {info.frame_index} of {self._plan.data_source} in {shard} is not what was received; "
                        "restore the shard from a copy before frames beside it are vetoed"
                    )
        except BaseException:
            aside.unlink(missing_ok=True)
            raise

    def _amended(self, commit: ChunkCommit, chunk: ChunkPlan, kept: dict[int, FrameInfo]) -> ChunkCommit:
        note = ChunkVeto(
            veto=self._plan.veto, cause=self._plan.cause, starts=chunk.starts, stops=chunk.stops, digest=commit.digest
        )
        return commit.model_copy(
            update={
                "n_frames": len({info.frame_index for info in kept.values()}),
                "size_bytes": sum(info.size_bytes for info in kept.values()),
                "digest": chunk_digest(kept),
                "epoch": latest_epoch(self._paths),
                "vetoes": [*commit.vetoes, note],
            }
        )


# ---- the background -----------------------------------------------------------------------------


def read_background(folder: RunFolder, veto: str) -> tuple[np.ndarray, np.ndarray, Background]:
    """Sum of the vetoed frames, how many of them had each pixel, and the record; shapes as a frame's.

    Raises
    ------
    CorruptFrame : a file is not what was written.
    """
    place = _folder_of(folder, veto)
    facts = parse_file(Background, place / "background.json")
    arrays = []
    for name, digest in (("background", facts.sum_digest), ("background-count", facts.count_digest)):
        content = (place / f"{name}.npy").read_bytes()
        if file_digest(content) != digest:
            raise CorruptFrame(f"{place / name}.npy is not what was written; restore it from a copy")
        arrays.append(np.load(io.BytesIO(content), allow_pickle=False))
    return arrays[0], arrays[1], facts


def _empty_sums(header: StreamHeader) -> tuple[np.ndarray, np.ndarray]:
    kind = {"u": np.uint64, "i": np.int64}.get(np.dtype(header.dtype).kind, np.float64)
    return np.zeros(header.array_shape, kind), np.zeros(header.array_shape, np.uint32)


def _add(total: np.ndarray, n_valid: np.ndarray, frame: np.ndarray) -> None:
    """Masked pixels hold the dtype's maximum, of a float NaN, and are left out."""
    is_valid = frame != np.iinfo(frame.dtype).max if frame.dtype.kind in "ui" else np.isfinite(frame)
    np.add(total, frame, out=total, where=is_valid, casting="unsafe")
    np.add(n_valid, 1, out=n_valid, where=is_valid)


def _npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


# ---- locks --------------------------------------------------------------------------------------


def hold_frames(run: Path) -> int:
    """For whoever processes a run: its frames stay as they are until this descriptor is closed.

    Raises
    ------
    RunBusy : frames are being vetoed.
    """
    fd = os.open(run / ".frames.lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise RunBusy(f"frames of {run} are being vetoed; process it when that is over") from None
    return fd


@contextmanager
def _no_reader(folder: RunFolder) -> Iterator[None]:
    with _locked(folder.path / ".frames.lock", f"run {_key(folder)} is being processed; wait for that"):
        yield


@contextmanager
def _alone(folder: RunFolder) -> Iterator[None]:
    """Of two that mark, undo or carry out a veto, one works."""
    make_folder(folder.path / "vetoes")
    with _locked(folder.path / "vetoes" / ".lock", f"another process vetoes frames of run {_key(folder)}; wait for it"):
        yield


@contextmanager
def _locked(path: Path, otherwise: str) -> Iterator[None]:
    fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ProcessingBusy(otherwise) from None
        yield
    finally:
        os.close(fd)


def _folder_of(folder: RunFolder, veto: str) -> Path:
    return folder.path / "vetoes" / veto


def _key(folder: RunFolder) -> str:
    return run_key(folder.header.experiment, folder.header.run)
