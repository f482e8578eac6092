"""Conditions over rows, results and annotations: the same answers live, finished, and from a bare folder."""

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from storage.errors import BadAnnotation, BadQuery, StreamNotFound
from storage.models import StreamHeader
from storage.states import FrameState
from storage.step_store import ChunkManifest, Manifest, Processing, StepStore
from storage.stream_store import StreamStore
from streaming.derived import Row, open_derived
from streaming.producer import Producer
from streaming.retrieval import Run, Stream, open_run

from ..storage.stores import new_folder, put, put_late
from .harness import SHAPE, pixels, serving, wait_for

N, GAP, SIZE = 22, 7, 4
THERE = [i for i in range(N) if i != GAP]
HEADER = StreamHeader(
    experiment="lyso", run=1, data_source="eiger", shape=SHAPE, dtype="uint16", frames_per_chunk=SIZE
)  # fmt: skip


def meta_of(index: int) -> dict[str, Any]:
    """Columns of every kind: some come late, one changes its type, one is nested."""
    meta: dict[str, Any] = {
        "delay": index / 10,
        "odd name": index % 3,
        "motor": {"x": index * 2},
        "Well": "AB"[index % 2],
    }
    if index >= 10:
        meta["late_key"] = index
    if index < 8:
        meta["mixed"] = "three" if index % 4 == 3 else index
    meta["label"] = index if index < 12 else f"frame {index}"
    return meta


def result_of(index: int) -> dict[str, Any]:
    return {"n_peaks": 3 * index, "hit": index % 2 == 0, "resolution": None if index % 3 else index / 10, "delay": -1}


def results_header(processing: str) -> StreamHeader:
    source = f"eiger.results@{processing}"
    fields = {"data_source": source, "kind": "table", "shape": (), "dtype": "", "codec": "raw"}
    return StreamHeader.model_validate(HEADER.model_dump() | fields | {"parent": "eiger", "processing": processing})


def send_results(run: Run, indices: list[int], processing: str = "p1", row: Callable[[int], Any] = result_of) -> Any:
    """The results stream, with these rows, still open."""
    out = open_derived(run, results_header(processing))
    out.send([Row(index, None, row(index)) for index in indices])
    return out


@dataclass
class Opened:
    """A run with frames, results and annotations, and how to let it end."""

    run: Run
    target: str
    finish: Callable[[], None]

    @property
    def stream(self) -> Stream:
        return self.run["eiger"]


