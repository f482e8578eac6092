"""One API: the same tests on a live run, a finished run, a run folder with no service, and an object store."""

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from storage.errors import FrameMissing, FrameNotYetAvailable, GroupNeedsService, NotStored, RunNotFound, StreamNotFound
from storage.files import to_path
from storage.models import DetectorHeader, RunState, StreamHeader
from storage.run_folder import RunFolder
from storage.upload import upload_run
from streaming.producer import Producer
from streaming.retrieval import Run, Stream, open_run

from ..servers import new_bucket
from .harness import SHAPE, pixels, serving, wait_for

N, GAP = 22, 7
SLICES = [slice(a, b) for a, b in [(None, None), (5, 9), (-3, None), (9, 5), (100, 200), (0, 999)]]
THERE = [i for i in range(N) if i != GAP]
MASK = (np.arange(SHAPE[0] * SHAPE[1]) % 11 == 0).astype(np.uint32).reshape(SHAPE)
HEADER = StreamHeader(
    experiment="lyso",
    run=1,
    data_source="eiger",
    shape=SHAPE,
    dtype="uint16",
    frames_per_chunk=4,
    detector=DetectorHeader(detector_distance=0.2, incident_wavelength=1.0),
)


ONLINE_HEADER = HEADER.model_copy(update={"persistence": "online"})


def feed(address: str, may_finish: threading.Event, pause: float = 0.0, header: StreamHeader = HEADER) -> None:
    with Producer(address, "lyso", "eiger") as producer:
        out = producer.run(1, sample="lysozyme")
        out.start(header, pixel_mask=MASK)
        for index in THERE:
            out.send(pixels(index), frame_index=index, meta={"delay": index / 10})
            time.sleep(pause)
        may_finish.wait()
        out.finish()


@dataclass
class Opened:
    """A run under test, how to name it, and how to let it end."""

    run: Run
    target: str
    finish: Callable[[], None]

    @property
    def stream(self) -> Stream:
        """The stream once all frames are known of; of a live run it has not ended."""
        stream = self.run["eiger"]
        wait_for(lambda: stream.status.watermark == N)
        return stream


