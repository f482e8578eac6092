"""The catalog is an index: rebuilt from the folders it says the same, whichever database keeps it."""

import shutil
import signal
import subprocess
import sys
import threading
import time
from datetime import UTC

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import SQLAlchemyError

from storage import sql
from storage.catalog import Catalog, CatalogWriter, default_url
from storage.errors import DamagedFile

from ..servers import PostgresServer
from .stores import new_folder, new_header, put
from .test_stream_store import StreamStore


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        yield default_url(tmp_path)
        return
    server: PostgresServer = request.getfixturevalue("postgres")
    engine = create_engine(server.url)
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()
    yield server.url


@pytest.fixture
def catalog(url):
    catalog = Catalog(url)
    yield catalog
    catalog.close()


def rows(catalog: Catalog) -> tuple[list, list]:
    runs = [row.model_dump() for row in catalog.runs()]
    return runs, [s.model_dump() for r in runs for s in catalog.streams(r["experiment"], r["run"])]


def make_run(root, number: int, n_frames: int = 2):
    folder = new_folder(root, number)
    for name in ("eiger", "eiger.threshold_2"):
        store = StreamStore.create(folder, new_header(run=number, data_source=name, planned=9))
        put(store, *range(n_frames))
        store.finish(0, "end")
        store.close()
    folder.add_event("run_finished", {"state": "incomplete"})
    return folder


def make_runs(root, catalog) -> None:
    for number in (1, 2, 10):
        folder = make_run(root, number, number % 3 + 1)
        catalog.record(folder, {"eiger": number % 3 + 1})


def test_rebuild_gives_the_same_rows(tmp_path, catalog):
    make_runs(tmp_path, catalog)
    before = rows(catalog)
    assert [r["run"] for r in before[0]] == [1, 2, 10]
    assert {r["state"] for r in before[0]} == {"incomplete"}
    assert {r["started_at"].tzinfo for r in before[0]} == {UTC}
    assert [s["announced"] for s in before[1]] == [2, 2, 3, 3, 2, 2]
    for _ in range(2):
        assert catalog.rebuild(tmp_path).n_runs == 3
        assert rows(catalog) == before


def test_rebuild_forgets_what_is_gone_and_leaves_other_folders(tmp_path, catalog):
    make_runs(tmp_path / "ours", catalog)
    other = make_run(tmp_path / "theirs", 77)
    catalog.record(other)
    shutil.rmtree(tmp_path / "ours" / "lyso" / "2")
    assert catalog.rebuild(tmp_path / "ours").n_runs == 2
    assert [row.run for row in catalog.runs()] == [1, 10, 77]
    assert catalog.streams("lyso", 2) == []


def _cut(path):
    path.write_bytes(path.read_bytes()[:40])


DAMAGE = {
    "run header": (lambda run: _cut(run / "run.json"), "2/run.json", [1, 10], 4),
    "not JSON": (lambda run: (run / "run.json").write_bytes(b"\xff\xfe"), "2/run.json", [1, 10], 4),
    "folder instead": (lambda run: _folder_instead(run / "run.json"), "2/run.json", [1, 10], 4),
    "end of the run": (lambda run: _cut(next(run.glob("events/*run_fin*"))), "run_finished.json", [1, 10], 4),
    "stream header": (lambda run: _cut(run / "eiger.stream.json"), "eiger.stream.json", [1, 2, 10], 5),
    "commit": (lambda run: _no_end_and_cut(run), "eiger.chunks/00000.json", [1, 2, 10], 5),
    "copied folder": (lambda run: shutil.copytree(run, run.parent / "3"), "holds the run lyso/2", [1, 2, 10], 6),
    "foreign folder": (lambda run: (run.parent / "notes" / "a").mkdir(parents=True), "", [1, 2, 10], 6),
    "foreign file": (lambda run: (run.parent / "99").write_text("?"), "", [1, 2, 10], 6),
}


def _folder_instead(path):
    path.unlink()
    path.mkdir()


def _no_end_and_cut(run):
    for event in run.glob("events/*stream_finished*"):
        event.unlink()
    _cut(run / "eiger.chunks" / "00000.json")


@pytest.mark.parametrize(("damage", "named", "left", "n_streams"), DAMAGE.values(), ids=DAMAGE)
def test_rebuild_names_what_it_cannot_read_and_goes_on(tmp_path, catalog, damage, named, left, n_streams):
    make_runs(tmp_path, catalog)
    damage(tmp_path / "lyso" / "2")
    rebuilt = catalog.rebuild(tmp_path)
    assert [row.run for row in catalog.runs()] == left
    assert len(rows(catalog)[1]) == n_streams
    assert rebuilt.n_runs == len(left)
    assert [named in why for why in rebuilt.left_out] == ([True] if named else [])


def test_one_experiment_only(tmp_path, catalog):
    make_runs(tmp_path, catalog)
    assert len(catalog.runs("lyso")) == 3
    assert catalog.runs("other") == []


def test_record_of_a_damaged_run_is_refused(tmp_path, catalog):
    folder = make_run(tmp_path, 1)
    _cut(folder.path / "eiger.stream.json")
    with pytest.raises(DamagedFile, match=r"eiger\.stream\.json"):
        catalog.record(folder)


