"""The commands that look after runs."""

import json
from datetime import UTC, datetime

import pytest

from storage.models import RunHeader
from storage.run_folder import RunFolder
from storage.stream_store import StreamStore

from ..storage.stores import new_header, put
from .test_cli import nearline


def finished_run(root, run: int = 1) -> RunFolder:
    folder = RunFolder.create(root, RunHeader(experiment="lyso", run=run, started_at=datetime.now(UTC)))
    store = StreamStore.create(folder, new_header(run=run))
    put(store, *range(6))
    store.finish(7, "lost")
    store.close()
    folder.add_event("run_finished", {"state": "incomplete"})
    return folder


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    return finished_run(tmp_path / "data")


def test_upload(folder, tmp_path):
    done = nearline("upload", str(folder.path), str(tmp_path / "copy"), "--json")
    summary = json.loads(done.stdout)
    assert summary["n_files"] > 8
    assert RunFolder.open(tmp_path / "copy" / "lyso" / "1").state == "incomplete"
    again = nearline("upload", "lyso/1", str(tmp_path / "copy"), "--root", str(tmp_path / "data"))
    assert again.returncode == 0
    assert "0 files, 0.0 MB sent" in again.stdout


def test_upload_of_no_run_is_refused(tmp_path):
    done = nearline("upload", "lyso/9", str(tmp_path / "copy"), "--root", str(tmp_path))
    assert (done.returncode, "no run in" in done.stderr, "Traceback" in done.stderr) == (1, True, False)
