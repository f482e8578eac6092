"""A run on an object store is read as in a folder."""

import fsspec
import numpy as np
import pytest
import zarr

import nearline
import storage.zarr_codec  # noqa: F401
from storage.errors import CorruptFrame, PlaceUnavailable, RunNotFound
from storage.files import file_sizes, is_local, publish, publish_copy, remove, replace, to_path
from storage.run_folder import RunFolder
from storage.shard import ShardReader

from .stores import SHAPE, new_folder, new_header, pixels, put
from .test_stream_store import StreamStore

MASK = (np.arange(SHAPE[0] * SHAPE[1]) % 11 == 0).astype(np.uint32).reshape(SHAPE)
PLACES = ["folder", "memory", "s3"]


@pytest.fixture(params=PLACES)
def place(request, tmp_path):
    if request.param == "s3":
        return to_path(request.getfixturevalue("bucket") + "/a/b")
    return to_path(tmp_path / "a" if request.param == "folder" else f"memory://{tmp_path.name}/a")


@pytest.mark.parametrize(
    ("text", "local"), [("data/17", True), ("file:///data/17", True), ("s3://b/17", False), ("memory://b", False)]
)
def test_a_url_is_a_path(text, local):
    assert is_local(to_path(text)) is local
    assert is_local(to_path(to_path(text))) is local
    assert str(to_path(text) / "x").endswith("/x")


class TestPublishing:
    def test_never_replaces(self, place):
        assert publish(place / "x.json", b"first")
        assert not publish(place / "x.json", b"second")
        assert (place / "x.json").read_bytes() == b"first"

    def test_copy_never_replaces(self, place, tmp_path):
        source = tmp_path / "source"
        source.write_bytes(b"first")
        assert publish_copy(source, place / "x" / "y")
        source.write_bytes(b"second")
        assert not publish_copy(source, place / "x" / "y")
        assert (place / "x" / "y").read_bytes() == b"first"

    def test_large_copy_goes_in_parts_and_never_replaces(self, place, tmp_path):
        source = tmp_path / "source"
        content = np.random.default_rng(1).bytes((40 << 20) + 1)
        source.write_bytes(content)
        assert [publish_copy(source, place / "x"), publish_copy(source, place / "x")] == [True, False]
        assert (place / "x").read_bytes() == content

    def test_replaces_sizes_and_removes(self, place):
        publish(place / "x.json", b"first")
        replace(place / "x.json", b"second")
        publish(place / "y" / "z", b"")
        assert file_sizes(place) == {"x.json": 6, "y/z": 0}
        remove(place / "y")
        remove(place / "y")
        assert file_sizes(place) == {"x.json": 6}
        remove(place)
        assert file_sizes(place) == {}


def copied(folder: RunFolder, target: str) -> RunFolder:
    """The run's files at a URL, put there by somebody else's tool."""
    fs, key = fsspec.core.url_to_fs(target)
    for name in file_sizes(folder.path):
        fs.pipe_file(f"{key}/{name}", (folder.path / name).read_bytes())
    return RunFolder.open(target)


def finished_run(root, **options) -> RunFolder:
    folder = new_folder(root)
    store = StreamStore.create(folder, new_header(**options), pixel_mask=MASK)
    put(store, 0, 1, 2, 4, 5, 6, 7, 8)
    store.finish(10, "lost")
    store.close()
    folder.add_event("run_finished", {"state": "incomplete"})
    return folder


@pytest.fixture(params=["memory", "s3"])
def remote(request, tmp_path):
    url = request.getfixturevalue("bucket") if request.param == "s3" else f"memory://{tmp_path.name}"
    return copied(finished_run(tmp_path), f"{url}/lyso/1")