def say(run: Run) -> None:
    """Annotations, by frame and by time."""
    run.annotate(start=3, stop=15, laser=True, delay_ps=3.0)
    run.annotate(frames=[5, 6], laser=[False, None])
    run.annotate(frames=[1, 2], data_source="eiger.results@p1", laser=True)
    start, stop = (run["eiger"][i].info.received_ns for i in (16, 19))
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    # A microsecond is the finest step of a datetime: one is added so that both limits lie behind the frame's.
    run.annotate(
        from_time=epoch + timedelta(microseconds=start // 1000 + 1),
        to_time=epoch + timedelta(microseconds=stop // 1000 + 1),
        shutter="open",
    )


@contextlib.contextmanager
def fed(root: Path, *, is_finished: bool) -> Iterator[Opened]:
    """A service with the run: all frames are in, and all results; ended, or not yet."""
    with (
        serving(root, gap_timeout_s=0.15, idle_timeout_s=600) as service,
        Producer(service.address, "lyso", "eiger") as producer,
    ):
        out = producer.run(1)
        out.start(HEADER)
        for index in THERE:
            out.send(pixels(index), frame_index=index, meta=meta_of(index))
        target = f"{service.address}/lyso/1"
        run = open_run(target)
        wait_for(lambda: run["eiger"].status.watermark == N)
        results = send_results(run, THERE)
        say(run)
        has_ended, one_at_a_time = threading.Event(), threading.Lock()

        def finish() -> None:
            with one_at_a_time:
                if not has_ended.is_set():
                    has_ended.set()
                    results.finish(N)
                    out.finish()

        if is_finished:
            finish()
        try:
            yield Opened(run, target, finish)
        finally:
            finish()


def laser(index: int) -> bool | None:
    return {5: False, 6: None}.get(index, True if 3 <= index < 15 else None)


CASES: list[tuple[str, Callable[[int], Any]]] = [
    ("true", lambda i: True),
    ("frame_index BETWEEN 3 AND 9", lambda i: 3 <= i <= 9),
    ("size_bytes > 0 AND frame.size_bytes < 100000", lambda i: True),
    ("late", lambda i: False),
    ("n_parts = 1", lambda i: True),
    ("producer <> ''", lambda i: True),
    ("utc > '2020-01-01' AND received <= utc", lambda i: True),
    ("utc < '2020-01-01'", lambda i: False),
    ("utc_ns IS NULL AND received_ns > 0", lambda i: True),
    ("series_id IS NULL", lambda i: True),
    ("octet = 1 OR meta.delay > 1", None),
    ("meta.delay > 1", lambda i: i / 10 > 1),
    ('"odd name" = 1', lambda i: i % 3 == 1),
    ("Well = 'A'", lambda i: i % 2 == 0),
    ("well = 'A'", lambda i: i % 2 == 0),
    ("META.WELL = 'A'", lambda i: i % 2 == 0),
    ("late_key > 12", lambda i: i > 12),
    ("late_key IS NULL", lambda i: i < 10),
    ("label = '3' OR label = 'frame 13'", lambda i: i in (3, 13)),
    ("TRY_CAST(label AS INTEGER) > 5", lambda i: 5 < i < 12),
    ("mixed = 'three' OR mixed = '5'", lambda i: i in (3, 5)),
    ("(meta->>'$.motor.x')::int > 20", lambda i: i > 10),
    ("json_extract_string(meta, '$.motor.x') = '8'", lambda i: i == 4),
    ("n_peaks > 20", lambda i: 3 * i > 20),
    ("hit", lambda i: i % 2 == 0),
    ("hit AND n_peaks > 20", lambda i: i % 2 == 0 and 3 * i > 20),
    ("results.n_peaks BETWEEN 6 AND 12", lambda i: 2 <= i <= 4),
    ("resolution < 1.0", lambda i: i % 3 == 0 and i < 10),
    ("resolution IS NULL", lambda i: i % 3 > 0),
    ("results.delay = -1 AND meta.delay < 0.5", lambda i: i < 5),
    ("laser", lambda i: laser(i)),
    ("NOT laser", lambda i: laser(i) is False),
    ("laser IS NOT TRUE", lambda i: not laser(i)),
    ("annotation.delay_ps = 3", lambda i: 3 <= i < 15),
    ("shutter = 'open'", lambda i: i in (17, 18, 19)),
    ("n_peaks > 20 AND laser", lambda i: 3 * i > 20 and laser(i)),
    ("hit AND laser AND meta.delay > 0.9 AND frame_index % 4 = 0", lambda i: i == 12),
]
CASES = [case for case in CASES if case[1] is not None]


REFUSED = [
    ("n_peeks > 3", r"no column 'n_peeks' in eiger; did you mean results\.n_peaks\?"),
    (
        "nothing_like_it",
        r"there are frame: frame_index, .*; meta: Well, delay, .*; results: .*n_peaks.*\(.* p1\)",
    ),
    ("meta.n_peaks > 3", "no column 'meta.n_peaks'.*did you mean .*results.n_peaks"),
    ("meta.motor = 3", "no column 'meta.motor'"),
    ("results.laser", "no column 'results.laser'"),
    ("frame.delay > 1", "no column 'frame.delay'"),
    ("delay > 1", "'delay' is ambiguous in eiger; write meta.delay or results.delay"),
    ("motor.x > 1", r"no column 'motor\.x'|is not a column"),
    ("meta.motor.x > 1", r"nested in metadata is read like meta->>'\$\.meta\.motor\.x'"),
    ("part = 0", "no column 'part'"),
    ("n_peaks > 'many'", "Could not convert"),
    ("n_peaks >", "syntax error"),
    ("1=1; ATTACH 'x'", "condition"),
]
# With its prefix a name may still come.
NEVER = [case for case in REFUSED if not case[0].startswith(("meta.n_", "meta.motor =", "results.", "frame."))]


class QueryConformance:
    """What a condition gives, however the stream is reached."""

    @pytest.fixture
    def ending(self, opened):
        """A run that the test may let end, if it has not."""
        return opened

    @pytest.mark.parametrize(("condition", "is_true"), CASES, ids=[c[0] for c in CASES])
    def test_conditions(self, opened, condition, is_true):
        selection = opened.stream.where(condition)
        assert selection.indices.dtype == np.int64
        assert selection.indices.tolist() == [i for i in THERE if is_true(i)]
        assert len(selection) == len(selection.indices)
        assert selection.n_considered == len(THERE)

    def test_frames(self, opened):
        selection = opened.stream.where("n_peaks > 20 AND laser")
        indices = [8, 9, 10, 11, 12, 13, 14]
        assert [f.frame_index for f in selection] == indices
        assert all(np.array_equal(f.data, pixels(f.frame_index)) for f in selection)
        assert selection[0].frame_index == 8
        assert selection[-1].meta == meta_of(14)

    def test_nothing_matches(self, opened):
        selection = opened.stream.where("n_peaks > 1000")
        assert (len(selection), list(selection), len(selection.table)) == (0, [], 0)
        assert selection.array.shape == (0, *SHAPE)
        with pytest.raises(IndexError):
            selection[0]

    def test_table(self, opened):
        selection = opened.stream.where(
            "hit AND laser", columns=["n_peaks", "laser", "meta.delay", "Well", "size_bytes"]
        )
        assert selection.table.column_names == ["frame_index", "n_peaks", "laser", "meta.delay", "Well", "size_bytes"]
        row = selection.table.to_pylist()[1]
        size = opened.stream[8].info.size_bytes
        assert row == {
            "frame_index": 8, "n_peaks": 24, "laser": True, "meta.delay": 0.8, "Well": "A", "size_bytes": size
        }  # fmt: skip

    def test_table_shows_what_was_asked(self, opened):
        table = opened.stream.where("hit AND meta.delay > 1.9").table
        assert table.column_names == ["frame_index", "hit", "meta.delay"]
        assert table.to_pylist() == [{"frame_index": 20, "hit": True, "meta.delay": 2.0}]

    def test_table_of_times(self, opened):
        row = opened.stream.where("frame_index = 3", columns=["utc", "received", "received_ns"]).table.to_pylist()[0]
        assert row["utc"] == row["received"]
        assert abs(row["received"] - opened.stream[3].times.received) <= timedelta(microseconds=1)
        assert row["received_ns"] == opened.stream[3].info.received_ns

    def test_array(self, opened):
        array = opened.stream.where("frame_index IN (3, 9, 20)").array
        assert array.shape == (3, *SHAPE)
        assert np.array_equal(array[1], pixels(9))
        assert np.array_equal(array[:, 3], np.stack([pixels(i)[3] for i in (3, 9, 20)]))

    def test_repr(self, opened):
        assert repr(opened.stream.where("hit")) == "<Selection of eiger: 11 of 21 frames, 'hit'>"

    def test_columns(self, opened):
        columns = opened.stream.columns()
        assert {"frame_index", "size_bytes", "utc", "series_id", "meta"} <= set(columns["frame"])
        assert set(columns["meta"]) - {"mixed"} == {"Well", "delay", "label", "late_key", "odd name"}
        assert set(columns["results"]) == {"n_peaks", "hit", "resolution", "delay"}
        assert columns["annotation"] == ["delay_ps", "laser", "shutter"]

    @pytest.mark.parametrize(("condition", "words"), REFUSED, ids=[condition for condition, _ in REFUSED])
    def test_refusals_repeat_the_condition(self, opened, condition, words):
        with pytest.raises(BadQuery, match=words) as refusal:
            opened.stream.where(condition)
        assert repr(condition) in str(refusal.value)

    @pytest.mark.parametrize(("condition", "words"), NEVER, ids=[condition for condition, _ in NEVER])
    def test_refusals_when_followed(self, opened, condition, words):
        with pytest.raises(BadQuery, match=words) as refusal:
            list(opened.stream.where(condition, follow=True, timeout=0.1))
        assert repr(condition) in str(refusal.value)

    def test_unknown_columns_to_show(self, opened):
        with pytest.raises(BadQuery, match="no column 'n_peeks'"):
            opened.stream.where("true", columns=["n_peeks"])

    def test_unknown_processing(self, opened):
        with pytest.raises(BadQuery, match="no processing 'p9' of eiger; there are: p1"):
            opened.stream.where("hit", processing="p9")

    def test_a_results_stream_can_be_asked_itself(self, opened):
        rows = opened.run["eiger.results@p1"].where("hit AND n_peaks > 50", columns=["n_peaks", "laser", "delay_ps"])
        assert rows.table.to_pylist() == [
            {"frame_index": 18, "n_peaks": 54, "laser": None, "delay_ps": None},
            {"frame_index": 20, "n_peaks": 60, "laser": None, "delay_ps": None},
        ]
        # Annotations of the parent hold for it as well, and its own for itself alone.
        assert opened.run["eiger.results@p1"].where("laser").indices.tolist() == [1, 2, *(i for i in THERE if laser(i))]
        # Its frames were taken when the parent's were, not when they were processed.
        assert opened.run["eiger.results@p1"].where("shutter = 'open'").indices.tolist() == [17, 18, 19]

    def test_follow_gives_the_same(self, ending):
        threading.Timer(0.3, ending.finish).start()
        frames = list(ending.stream.where("hit AND laser AND meta.delay > 0.5", follow=True))
        assert [f.frame_index for f in frames] == [8, 10, 12, 14]
        assert all(np.array_equal(f.data, pixels(f.frame_index)) for f in frames)

    def test_follow_from(self, ending):
        threading.Timer(0.3, ending.finish).start()
        assert [f.frame_index for f in ending.stream.where("hit", follow=True, start=9)] == [10, 12, 14, 16, 18, 20]

    def test_follow_without_results(self, ending):
        threading.Timer(0.3, ending.finish).start()
        found = ending.stream.where("meta.delay > 1.5 AND Well = 'A'", follow=True)
        assert [f.frame_index for f in found] == [16, 18, 20]

    def test_follow_stops_at_the_time_out(self, opened):
        started = time.monotonic()
        assert [f.frame_index for f in opened.stream.where("hit", follow=True, timeout=0.2)] == [
            i for i in THERE if i % 2 == 0
        ]
        assert time.monotonic() - started < 5

    def test_history_of_annotations(self, opened):
        table = opened.run.annotations
        assert table["name"].to_pylist()[:2] == ["laser", "delay_ps"]
        assert set(table["data_source"].to_pylist()) == {None, "eiger.results@p1"}

    def test_annotating_a_source_that_is_not_there(self, opened):
        with pytest.raises(StreamNotFound, match="no data source 'jungfrau'; it has: eiger"):
            opened.run.annotate(frames=1, data_source="jungfrau", laser=True)


@pytest.fixture(scope="module")
def live_run(tmp_path_factory):
    with fed(tmp_path_factory.mktemp("data"), is_finished=False) as opened:
        yield opened


class TestLiveRun(QueryConformance):
    """Nothing has ended: some chunks are sealed, some frames are in the journal."""

    @pytest.fixture
    def opened(self, live_run):
        return live_run

    @pytest.fixture
    def ending(self, tmp_path):
        with fed(tmp_path, is_finished=False) as opened:
            yield opened


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    with fed(tmp_path_factory.mktemp("data"), is_finished=True) as opened:
        yield opened


@pytest.fixture(scope="module")
def finished_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    with fed(root, is_finished=True):
        return root


class TestFinishedRun(QueryConformance):
    """Through the service, after the end."""

    @pytest.fixture
    def opened(self, finished_run):
        return finished_run


class TestRunFolder(QueryConformance):
    """No service at all."""

    @pytest.fixture
    def opened(self, finished_root):
        target = str(finished_root / "lyso" / "1")
        return Opened(open_run(target), target, lambda: None)


class TestLiveRunFolder(QueryConformance):
    """The folder of a run that a service in another process is writing."""

    @pytest.fixture
    def opened(self, live_run):
        return replace(live_run, run=open_run(live_run.run.folder))

    @pytest.fixture
    def ending(self, tmp_path):
        with fed(tmp_path, is_finished=False) as served:
            yield replace(served, run=open_run(tmp_path / "lyso" / "1"))


# ---- a service whose folder the client cannot see -------------------------------------------------


@pytest.fixture
def far_run(finished_run, monkeypatch):
    run = open_run(finished_run.target)
    monkeypatch.setattr(run, "visible_folder", None)
    return run


def test_rows_come_over_the_wire(far_run):
    known = [case for case in CASES if not any(word in case[0] for word in ("laser", "annotation", "shutter"))]
    for condition, is_true in known:
        assert far_run["eiger"].where(condition).indices.tolist() == [i for i in THERE if is_true(i)], condition


def test_annotations_go_through_the_service(far_run):
    frames = far_run["eiger"]
    known = len(far_run.annotations)
    number = far_run.annotate(frames=[1, 2], colour=["red", "green"], by="far")
    other = open_run(f"{far_run.service_address}/lyso/1")
    assert other.annotations.to_pylist()[known:] == far_run.annotations.to_pylist()[known:]
    assert [row["batch"] for row in far_run.annotations.to_pylist()[known:]] == [number, number]
    assert frames.where("colour = 'green'").indices.tolist() == [2]
    assert "cannot be seen" not in str(far_run)
    with pytest.raises(BadAnnotation, match="would be numbers and text"):
        other.annotate(frames=3, colour=1)


# ---- following what comes -------------------------------------------------------------------------


@dataclass
class Beam:
    """A live run under the test's hands: frames and results come when it says so."""

    run: Run
    out: Any

    def send(self, indices: Any, **meta: Any) -> None:
        for index in indices:
            self.out.send(pixels(index), frame_index=index, meta=meta_of(index) | meta)

    def reader(self) -> Stream:
        """As another program would open it."""
        return open_run(f"{self.run.service_address}/lyso/1")["eiger"]


@pytest.fixture
def beam(tmp_path):
    with serving(tmp_path, gap_timeout_s=0.15) as service, Producer(service.address, "lyso", "eiger") as producer:
        out = producer.run(1)
        out.start(HEADER)
        yield Beam(open_run(f"{service.address}/lyso/1"), out)


class Follower:
    """A loop over matching frames in a thread, and what it has seen so far."""

    def __init__(self, stream: Stream, condition: str, **options: Any) -> None:
        self.seen: list[int] = []
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(stream, condition, options))
        self._thread.start()

    def _run(self, stream: Stream, condition: str, options: dict[str, Any]) -> None:
        try:
            for frame in stream.where(condition, follow=True, **options):
                self.seen.append(frame.frame_index)
        except BadQuery as error:
            self.error = error

    @property
    def has_ended(self) -> bool:
        return not self._thread.is_alive()

    def join(self) -> list[int]:
        self._thread.join(20)
        assert self.has_ended
        return self.seen


def test_a_frame_is_decided_when_its_results_are_there(beam):
    beam.send(range(8))
    results = send_results(beam.run, [0, 1, 2, 3])
    follower = Follower(beam.reader(), "hit AND meta.delay >= 0.2")
    wait_for(lambda: follower.seen == [2])
    beam.send(range(8, 12))
    time.sleep(0.2)
    assert follower.seen == [2], "stored, but not processed yet"
    results.send([Row(i, None, result_of(i)) for i in range(4, 9)])
    wait_for(lambda: follower.seen == [2, 4, 6, 8])
    beam.out.finish()
    time.sleep(0.2)
    assert not follower.has_ended, "the processing goes on"
    results.send([Row(i, None, result_of(i)) for i in range(9, 12)])
    results.finish(12)
    assert follower.join() == [2, 4, 6, 8, 10]


def test_without_results_a_frame_is_decided_at_once(beam):
    beam.send(range(2))
    send_results(beam.run, [0])
    follower = Follower(beam.reader(), "Well = 'A'")
    wait_for(lambda: follower.seen == [0])
    beam.send([2, 3, 4])
    wait_for(lambda: follower.seen == [0, 2, 4])
    beam.out.finish()
    assert follower.join() == [0, 2, 4]


def test_frames_that_the_processing_left_out_do_not_hold_up_the_others(beam):
    beam.send(range(6))
    results = send_results(beam.run, [0, 4])
    follower = Follower(beam.reader(), "hit OR results.hit IS NULL")
    wait_for(lambda: follower.seen == [0, 1, 2, 3, 4])
    results.finish(6)
    beam.out.finish()
    assert follower.join() == [0, 1, 2, 3, 4]


def test_following_from_before_the_first_frame(beam):
    """Names of columns come with the first frame."""
    follower = Follower(beam.reader(), "Well = 'A'")
    time.sleep(0.2)
    beam.send(range(3))
    wait_for(lambda: follower.seen == [0, 2])
    beam.out.finish()
    assert follower.join() == [0, 2]


def test_following_from_before_the_first_result(beam):
    beam.send(range(4))
    results = send_results(beam.run, [])
    follower = Follower(beam.reader(), "hit")
    time.sleep(0.2)
    assert not follower.has_ended
    results.send([Row(i, None, result_of(i)) for i in range(4)])
    wait_for(lambda: follower.seen == [0, 2])
    results.finish(4)
    beam.out.finish()
    assert follower.join() == [0, 2]


@pytest.mark.parametrize(
    ("condition", "options"), [("results.hit", {}), ("hit", {"processing": "p2"})], ids=["prefix", "processing"]
)
def test_following_from_before_the_processing(beam, condition, options):
    beam.send(range(4))
    follower = Follower(beam.reader(), condition, **options)
    time.sleep(0.3)
    assert not follower.has_ended
    results = send_results(beam.run, range(4), "p2")
    wait_for(lambda: follower.seen == [0, 2])
    results.finish(4)
    beam.out.finish()
    assert follower.join() == [0, 2]


def test_a_name_that_may_come_needs_its_prefix(beam):
    beam.send(range(4))
    unknown = Follower(beam.reader(), "shutter = 'open'")
    unknown.join()
    assert "no column 'shutter'" in str(unknown.error)
    follower = Follower(beam.reader(), "annotation.shutter = 'open' OR meta.door = 'open'")
    time.sleep(0.2)
    assert not follower.has_ended
    beam.run.annotate(start=6, shutter="open")
    beam.send(range(4, 8))
    beam.send([8], door="open")
    wait_for(lambda: follower.seen == [6, 7, 8])
    beam.out.finish()
    assert follower.join() == [6, 7, 8]


def test_following_what_nobody_processes_ends_with_a_word(beam):
    beam.send(range(4))
    follower = Follower(beam.reader(), "results.hit")
    beam.out.finish()
    follower.join()
    assert "use `nearline process`" in str(follower.error)
    assert list(beam.reader().where("results.hit", follow=True, timeout=0.0)) == []


def test_a_selection_is_of_the_moment_it_was_made(beam):
    beam.send(range(4))
    beam.run.annotate(start=0, laser=True)
    selection = beam.reader().where("true", columns=["laser", "Well"])
    beam.send(range(4, 8))
    beam.run.annotate(start=0, laser=False)
    assert [f.frame_index for f in selection] == [0, 1, 2, 3]
    assert selection.table["laser"].to_pylist() == [True] * 4
    assert beam.reader().where("NOT laser").indices.tolist() == list(range(8))


@pytest.mark.parametrize("condition", ["Well = 'A'", "hit", "results.hit", "meta.door"])
@pytest.mark.parametrize("place", ["service", "folder"])
def test_a_loop_that_waits_can_be_stopped(beam, condition, place):
    stream = beam.reader()
    beam.send(range(3))
    if condition == "hit":
        send_results(beam.run, [0, 1, 2])
    if place == "folder":
        stream = open_run(beam.run.folder)["eiger"]
    stop = threading.Event()
    follower = Follower(stream, condition, stop=stop)
    if condition in ("Well = 'A'", "hit"):
        wait_for(lambda: follower.seen == [0, 2])
    time.sleep(0.4)
    assert not follower.has_ended
    stop.set()
    started = time.monotonic()
    follower.join()
    assert time.monotonic() - started < 2


def test_a_loop_ends_between_frames(live_run):
    stop, seen = threading.Event(), []
    for frame in live_run.stream.where("hit", follow=True, stop=stop):
        seen.append(frame.frame_index)
        if len(seen) == 3:
            stop.set()
    assert seen == [0, 2, 4]


# ---- late frames, and frames in parts -------------------------------------------------------------


@pytest.mark.parametrize("is_finished", [False, True], ids=["live", "finished"])
def test_a_frame_in_parts_is_one_row(tmp_path, is_finished):
    """Frame 2 is without part 1; frame 1 and part 2 of frame 3 come when their chunk is sealed."""
    header = StreamHeader.model_validate(HEADER.model_dump() | {"shape": (8, 16), "parts": 3})
    store = StreamStore.create(new_folder(tmp_path), header)
    late = [(1, 0), (1, 1), (1, 2), (3, 2)]
    for index, part in itertools.product(range(10), (1, 0, 2)):
        if (index, part) not in [*late, (2, 1)]:
            put(store, index, part=part)
    store.account(0, 8, FrameState.missing, "not received")
    store.seal_complete()
    for index, part in late:
        put_late(store, index, part=part)
    if is_finished:
        store.finish(10, "not received")
        store.close()

    stream = open_run(store.folder.path)["eiger"]
    assert stream.where("true").indices.tolist() == list(range(10))
    assert stream.where("n_parts < 3").indices.tolist() == [2]
    assert stream.where("late").indices.tolist() == [1, 3]
    selection = stream.where("delay BETWEEN 0.1 AND 0.3", columns=["n_parts", "size_bytes", "late", "delay"])
    sizes = [sum(raw.nbytes for raw in stream.source.read_parts(index)) for index in (1, 2, 3)]
    assert selection.table.to_pydict() == {
        "frame_index": [1, 2, 3], "n_parts": [3, 2, 3], "size_bytes": sizes, "late": [True, False, True],
        "delay": [0.1, 0.2, 0.3],
    }  # fmt: skip
    if not is_finished:
        store.close()


# ---- which processing -----------------------------------------------------------------------------


def make_tables(run: Run, processing: str, *, is_finished: bool) -> Processing:
    """A processing with tables on disk; 100 peaks a frame more than the stream's rows tell."""
    now = datetime.now(UTC)
    manifest = Manifest(
        processing=processing, data_source="eiger", recipe={}, recipe_digest="", started_at=now, versions={}
    )
    made = Processing.create(run.folder, manifest)
    for chunk in range(-(-N // SIZE)):
        index = [i for i in range(chunk * SIZE, min((chunk + 1) * SIZE, N)) if i != GAP]
        peaks = pa.table({"frame_index": index, "n_peaks": pa.array([100 + i for i in index], pa.int32())})
        quality = pa.array([math.nan if i % 3 else i / 10 for i in index], pa.float32())
        other = pa.table({"frame_index": index, "resolution": quality})
        digests = {}
        for name, table in (("find_peaks", peaks), ("integrate", other)):
            digests[name] = f"{processing}{name}{chunk}"
            StepStore(run.folder).save(digests[name], {}, {"frames": table})
        counts = {"n_frames": len(index), "n_hits": 0, "n_indexed": 0}
        limits = {"chunk": chunk, "start": index[0], "stop": index[-1] + 1}
        made.add_chunk(ChunkManifest(chunk_digest="", steps=digests, **limits, **counts))
    if is_finished:
        made.finish({})
    return made


@pytest.fixture
def several(tmp_path):
    with fed(tmp_path, is_finished=True) as opened:
        yield opened


def test_the_newest_finished_processing_is_asked(several):
    make_tables(several.run, "p2", is_finished=True)
    make_tables(several.run, "p10", is_finished=True)
    for run in (several.run, open_run(several.run.folder)):
        assert run["eiger"].where("n_peaks = 105").indices.tolist() == [5]
        assert run["eiger"].where("n_peaks = 15", processing="p1").indices.tolist() == [5]
        with pytest.raises(BadQuery, match=r"no column 'hit'.* \(results are those of p10\)"):
            run["eiger"].where("hit")
        assert [f.frame_index for f in run["eiger"].where("n_peaks < 103", follow=True)] == [0, 1, 2]


def test_not_a_number_in_tables_is_no_value(several):
    make_tables(several.run, "p2", is_finished=True)
    stream = several.stream
    assert stream.where("resolution > 0.5").indices.tolist() == [6, 9, 12, 15, 18, 21]
    assert stream.where("resolution IS NULL").indices.tolist() == [i for i in THERE if i % 3]


def test_a_processing_that_died_is_passed_over(several):
    send_results(several.run, [0], "p3").finish(1)
    make_tables(several.run, "p3", is_finished=False)
    make_tables(several.run, "p2", is_finished=True)
    assert several.stream.where("n_peaks = 105").indices.tolist() == [5]
    assert several.stream.where("n_peaks = 0", processing="p3").indices.tolist() == [0]


def test_a_running_processing_is_asked_before_older_ones(several):
    running = send_results(several.run, [0, 1], "p3", lambda i: {"n_peaks": 1000 + i})
    assert several.stream.where("n_peaks >= 1000").indices.tolist() == [0, 1]
    running.finish(2)


def test_derived_streams_have_the_results_of_their_processing(several):
    send_results(several.run, THERE, "p2", lambda i: {"n_peaks": -i}).finish(N)
    fields = {"data_source": "eiger.marks@p1", "kind": "table", "shape": (), "dtype": "", "codec": "raw"}
    header = StreamHeader.model_validate(HEADER.model_dump() | fields | {"parent": "eiger", "processing": "p1"})
    marks = open_derived(several.run, header)
    marks.send([Row(i, None, {"mark": i}) for i in (2, 4, 9)])
    marks.finish(N)
    stream = several.run["eiger.marks@p1"]
    assert stream.where("n_peaks > 6").indices.tolist() == [4, 9]
    assert stream.where("n_peaks < -6", processing="p2").indices.tolist() == [9]