class StreamConformance:
    """What every way to a stream does."""

    is_live = False
    header = HEADER

    def test_index(self, opened):
        stream = opened.stream
        for index in (0, 3, 4, 21, -1, -22):
            frame = stream[index]
            assert frame.frame_index == index % N
            assert np.array_equal(frame.data, pixels(index % N))

    def test_len_and_status(self, opened):
        stream = opened.stream
        assert len(stream) == N
        assert stream.is_live is self.is_live
        assert opened.run.state is (RunState.live if self.is_live else RunState.incomplete)

    @pytest.mark.parametrize("which", SLICES, ids=str)
    def test_slices(self, opened, which):
        part = opened.stream[which]
        indices = range(N)[which]
        assert len(part) == len(indices)
        assert [f.frame_index for f in part] == [i for i in indices if i != GAP]
        assert all(np.array_equal(f.data, pixels(f.frame_index)) for f in part)

    def test_iteration(self, opened):
        assert [f.frame_index for f in opened.stream] == THERE

    def test_follow_gives_all_frames_and_ends(self, opened):
        threading.Timer(0.3, opened.finish).start()
        frames = list(opened.run["eiger"].follow())
        assert [f.frame_index for f in frames] == THERE
        assert all(np.array_equal(f.data, pixels(f.frame_index)) for f in frames)
        assert opened.run.state is RunState.incomplete, "a run has ended when its stream has"

    @pytest.mark.parametrize("start", [-5, 0, 6, 7, 8, 30])
    def test_follow_from(self, opened, start):
        opened.finish()
        assert [f.frame_index for f in opened.run["eiger"].follow(start=start)] == [i for i in THERE if i >= start]

    def test_follow_stops_at_the_time_out(self, opened):
        started = time.monotonic()
        assert [f.frame_index for f in opened.stream.follow(timeout=0.2)] == THERE
        assert time.monotonic() - started < 5

    def test_latest(self, opened):
        stream = opened.stream
        assert stream.latest().frame_index == N - 1
        assert stream.latest(N - 2, timeout=5).frame_index == N - 1
        assert stream.latest(N - 1, timeout=0.05) is None

    def test_array(self, opened):
        stream = opened.stream
        array = stream.array
        assert array.shape == (N, *SHAPE)
        assert array.dtype == np.uint16
        assert np.array_equal(array[5], pixels(5))
        assert (array[GAP] == 65535).all()
        assert np.array_equal(stream[5:7].array[1, 3], pixels(6)[3])

    def test_metadata_and_times(self, opened):
        frame = opened.stream[12]
        assert frame.meta == {"delay": 1.2}
        assert abs(time.time() - frame.times.received.timestamp()) < 60
        assert frame.times.start_tick is None
        assert bytes(frame.blob) == bytes(frame.raw.blob)
        assert frame.info.size_bytes == len(frame.blob)

    def test_header_mask_and_geometry(self, opened):
        stream = opened.stream
        assert stream.header == self.header
        assert np.array_equal(stream.pixel_mask, MASK)
        assert stream.geometry.panels[0].shape == SHAPE
        assert opened.run.header.sample == "lysozyme"
        assert opened.run.detector.name == "eiger"

    def test_chunks(self, opened):
        threading.Timer(0.3, opened.finish).start()
        chunks = list(opened.run["eiger"].chunks())
        assert [(c.start, c.stop) for c in chunks] == [(i, min(i + 4, N)) for i in range(0, N, 4)]
        assert [f.frame_index for c in chunks for f in c.frames()] == THERE
        assert len({c.commit.digest for c in chunks}) == len(chunks)
        assert [c.start for c in opened.run["eiger"].chunks(start=4)] == [16, 20]

    def test_chunk_that_is_not_sealed(self, opened):
        assert list(opened.stream.chunks(start=6, timeout=0.05)) == []

    def test_ledger(self, opened):
        ledger = opened.stream.ledger()
        assert ledger.is_balanced
        assert (ledger.announced, ledger.stored, ledger.missing) == (N, N - 1, 1)
        assert [(r.start, r.stop, r.cause) for r in ledger.ranges] == [(GAP, GAP + 1, "not received")]
        assert ledger.is_terminal is not self.is_live
        assert opened.run.ledger()["eiger"] == ledger

    @pytest.mark.parametrize(("index", "words"), [(GAP, "is missing \\(not received\\)"), (-N - 1, "does not exist")])
    def test_frame_missing(self, opened, index, words):
        with pytest.raises(FrameMissing, match=words):
            _ = opened.stream[index]

    def test_frame_beyond_the_end(self, opened):
        with pytest.raises(FrameNotYetAvailable if self.is_live else FrameMissing, match=f"{N} frames"):
            _ = opened.stream[N]

    def test_stream_not_found(self, opened):
        with pytest.raises(StreamNotFound, match="no data source 'jungfrau'; it has: eiger"):
            _ = opened.run["jungfrau"]

    def test_run_not_found(self, opened):
        with pytest.raises(RunNotFound):
            open_run(opened.target.removesuffix("/1") + "/999")

    @pytest.mark.parametrize("step", [2, -1])
    def test_slice_step(self, opened, step):
        with pytest.raises(ValueError, match=r"slice \.array instead"):
            _ = opened.stream[::step]

    def test_group(self, opened):
        threading.Timer(0.3, opened.finish).start()
        frames = list(opened.run["eiger"].follow(group="mine"))
        assert [(f.frame_index, f.delivery) for f in frames] == [(i, 1) for i in THERE]
        assert list(opened.run["eiger"].follow(group="mine")) == []

    def test_run_and_repr(self, opened):
        assert list(opened.run) == ["eiger"]
        assert "eiger" in opened.run
        assert "lyso/1" in repr(opened.run)
        assert f"{N} frames" in repr(opened.stream)
        assert opened.run.folder.name == "1"


@contextlib.contextmanager
def fed(root: Path, *, is_finished: bool, header: StreamHeader = HEADER) -> Iterator[Opened]:
    """A service with the run, being fed while the test reads, or finished before."""
    may_finish = threading.Event()
    with serving(root, gap_timeout_s=0.15) as service:
        if is_finished:
            may_finish.set()
        pause = 0.0 if is_finished else 0.005
        feeding = threading.Thread(target=feed, args=(service.address, may_finish, pause, header))
        feeding.start()
        target = f"{service.address}/lyso/1"
        try:
            if is_finished:
                feeding.join()
            wait_for(lambda: (root / "lyso" / "1" / "eiger.stream.json").exists())
            yield Opened(open_run(target), target, may_finish.set)
        finally:
            may_finish.set()
            feeding.join()


class TestLiveRun(StreamConformance):
    """Frames are still being sent while the test reads."""

    is_live = True

    @pytest.fixture
    def opened(self, tmp_path):
        with fed(tmp_path, is_finished=False) as opened:
            yield opened