RECORD = """
import sys
from pathlib import Path
from storage.catalog import Catalog
from storage.run_folder import find_runs
catalog = Catalog(sys.argv[1])
folders = list(find_runs(Path(sys.argv[2])))
for turn in range(20):
    for folder in folders if turn % 2 else folders[::-1]:
        catalog.record(folder, {"eiger": turn})
"""


def test_many_services_write_the_same_runs_at_once(tmp_path, catalog, url):
    for number in (1, 2):
        make_run(tmp_path, number)
    writers = [
        subprocess.Popen([sys.executable, "-c", RECORD, url, str(tmp_path)], stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    failed = [errors for w in writers for errors in [w.communicate(timeout=120)[1]] if w.returncode]
    assert failed == []
    assert [s["announced"] for s in rows(catalog)[1]] == [19, 2, 19, 2]


# ---- the writer that waits for nobody -----------------------------------------------------------


@pytest.fixture
def writer(catalog):
    writer = CatalogWriter(catalog)
    yield writer
    writer.close()


def test_writer_brings_the_catalog_up_to_date(tmp_path, catalog, writer):
    folder = make_run(tmp_path, 1)
    for announced in range(100):
        writer.record(folder, {"eiger": announced})
    assert writer.flush(20)
    assert writer.status()["behind"] == 0
    assert [s["announced"] for s in rows(catalog)[1]] == [99, 2]


class _Slow(Catalog):
    """A database that takes its time, and counts."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.may_go, self.n_records = threading.Event(), 0

    def record(self, folder, announced=None):
        assert self.may_go.wait(20)
        self.n_records += 1
        super().record(folder, announced)


def test_a_hanging_database_holds_up_nobody(tmp_path, url):
    slow = _Slow(url)
    writer = CatalogWriter(slow)
    folders = [make_run(tmp_path, n) for n in (1, 2, 3)]
    started = time.monotonic()
    for turn in range(1000):
        for folder in folders:
            writer.record(folder, {"eiger": turn})
    assert time.monotonic() - started < 2
    assert writer.status()["behind"] in (3, 4)
    assert not writer.flush(0.05)
    slow.may_go.set()
    assert writer.close(20)
    assert slow.n_records <= 5, "records of one run that wait are one"
    assert [s["announced"] for s in rows(slow)[1]] == [999, 2] * 3
    slow.close()


def test_closing_does_not_wait_for_a_hanging_database(tmp_path, url):
    slow = _Slow(url)
    writer = CatalogWriter(slow)
    writer.record(make_run(tmp_path, 1))
    started = time.monotonic()
    assert not writer.close(0.1)
    assert time.monotonic() - started < 2
    slow.may_go.set()
    assert writer.close(20)
    slow.close()


def test_an_absent_server_is_caught_up_with(tmp_path, postgres, caplog):
    catalog = Catalog(postgres.url)
    writer = CatalogWriter(catalog)
    writer.record(make_run(tmp_path, 1))
    assert writer.flush(20)
    postgres.stop()
    try:
        writer.record(make_run(tmp_path, 2))
        writer.record(make_run(tmp_path, 3))
        with pytest.raises(SQLAlchemyError):
            catalog.runs()
        while writer.status()["error"] is None:
            time.sleep(0.02)
        assert writer.status()["behind"] == 2
    finally:
        postgres.start()
    assert writer.close(60)
    assert {1, 2, 3} <= {row.run for row in catalog.runs()}
    assert writer.status()["error"] is None
    catalog.close()


def test_a_server_that_hangs_is_given_up_and_tried_again(tmp_path, postgres, caplog, monkeypatch):
    """It takes connections, and answers none: as with a stopped process, or a disk that is away."""
    monkeypatch.setattr(sql, "_CONNECT_TIMEOUT_S", 2)
    catalog = Catalog(postgres.url)
    writer = CatalogWriter(catalog)
    postgres.process.send_signal(signal.SIGSTOP)
    try:
        started = time.monotonic()
        writer.record(make_run(tmp_path, 1))
        assert not writer.flush(0.1)
        assert time.monotonic() - started < 2
        while writer.status()["error"] is None:
            time.sleep(0.05)
        assert "timeout" in writer.status()["error"]
    finally:
        postgres.process.send_signal(signal.SIGCONT)
    assert writer.close(60)
    assert 1 in {row.run for row in catalog.runs()}
    catalog.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_fault_of_ours_is_seen(tmp_path, catalog, monkeypatch):
    monkeypatch.setattr(catalog, "record", lambda *_: 1 // 0)
    writer = CatalogWriter(catalog)
    writer.record(make_run(tmp_path, 1))
    while "has stopped" not in (writer.status()["error"] or ""):
        time.sleep(0.01)
    assert not writer.close(0.1)


def test_a_damaged_run_does_not_hold_up_the_others(tmp_path, catalog, writer, caplog):
    damaged, good = make_run(tmp_path, 1), make_run(tmp_path, 2)
    _cut(damaged.path / "eiger.stream.json")
    writer.record(damaged)
    writer.record(good)
    assert writer.flush(20)
    assert [row.run for row in catalog.runs()] == [2]
    assert "eiger.stream.json is damaged" in caplog.text
