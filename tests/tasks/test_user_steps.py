"""What a user's function may return, and what becomes of it in tables and streams."""

from datetime import UTC, datetime

import numpy as np
import pytest

from flows.run_processing import ProcessRequest, run_processing
from storage.errors import BadRecipe
from storage.frame import FrameInfo, RawFrame, blob_crc32c, blob_digest
from storage.models import RunHeader, StreamHeader
from storage.run_folder import ChunkCommit, RunFolder
from storage.stream_store import StreamStore
from streaming.retrieval import open_run
from tasks.chunk_frames import ChunkFrames
from tasks.process_chunk import plan_steps
from tasks.recipe import load_recipe
from tasks.user_steps import user_step

N_FRAMES, CHUNK = 6, 4


def profiles(chunk: ChunkFrames, scale: float = 1.0) -> dict:
    """A profile a frame with one value that is not there, and a row for each pixel above 2."""
    data = np.array([chunk.data(i) for i in range(len(chunk))], float)
    frame, pixel = np.nonzero(data > 2)
    profile = scale * data
    profile[:, 0] = np.nan
    return {
        "total": data.sum(axis=1),
        "profile": profile,
        "bright": {"frame_index": chunk.frame_index[frame], "pixel": pixel, "pair": np.stack([pixel, pixel + 1], 1)},
    }


def reads_profile(chunk: ChunkFrames) -> dict:
    """What a later step sees of an earlier one's arrays."""
    return {"profile_sum": np.array([np.nansum(row) for row in chunk.columns["profile"]])}


def returns(chunk: ChunkFrames, what: str) -> dict:
    return BAD[what][0]


BAD = {
    "scalar": ({"a": 1.0}, r"shape \(\) for 2 rows"),
    "too few": ({"a": [1.0]}, r"shape \(1,\) for 2 rows"),
    "three axes": ({"a": np.zeros((2, 3, 4))}, r"shape \(2, 3, 4\)"),
    "empty arrays": ({"a": np.zeros((2, 0))}, r"shape \(2, 0\)"),
    "objects": ({"a": [object(), object()]}, "of object"),
    "arrays of text": ({"a": [["x"], ["y"]]}, "arrays of numbers"),
    "frame_index": ({"frame_index": [0, 1]}, "leave it to us"),
    "table of ours": ({"frames": {"frame_index": [0]}}, "under a name of ours"),
    "table without index": ({"spots": {"x": [1.0]}}, "without a frame_index"),
    "table with falling index": ({"spots": {"frame_index": [1, 0]}}, "falls"),
    "table of other frames": ({"spots": {"frame_index": [7]}}, "no frame of the chunk"),
    "table with unequal columns": ({"spots": {"frame_index": [0, 1], "x": [1.0]}}, r"shape \(1,\) for 2 rows"),
    "no dict": ([1, 2], "returned a list"),
}


def header() -> StreamHeader:
    return StreamHeader(
        experiment="own", run=1, data_source="probe", shape=(3,), dtype="uint16", codec="raw", frames_per_chunk=CHUNK
    )


def frame(index: int) -> RawFrame:
    blob = np.array([index, 2, 4], "<u2").tobytes()
    info = FrameInfo(frame_index=index, size_bytes=len(blob), crc32c=blob_crc32c(blob), digest=blob_digest(blob))
    return RawFrame(info, blob)


def chunk(n_frames: int) -> ChunkFrames:
    return ChunkFrames([frame(i) for i in range(n_frames)], header(), np.zeros(3, np.uint8), "digest")


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_table_is_refused_with_its_reason(what):
    with pytest.raises(BadRecipe, match=BAD[what][1]):
        user_step(f"{__name__}:returns").run(chunk(2), {"what": what}, None, {})


def test_a_chunk_without_frames_agrees_with_any_other():
    tables = user_step(f"{__name__}:returns_nothing").run(chunk(0), {}, None, {})
    assert {name: str(tables["frames"].schema.field(name).type) for name in ("total", "profile")} == {
        "total": "null", "profile": "null",
    }  # fmt: skip


def returns_nothing(chunk: ChunkFrames) -> dict:
    return {"total": np.array([]), "profile": np.array([])}


def test_what_the_header_says_belongs_to_the_key_of_a_step_of_ones_own():
    """The references of a fit may be there, and other ones must not find the results of these. Ours do not."""
    recipe = load_recipe({"steps": [{"use": "bin", "params": {"factor": 2}}, {"use": f"{__name__}:profiles"}]})
    commit = ChunkCommit.model_construct(digest="chunk")
    of_image = header().model_copy(update={"shape": (4, 6)})

    def digests(**user_data) -> list[str]:
        plan = plan_steps(recipe, commit, of_image.model_copy(update={"user_data": user_data}), np.zeros((4, 6), "u1"))
        return [one.digest for one in plan]

    (bin_a, own_a), (bin_b, own_b) = digests(reference=[1, 2]), digests(reference=[1, 3])
    assert (bin_a == bin_b, own_a == own_b) == (True, False)
    assert digests(reference=[1, 2]) == [bin_a, own_a]


@pytest.fixture
def run(tmp_path):
    """A finished run of frames with three pixels."""
    folder = RunFolder.create(tmp_path, RunHeader(experiment="own", run=1, started_at=datetime.now(UTC)))
    store = StreamStore.create(folder, header())
    for index in range(N_FRAMES):
        raw = frame(index)
        store.append(raw.info, raw.blob)
    store.seal_complete()
    store.finish(N_FRAMES, "never sent")
    store.close()
    return open_run(folder.path)


def test_arrays_and_tables_go_all_the_way(run):
    module = __name__
    steps = [{"use": f"{module}:profiles", "params": {"scale": 2.0}}, {"use": f"{module}:reads_profile"}]
    recipe = {"steps": steps, "export": {"nexus": "none", "crystfel": False}}
    run_processing(ProcessRequest(run=str(run.folder), recipe=recipe, n_threads=1))

    processing, rows = run.processings["p1"], list(run["probe.results@p1"])
    assert processing.frames["profile"].to_pylist() == [[None, 4.0, 8.0]] * N_FRAMES
    assert processing.frames["profile_sum"].to_pylist() == [12.0] * N_FRAMES
    assert [row.meta["profile"] for row in rows] == [[None, 4.0, 8.0]] * N_FRAMES
    bright = processing.table("bright")
    # Pixel 0 holds the index, so it is bright from frame 3 on; pixel 2 always is.
    assert bright["frame_index"].to_pylist() == [0, 1, 2, 3, 3, 4, 4, 5, 5]
    assert bright["pair"].to_pylist()[-2:] == [[0, 1], [2, 3]]

    found = run["probe"].where("total > 9 AND profile_sum = 12", columns=["total", "profile"])
    assert found.table.to_pylist() == [
        {"frame_index": i, "total": 6.0 + i, "profile": [None, 4.0, 8.0]} for i in (4, 5)
    ]
