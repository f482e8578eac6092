"""Frames in parts, and frames that came late, as a reader sees them: live, finished, and from a bare folder."""

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from storage.errors import FrameMissing, GroupNeedsService
from storage.models import StreamHeader
from streaming.producer import Producer
from streaming.retrieval import Run, open_run

from .harness import pixels, serving, wait_for

SHAPE, PARTS, N = (8, 16), 3, 10
# Frame 2 is without part 1, frame 4 without parts 0 and 2, frame 7 never came.
ABSENT = {(2, 1), (4, 0), (4, 2), *((7, part) for part in range(PARTS))}
THERE = [i for i in range(N) if i != 7]
# These come when their chunk is sealed: a whole frame, and what was missing of another.
LATE = [(1, part) for part in range(PARTS)] + [(3, 1)]
HEADER = StreamHeader(
    experiment="lyso", run=1, data_source="jungfrau", shape=SHAPE, dtype="uint16", frames_per_chunk=4, parts=PARTS
)  # fmt: skip


def module(index: int, part: int) -> np.ndarray:
    return pixels(index + 1000 * part, shape=SHAPE)


def whole(index: int) -> np.ndarray:
    """(part, slow, fast); the dtype's maximum where a part is absent."""
    empty = np.full(SHAPE, 65535, np.uint16)
    return np.stack([empty if (index, part) in ABSENT else module(index, part) for part in range(PARTS)])


@contextlib.contextmanager
def fed(root: Path, *, is_finished: bool) -> Iterator[Run]:
    """A service with the run; the last index is in, and the late frames are."""
    options = {"gap_timeout_s": 0.15, "idle_timeout_s": 600}
    with serving(root, **options) as service, Producer(service.address, "lyso", "jungfrau") as producer:
        out = producer.run(1)
        out.start(HEADER)
        slots = [(i, p) for i in range(N) for p in (1, 0, 2) if (i, p) not in ABSENT]
        for index, part in slots:
            if (index, part) not in LATE:
                out.send(module(index, part), frame_index=index, part=part, meta={"angle": index * 10})
        run = open_run(f"{service.address}/lyso/1")
        stream = run["jungfrau"]
        wait_for(lambda: stream.status.n_sealed == 2)
        for index, part in LATE:
            out.send(module(index, part), frame_index=index, part=part, meta={"angle": index * 10})
        if is_finished:
            out.finish()
        try:
            yield run
        finally:
            if not is_finished:
                out.finish()


class PartsConformance:
    """What every way to such a stream gives."""

    @pytest.mark.parametrize("index", THERE)
    def test_data(self, run, index):
        frame = run["jungfrau"][index]
        assert frame.data.shape == (PARTS, *SHAPE)
        assert np.array_equal(frame.data, whole(index))
        assert frame.meta == {"angle": index * 10}

    @pytest.mark.parametrize("index", THERE)
    def test_parts(self, run, index):
        frame = run["jungfrau"][index]
        there = [(index, part) not in ABSENT for part in range(PARTS)]
        assert [part is not None for part in frame.parts] == there
        assert all(np.array_equal(found, module(index, i)) for i, found in enumerate(frame.parts) if found is not None)
        assert frame.is_complete is all(there)
        assert frame.is_late is (index in (1, 3))

    def test_missing(self, run):
        with pytest.raises(FrameMissing, match="frame 7 of"):
            _ = run["jungfrau"][7]

    def test_iteration_gives_each_frame_once(self, run):
        frames = list(run["jungfrau"])
        assert [f.frame_index for f in frames] == THERE
        assert all(np.array_equal(f.data, whole(f.frame_index)) for f in frames)
        assert [f.frame_index for f in run["jungfrau"][2:8]] == [2, 3, 4, 5, 6]

    def test_follow(self, run):
        frames = list(run["jungfrau"].follow(timeout=0.2))
        assert [(f.frame_index, f.is_complete) for f in frames] == [(i, i not in (2, 4)) for i in THERE]

    def test_latest_is_whole(self, run):
        frame = run["jungfrau"].latest()
        assert (frame.frame_index, frame.is_complete) == (N - 1, True)

    def test_array(self, run):
        array = run["jungfrau"].array
        assert array.shape == (N, PARTS, *SHAPE)
        for index in (0, 2, 4, 7):
            assert np.array_equal(array[index], whole(index))
        assert np.array_equal(array[:, 1, 3], np.stack([whole(i)[1, 3] for i in range(N)]))

    def test_conditions_see_one_row_a_frame(self, run):
        stream = run["jungfrau"]
        assert stream.where("n_parts < 3").indices.tolist() == [2, 4]
        assert stream.where("late").indices.tolist() == [1, 3]
        selection = stream.where("angle BETWEEN 20 AND 40", columns=["n_parts", "size_bytes", "late", "angle"])
        sizes = [sum(raw.nbytes for raw in stream.source.read_parts(index)) for index in (2, 3, 4)]
        assert selection.table.to_pydict() == {
            "frame_index": [2, 3, 4], "n_parts": [2, 3, 1], "size_bytes": sizes, "late": [False, True, False],
            "angle": [20, 30, 40],
        }  # fmt: skip
        assert np.array_equal(selection.array[0], whole(2))
        assert all(np.array_equal(f.data, whole(f.frame_index)) for f in selection)


