"""A stream that this service writes: its store, and what is under way to it.

Three threads look after it, each with its own part: connectors and the server hand frames in, the
writer journals them, the publisher seals chunks and ends the stream.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from storage.errors import BadFrame, NearlineError
from storage.frame import FrameInfo, RawFrame
from storage.models import StreamHeader
from storage.run_folder import RunFolder
from storage.states import StreamLedger
from storage.stream_store import StreamStore
from streaming.online_store import OnlineStore

__all__ = ["AckLevel", "Ended", "LiveStream", "Put", "SeriesPart", "Settled", "StreamKey"]

StreamKey = tuple[str, int, str]
AckLevel = Literal["buffered", "stored", "durable"]
Settled = Callable[[list[int], list[str]], None]
Ended = Callable[[NearlineError | None], None]

# How many frames a source may leave out at once: each is accounted for, so a nonsensical index
# would cost memory and, for every chunk in between, a file (2 ms). A source that said how many
# frames come may have been unheard for longer than one that did not.
_LONGEST_JUMP = 100_000
_LONGEST_PLANNED_JUMP = 1_000_000
_LONGEST_JUMP_CHUNKS = 5_000


@dataclass(slots=True)
class SeriesPart:
    """A detector series in a stream: its frames begin at ``offset``."""

    series_unique_id: str | None
    series_id: int
    offset: int
    is_ended: bool = False

    def is_called(self, series_unique_id: str | None, series_id: int) -> bool:
        """By the unique id where the detector sends one."""
        return self.series_unique_id == series_unique_id if series_unique_id else self.series_id == series_id


@dataclass(slots=True, eq=False)
class LiveStream:
    """A stream that this service writes, or has finished writing a short while ago."""

    store: StreamStore | OnlineStore
    folder: RunFolder
    last_activity: float = field(default_factory=time.monotonic)
    # Some index below ``gap_stop`` has been awaited since then.
    gap_since: float | None = None
    gap_stop: int = 0
    # Frames below this one that never came were lost while no service ran; None: not known yet.
    lost_until: int | None = 0
    # Chunks below this one have been handed to the publisher, or wait for a gap.
    n_whole_chunks: int = 0
    # For the publisher: chunks to seal, and whether the stream ends behind them.
    to_seal: deque[int] = field(default_factory=deque)
    is_finishing: bool = False
    # Told when the stream has ended, or why it never will.
    on_end: list[Ended] = field(default_factory=list)
    # Frames up to here have been taken, though some may still be queued.
    submitted: int = 0
    # Indices given to sendings that are still queued: their repetition must get the same.
    given: dict[tuple[str, int], int] = field(default_factory=dict)
    # Those who send into it and have not finished.
    producers: set[str] = field(default_factory=set)
    # Detector series that are still being taken; several in turn when a run was opened by hand.
    series: list[SeriesPart] = field(default_factory=list)
    # Stored, and acknowledged when the next sync has made them durable.
    awaiting_sync: list[Callable[[], None]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    is_draining: bool = False
    # The stream has ended and so, with its last stream, has the run: readers see both at once.
    is_ended: bool = False

    @property
    def header(self) -> StreamHeader:
        return self.store.header

    @property
    def key(self) -> StreamKey:
        return (self.header.experiment, self.header.run, self.header.data_source)

    @property
    def is_derived(self) -> bool:
        return self.header.parent is not None

    @property
    def is_open(self) -> bool:
        """Whether frames are still taken."""
        return not (self.is_finishing or self.store.is_finished)

    @property
    def index_limit(self) -> int:
        """Frame indices below this are believed."""
        header, announced = self.header, max(self.store.states.announced, self.submitted)
        jump = _LONGEST_PLANNED_JUMP if header.planned else _LONGEST_JUMP
        limit = announced + min(jump, _LONGEST_JUMP_CHUNKS * header.frames_per_chunk)
        return max(min(limit, header.planned), announced) if header.planned else limit

    def find_series(self, series_unique_id: str | None, series_id: int) -> SeriesPart | None:
        """A series of this stream; the newest where a detector has begun to count anew."""
        return next((s for s in reversed(self.series) if s.is_called(series_unique_id, series_id)), None)

    def require_index(self, index: int) -> None:
        """BadFrame for an index that no source of this stream can mean."""
        if not 0 <= index < self.index_limit:
            raise BadFrame(
                f"frame_index {index} of {self.header.data_source} is outside 0 to {self.index_limit - 1}; "
                "check the source's numbering and its planned number of frames"
            )

    def number(self, infos: list[FrameInfo]) -> None:
        """Give automatic indices to rows that have none; a repeated sending gets the one it had."""
        with self.lock:
            following = max(self.store.states.announced, self.submitted)
            for info in infos:
                if info.frame_index < 0:
                    known = self._known(info)
                    info.frame_index = following if known is None else known
                if info.sequence is not None:
                    self.given[info.producer, info.sequence] = info.frame_index
                following = max(following, info.frame_index + 1)
            self.submitted = max(self.submitted, following)

    def settle(self, infos: list[FrameInfo]) -> None:
        """The store knows these now."""
        if self.given:
            with self.lock:
                for info in infos:
                    if info.sequence is not None:
                        self.given.pop((info.producer, info.sequence), None)

    def ledger(self) -> StreamLedger:
        return self.store.ledger()

    def _known(self, info: FrameInfo) -> int | None:
        if info.sequence is None:
            return None
        queued = self.given.get((info.producer, info.sequence))
        return self.store.answered(info.producer, info.sequence) if queued is None else queued


@dataclass(slots=True)
class Put:
    """Frames of one stream on their way to the writer; room for them has been reserved.

    ``settled`` is told index and outcome of each when they have reached ``ack``.
    """

    stream: LiveStream
    frames: list[RawFrame]
    ack: AckLevel = "stored"
    settled: Settled | None = None

    @property
    def nbytes(self) -> int:
        return sum(frame.nbytes for frame in self.frames)

    def tell(self, outcomes: list[str]) -> None:
        if self.settled:
            self.settled([frame.info.frame_index for frame in self.frames], outcomes)
