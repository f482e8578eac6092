"""A recipe on each frame as it is stored: rows within milliseconds, and the same numbers as afterwards."""

import threading

import numpy as np
import pytest

import nearline
from storage.errors import GroupNeedsService
from storage.models import StreamHeader
from streaming.service import Service, ServiceSettings
from tasks.chunk_frames import ChunkFrames

N_FRAMES = 12
RECIPE = {"steps": [{"use": f"{__name__}:brightness"}], "export": {"nexus": "none", "crystfel": False}}


def brightness(chunk: ChunkFrames) -> dict:
    """Mean of each frame; refuses one that is all zero."""
    data = np.array([chunk.data(i) for i in range(len(chunk))], float)
    if not data.any(axis=1).all():
        raise ValueError("dark")
    return {"brightness": data.mean(axis=1), "spread": np.where(data.std(axis=1) > 0, 1.0, np.nan)}


class Counts:
    """Decides by how much it has seen."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def __call__(self, frame, columns):
        self.seen.append(frame.frame_index)
        return {"n_seen": len(self.seen), "go": frame.meta["go"]}


@pytest.fixture
def service(tmp_path, monkeypatch):
    with Service(ServiceSettings(root=tmp_path, bind="tcp://127.0.0.1:*", sources=())) as running:
        monkeypatch.setenv("NEARLINE_SERVICE", running.address)
        yield running


def begun(out) -> None:
    out.start(
        StreamHeader(
            experiment="live", run=out.run, data_source="cam", shape=(4,), dtype="uint16", codec="raw",
            frames_per_chunk=5,
        )
    )  # fmt: skip


def in_background(done: dict, **options) -> threading.Thread:
    thread = threading.Thread(target=lambda: done.update(nearline.process_live("live/1", RECIPE, **options)))
    thread.start()
    return thread


def send(out, index: int) -> None:
    out.send(np.arange(index + 1, index + 5, dtype=np.uint16), meta={"go": index % 2 == 0})


def test_each_frame_has_its_row_before_the_next_is_sent(service) -> None:
    done: dict = {}
    with nearline.producer("live", "cam") as producer, producer.run(1) as out:
        begun(out)
        worker = in_background(done, decide=Counts())
        run = nearline.open("live/1")
        while "cam.results@live" not in run:
            worker.join(0.02)
        rows = run["cam.results@live"].follow(timeout=20)
        for index in range(N_FRAMES):
            send(out, index)
            row = next(rows)
            assert (row.frame_index, row.meta["n_seen"], row.meta["go"]) == (index, index + 1, index % 2 == 0)
        assert [f.frame_index for f in run["cam"].where("brightness > 10")] == list(range(8, N_FRAMES))
    worker.join(20)
    assert done == {"stream": "cam.results@live", "frames": N_FRAMES, "failed": 0}
    assert run["cam.results@live"].ledger().is_balanced

    nearline.process("live/1", RECIPE, n_threads=1)
    again = run.processings["p1"].frames["brightness"].to_pylist()
    assert again == [row.meta["brightness"] for row in run["cam.results@live"]]


def test_a_follower_goes_on_where_the_one_before_it_ended(service) -> None:
    first, second = Counts(), Counts()
    stop = threading.Event()
    with nearline.producer("live", "cam") as producer, producer.run(1) as out:
        begun(out)
        worker = in_background({}, decide=first, stop=stop)
        for index in range(5):
            send(out, index)
        run = nearline.open("live/1")
        while "cam.results@live" not in run or len(run["cam.results@live"]) < 5:
            worker.join(0.02)
        stop.set()
        worker.join(20)
        done: dict = {}
        worker = in_background(done, decide=second)
        for index in range(5, N_FRAMES):
            send(out, index)
    worker.join(20)
    rows = list(run["cam.results@live"])
    assert second.seen == list(range(N_FRAMES)), "what was decided before is recalled first"
    assert [row.meta["n_seen"] for row in rows] == list(range(1, N_FRAMES + 1))
    assert done["frames"] == N_FRAMES - len(first.seen)
    assert not run["cam.results@live"].is_live


def test_a_frame_that_a_step_refuses_has_a_row_that_says_so(service) -> None:
    with nearline.producer("live", "cam") as producer, producer.run(1) as out:
        begun(out)
        out.send(np.zeros(4, np.uint16))
        out.send(np.ones(4, np.uint16), meta={"go": True})
    done = nearline.process_live("live/1", RECIPE, decide=Counts())
    assert (done["frames"], done["failed"]) == (2, 1)
    refused, good = (row.meta for row in nearline.open("live/1")["cam.results@live"])
    assert "dark" in refused["error"]
    assert good == {"brightness": 1.0, "spread": None, "n_seen": 1, "go": True}


def test_a_bare_folder_has_nothing_to_wait_for(service, tmp_path) -> None:
    with nearline.producer("live", "cam") as producer, producer.run(1) as out:
        begun(out)
        send(out, 0)
    with pytest.raises(GroupNeedsService, match=r"nearline\.process"):
        nearline.process_live(tmp_path / "live" / "1", RECIPE)
