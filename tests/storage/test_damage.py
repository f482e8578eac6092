"""A run folder that somebody damaged says which file it is; what is whole is still read."""

import time

import pytest

from storage.errors import CorruptFrame, DamagedFile, NearlineError
from storage.run_folder import RunFolder
from storage.stream_source import FolderSource
from storage.stream_store import StreamStore

from .stores import frame_of, new_store, put

GARBAGE = {
    "gone": None,
    "empty": b"",
    "text": b"not what it was",
    "other json": b'{"a": 1}',
    "cut": lambda content: content[: len(content) // 2],
}


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    """Two sealed chunks of a finished stream."""
    store = new_store(tmp_path)
    put(store, *range(8))
    store.finish(0, "end")
    store.close()
    return store.folder


def damage(path, how: str) -> None:
    content = GARBAGE[how]
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content(path.read_bytes()) if callable(content) else content)


@pytest.mark.parametrize("how", GARBAGE)
@pytest.mark.parametrize("name", ["shard", "frame table"])
def test_damaged_chunk_is_named_and_others_are_read(folder, name, how):
    paths = folder.stream("eiger")
    path = paths.shard(0, 2) if name == "shard" else paths.frame_table(0)
    damage(path, how)
    source = FolderSource(folder, "eiger")
    with pytest.raises(CorruptFrame, match=path.name):
        source.read_one(1)
    with pytest.raises(CorruptFrame, match=path.name):
        source.read(0, 8)
    assert [f.info.frame_index for f in source.read(4, 8)] == [4, 5, 6, 7]
    if name == "frame table":
        with pytest.raises(CorruptFrame, match=path.name):
            list(source.infos(0, 8))
    assert len(list(source.infos(4, 8))) == 4


@pytest.mark.parametrize("how", [how for how in GARBAGE if how != "gone"])
@pytest.mark.parametrize("what", ["header", "commit", "event"])
def test_damaged_fact_is_named(folder, what, how):
    paths = folder.stream("eiger")
    path = {
        "header": paths.header,
        "commit": paths.commit(1),
        "event": next((folder.path / "events").glob("*-stream_finished.json")),
    }[what]
    damage(path, how)
    with pytest.raises(DamagedFile, match=path.name):
        FolderSource(folder, "eiger")
    with pytest.raises(NearlineError, match=path.name):
        StreamStore.recover(folder, "eiger")


def test_recovery_goes_on_without_a_frame_table(folder, caplog):
    """An open stream of which one table is damaged: what can be stored is stored."""
    (next((folder.path / "events").glob("*-stream_finished.json"))).unlink()
    damage(folder.stream("eiger").frame_table(0), "text")
    store = StreamStore.recover(folder, "eiger")
    assert "00000.parquet is gone or damaged" in caplog.text
    put(store, 8)
    assert store.finish(0, "end")[0].n_frames == 1


def test_open_journal_is_read_once(tmp_path, monkeypatch):
    """A reader of a live run reads headers, not pixels, and each of them once."""
    store = new_store(tmp_path, frames_per_chunk=1000)
    put(store, *range(300))
    n_bytes, real = [], __import__("os").pread

    def counting(fd, n, at):
        n_bytes.append(n)
        return real(fd, n, at)

    monkeypatch.setattr("os.pread", counting)
    source = FolderSource(store.folder, "eiger")
    stored = sum(info.size_bytes for info in store.infos(0, 300))
    assert sum(n_bytes) < stored / 5
    n_bytes.clear()
    put(store, 300)
    assert source.status().announced == 301
    assert sum(n_bytes) < 1000
    store.close()
    n_bytes.clear()
    assert FolderSource(store.folder, "eiger").states.announced == 301
    assert sum(n_bytes) > stored, "after a crash only the checksums tell what is whole"


def test_look_at_a_long_journal_is_quick(tmp_path):
    store = new_store(tmp_path, frames_per_chunk=50_000, kind="table", shape=(), dtype="", codec="raw")
    store.append_many([frame_of(store, index) for index in range(20_000)])
    source = FolderSource(store.folder, "eiger")
    started = time.perf_counter()
    for index in range(20_000, 20_020):
        put(store, index)
        assert source.status().announced == index + 1
    assert (time.perf_counter() - started) / 20 < 0.05