class TestShard:
    def test_one_and_many(self, remote):
        reader = ShardReader(remote.stream("eiger").shard(1, 2), 4, 4)
        one = [reader.read(i) for i in (4, 5, 6, 7)]
        assert reader.read_many([4, 5, 6, 7]) == one
        assert reader.read_many([7, 4]) == [one[3], one[0]]
        assert reader.read_many([]) == []

    def test_hole(self, remote):
        reader = ShardReader(remote.stream("eiger").shard(0, 2), 0, 4)
        assert [i in reader for i in range(5)] == [True, True, True, False, False]
        with pytest.raises(KeyError):
            reader.read_many([2, 3])

    @pytest.mark.parametrize("part", ["index", "frame"])
    def test_damage_is_named(self, remote, part):
        path = remote.stream("eiger").shard(0, 2)
        content = bytearray(path.read_bytes())
        content[-10 if part == "index" else 3000] ^= 1
        path.write_bytes(bytes(content))
        with pytest.raises(CorruptFrame, match=r"eiger\.zarr/data/c/0/0/0"):
            ShardReader(path, 0, 4).read_many([0, 1, 2])

    def test_cut_object(self, remote):
        path = remote.stream("eiger").shard(0, 2)
        reader = ShardReader(path, 0, 4)
        path.write_bytes(path.read_bytes()[:100])
        with pytest.raises(CorruptFrame, match="was cut or damaged"):
            reader.read(2)

    @pytest.mark.parametrize(
        ("order", "requests"), [([0, 1, 2], 2), ([2, 0], 2), ([1, 2, 0, 1, 2], 4), ([0, 0, 0], 3)], ids=str
    )
    def test_frames_in_order_come_together(self, remote, monkeypatch, order, requests):
        reader = ShardReader(remote.stream("eiger").shard(0, 2), 0, 4)
        expected = reader.read_many([0, 1, 2])
        fs, asked = reader.path.fs, []
        ranges = fs.cat_ranges
        monkeypatch.setattr(fs, "cat_ranges", lambda *a, **k: asked.append(len(a[0])) or ranges(*a, **k))
        assert [reader.read(i) for i in order] == [expected[i] for i in order]
        assert asked == [1] * requests

    def test_a_damaged_frame_ahead_costs_no_other(self, remote):
        path = remote.stream("eiger").shard(1, 2)
        content = bytearray(path.read_bytes())
        content[-5000] ^= 1
        path.write_bytes(bytes(content))
        reader = ShardReader(path, 4, 4)
        assert [len(reader.read(i)) > 0 for i in (4, 5, 6)] == [True] * 3
        with pytest.raises(CorruptFrame, match="frame 7"):
            reader.read(7)


def requests_to_open(folder: RunFolder) -> list[str]:
    """What is asked of the store until a run's commits are known."""
    fs, asked = folder.path.fs, []

    def counted(name: str, method):
        return lambda *a, **k: asked.append(name) or method(*a, **k)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("cat", "cat_file", "open", "ls", "find", "info", "exists"):
            patch.setattr(fs, name, counted(name, getattr(fs, name)))
        assert nearline.open(str(folder.path))["eiger"].status.n_sealed == len(folder.stream("eiger").commits())
    return asked


def test_opening_asks_no_more_for_more_chunks(bucket, tmp_path):
    """A request for each commit would take minutes for a long run."""
    runs = {n: finished_run(tmp_path / str(n), frames_per_chunk=n) for n in (8, 1)}
    asked = [requests_to_open(copied(run, f"{bucket}/{n}/lyso/1")) for n, run in runs.items()]
    assert len(asked[0]) == len(asked[1]) > 0


def test_same_api_as_a_folder(remote):
    run = nearline.open(str(remote.path))
    eiger = run["eiger"]
    assert [f.frame_index for f in eiger.follow()] == [0, 1, 2, 4, 5, 6, 7, 8]
    assert np.array_equal(eiger[5].data, pixels(5))
    assert eiger[5].meta == {"delay": 0.5}
    assert np.array_equal(eiger.array[6], pixels(6))
    assert np.array_equal(eiger.pixel_mask, MASK)
    assert [c.commit.chunk for c in eiger.chunks()] == [0, 1, 2]
    assert eiger.ledger().missing == 2
    assert run.state == "incomplete"
    assert run.processings == {}


def test_data_folder_by_url(bucket, tmp_path):
    copied(finished_run(tmp_path), f"{bucket}/beamline/lyso/1")
    assert nearline.open("lyso/1", root=f"{bucket}/beamline").name == "lyso/1"


def test_plain_zarr_reads_it(bucket, tmp_path):
    folder = copied(finished_run(tmp_path), f"{bucket}/lyso/1")
    group = zarr.open_group(f"{folder.path}/eiger.zarr", mode="r")
    assert group["data"].shape == (10, *SHAPE)
    assert np.array_equal(group["data"][5], pixels(5))


def test_no_run_there(bucket):
    with pytest.raises(RunNotFound, match=f"no run in {bucket}/lyso/3"):
        nearline.open(f"{bucket}/lyso/3")


def test_no_server_there(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nobody")
    options = {"endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"retries": {"total_max_attempts": 1}}}
    from upath import UPath

    with pytest.raises(PlaceUnavailable, match="s3://bucket/lyso/3 cannot be reached"):
        nearline.open(UPath("s3://bucket/lyso/3", **options))
