"""The catalog is an index: rebuilt from the folders it says the same."""

import pytest

from storage.catalog import Catalog, default_url

from .stores import new_folder, new_header, put
from .test_stream_store import StreamStore


@pytest.fixture
def catalog(tmp_path):
    catalog = Catalog(default_url(tmp_path))
    yield catalog
    catalog.close()


def rows(catalog: Catalog) -> tuple[list, list]:
    runs = [row.model_dump() for row in catalog.runs()]
    return runs, [s.model_dump() for r in runs for s in catalog.streams(r["experiment"], r["run"])]


def make_runs(root, catalog) -> None:
    for number in (1, 2, 10):
        folder = new_folder(root, number)
        for name in ("eiger", "eiger.threshold_2"):
            store = StreamStore.create(folder, new_header(run=number, data_source=name, planned=9))
            put(store, *range(number % 3 + 1))
            store.finish(0, "end")
            store.close()
        folder.add_event("run_finished", {"state": "incomplete"})
        catalog.record(folder, {"eiger": number % 3 + 1})


def test_rebuild_gives_the_same_rows(tmp_path, catalog):
    make_runs(tmp_path, catalog)
    before = rows(catalog)
    assert [r["run"] for r in before[0]] == [1, 2, 10]
    assert {r["state"] for r in before[0]} == {"incomplete"}
    assert [s["announced"] for s in before[1]] == [2, 2, 3, 3, 2, 2]
    assert catalog.rebuild(tmp_path) == 3
    assert rows(catalog) == before


def test_rebuild_goes_on_past_a_damaged_run(tmp_path, catalog, caplog):
    make_runs(tmp_path, catalog)
    (tmp_path / "lyso" / "2" / "run.json").write_text("{ not a header")
    assert catalog.rebuild(tmp_path) == 2
    assert "2/run.json is not a run header" in caplog.text


def test_one_experiment_only(tmp_path, catalog):
    make_runs(tmp_path, catalog)
    assert len(catalog.runs("lyso")) == 3
    assert catalog.runs("other") == []