class OnlineConformance(StreamConformance):
    """A stream in memory only does the same, without chunks, as long as its frames are there."""

    header = ONLINE_HEADER

    def test_chunks(self, opened):
        with pytest.raises(NotStored, match="is in memory only and cannot be cut into chunks"):
            list(opened.stream.chunks())

    def test_chunk_that_is_not_sealed(self, opened):
        assert opened.stream.source.wait_chunk(0, 0.05) is None

    def test_ledger(self, opened):
        ledger = opened.stream.ledger()
        assert ledger.is_balanced
        assert (ledger.announced, ledger.buffered, ledger.stored, ledger.missing) == (N, N - 1, 0, 1)
        assert [(r.start, r.stop, r.cause) for r in ledger.ranges] == [(GAP, GAP + 1, "not received")]
        assert ledger.is_terminal is not self.is_live


class TestLiveOnlineRun(OnlineConformance):
    """Frames are still being sent while the test reads."""

    is_live = True

    @pytest.fixture
    def opened(self, tmp_path):
        with fed(tmp_path, is_finished=False, header=ONLINE_HEADER) as opened:
            yield opened


@pytest.fixture(scope="module")
def finished_online(tmp_path_factory):
    with fed(tmp_path_factory.mktemp("data"), is_finished=True, header=ONLINE_HEADER) as opened:
        yield opened


class TestFinishedOnlineRun(OnlineConformance):
    """Through the service that took it, after the end."""

    @pytest.fixture
    def opened(self, finished_online):
        return finished_online


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    with fed(tmp_path_factory.mktemp("data"), is_finished=True) as opened:
        yield opened


@pytest.fixture(scope="module")
def finished_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    with fed(root, is_finished=True):
        return root


@pytest.fixture(scope="module")
def forgotten_run(finished_root):
    with serving(finished_root) as service:
        target = f"{service.address}/lyso/1"
        yield Opened(open_run(target), target, lambda: None)


class TestFinishedRun(StreamConformance):
    """Through the service, after the end."""

    @pytest.fixture
    def opened(self, finished_run):
        return finished_run


class TestForgottenRun(StreamConformance):
    """Through a service that was started after the run had ended."""

    @pytest.fixture
    def opened(self, forgotten_run):
        return forgotten_run


class TestRunFolder(StreamConformance):
    """No service at all."""

    @pytest.fixture
    def opened(self, finished_root):
        target = str(finished_root / "lyso" / "1")
        return Opened(open_run(target), target, lambda: None)

    def test_group(self, opened):
        with pytest.raises(GroupNeedsService, match="groups need a running service"):
            next(opened.run["eiger"].follow(group="mine"))


@pytest.fixture(scope="module")
def uploaded_run(finished_root, s3):
    with pytest.MonkeyPatch.context() as environment:
        target = to_path(new_bucket(s3, environment))
        yield upload_run(RunFolder.open(finished_root / "lyso" / "1"), target).target


class TestObjectStore(TestRunFolder):
    """A copy behind a URL, read by ranges."""

    @pytest.fixture
    def opened(self, uploaded_run):
        return Opened(open_run(uploaded_run), uploaded_run, lambda: None)


SCRIPT = """
import hashlib, json, sys
from streaming.retrieval import open_run
run = open_run(sys.argv[1])
digest = hashlib.sha256()
for frame in run["eiger"].follow():
    digest.update(frame.frame_index.to_bytes(8, "big") + frame.data.tobytes() + json.dumps(frame.meta).encode())
print(digest.hexdigest(), len(run["eiger"]), run.state)
"""


def test_same_script_same_frames(tmp_path, bucket):
    """Ten lines, unchanged: before the run's end, after it, with the service gone, and on an object store."""
    with fed(tmp_path, is_finished=False) as opened:
        live = subprocess.Popen([sys.executable, "-c", SCRIPT, opened.target], stdout=subprocess.PIPE, text=True)
        time.sleep(0.2)
        opened.finish()
        said = [live.communicate(timeout=30)[0]]
        said.append(subprocess.check_output([sys.executable, "-c", SCRIPT, opened.target], text=True))
    folder = tmp_path / "lyso" / "1"
    said.append(subprocess.check_output([sys.executable, "-c", SCRIPT, str(folder)], text=True))
    target = upload_run(RunFolder.open(folder), to_path(bucket)).target
    said.append(subprocess.check_output([sys.executable, "-c", SCRIPT, target], text=True))
    assert said[0].endswith(f" {N} incomplete\n")
    assert len(set(said)) == 1, json.dumps(said)