@pytest.fixture(scope="module")
def live_run(tmp_path_factory):
    with fed(tmp_path_factory.mktemp("data"), is_finished=False) as run:
        yield run


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    with fed(tmp_path_factory.mktemp("data"), is_finished=True) as run:
        yield run


class TestLiveRun(PartsConformance):
    @pytest.fixture
    def run(self, live_run):
        return live_run


class TestFinishedRun(PartsConformance):
    @pytest.fixture
    def run(self, finished_run):
        return finished_run


class TestRunFolder(PartsConformance):
    @pytest.fixture
    def run(self, finished_run):
        return open_run(finished_run.folder)


class TestLiveRunFolder(PartsConformance):
    @pytest.fixture
    def run(self, live_run):
        return open_run(live_run.folder)


def test_a_group_gets_whole_frames(finished_run):
    frames = list(finished_run["jungfrau"].follow(group="mine"))
    assert sorted(f.frame_index for f in frames) == THERE
    assert all(np.array_equal(f.data, whole(f.frame_index)) for f in frames)


# ---- what a group can do with a frame -------------------------------------------------------------


def test_a_frame_can_be_asked_for_again(finished_run):
    seen = []
    for frame in finished_run["jungfrau"].follow(group="tries"):
        seen.append((frame.frame_index, frame.delivery))
        if frame.frame_index == 5 and frame.delivery == 1:
            frame.retry_later()
    assert sorted(seen) == sorted([*((i, 1) for i in THERE), (5, 2)])


def test_a_frame_of_no_group_cannot(finished_run):
    with pytest.raises(GroupNeedsService, match=r"follow\(group=…\)"):
        finished_run["jungfrau"][0].retry_later()


def test_newest_frames_are_shared_as_well(finished_run):
    stream = finished_run["jungfrau"]
    assert stream.latest(group="displays").frame_index == N - 1
    assert stream.latest(group="displays") is None
    assert stream.latest(group="others").frame_index == N - 1
    with pytest.raises(GroupNeedsService, match="need a running service"):
        open_run(finished_run.folder)["jungfrau"].latest(group="displays")


# ---- being stopped from another thread ------------------------------------------------------------

WAYS = {
    "follow": lambda stream, stop: stream.follow(stop=stop),
    "group": lambda stream, stop: stream.follow(group=f"stopped-{time.monotonic_ns()}", stop=stop),
    "where": lambda stream, stop: stream.where("angle >= 0", follow=True, stop=stop),
    "results": lambda stream, stop: stream.where("results.hit", follow=True, stop=stop),
}


PLACES = [(way, place) for way in WAYS for place in ("service", "folder") if (way, place) != ("group", "folder")]


@pytest.mark.parametrize(("way", "place"), PLACES)
def test_a_loop_that_waits_can_be_stopped(live_run, way, place):
    target = f"{live_run.service_address}/lyso/1" if place == "service" else live_run.folder
    stop, seen = threading.Event(), []

    def loop() -> None:
        seen.extend(frame.frame_index for frame in WAYS[way](open_run(target)["jungfrau"], stop))

    thread = threading.Thread(target=loop)
    thread.start()
    time.sleep(0.5)
    assert thread.is_alive(), "the run is live, so it waits"
    stop.set()
    thread.join(3)
    assert not thread.is_alive()
    assert sorted(seen) == ([] if way == "results" else THERE)


def test_a_loop_ends_between_frames(finished_run):
    stop, seen = threading.Event(), []
    for frame in finished_run["jungfrau"].follow(stop=stop):
        seen.append(frame.frame_index)
        if len(seen) == 3:
            stop.set()
    assert seen == [0, 1, 2]
