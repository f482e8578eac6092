"""The commands that look after runs."""

import json
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from storage.catalog import Catalog, default_url
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


def test_delete_asks_and_records_why(folder, tmp_path):
    root = tmp_path / "data"
    nearline("catalog", "rebuild", "--root", str(root))
    refused = subprocess.run(
        [sys.executable, "-m", "nearline.cli", "delete", "lyso/1", "--root", str(root)],
        input="n\n", capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert refused.returncode == 1
    assert "there is no copy" in refused.stderr
    assert folder.state == "incomplete"
    done = nearline("delete", "lyso/1", "--root", str(root), "--yes", "--why", "wrong sample", "--json")
    assert json.loads(done.stdout)["n_files"] > 3
    assert next(folder.events("run_deleted")).payload["why"] == "wrong sample"
    catalog = Catalog(default_url(root))
    assert [row.state for row in catalog.runs()] == ["deleted"]
    catalog.close()
    assert "run lyso/1 is deleted" in nearline("ledger", str(folder.path)).stdout


def test_delete_refuses_a_live_run(tmp_path):
    folder = RunFolder.create(tmp_path, RunHeader(experiment="lyso", run=1, started_at=datetime.now(UTC)))
    store = StreamStore.create(folder, new_header())
    put(store, 0)
    done = nearline("delete", str(folder.path), "--yes")
    assert (done.returncode, "is live" in done.stderr) == (1, True)
    store.close()


def test_retain(tmp_path):
    for run in (1, 2, 3):
        finished_run(tmp_path, run)
    root = ("--root", str(tmp_path))
    dry = nearline("retain", *root, "--keep-last", "1", "--dry-run", "--json")
    assert json.loads(dry.stdout)["selected"] == ["lyso/1", "lyso/2"]
    assert json.loads(nearline("retain", *root, "--older-than", "1h", "--json").stdout)["selected"] == []
    done = nearline("retain", *root, "--keep-last", "1")
    assert (done.returncode, done.stdout.count("deleted")) == (0, 2)
    assert [RunFolder.open(tmp_path / "lyso" / str(n)).state for n in (1, 2, 3)] == ["deleted", "deleted", "incomplete"]


@pytest.mark.parametrize("options", [[], ["--older-than", "soon"], ["--keep-last", "-1"]])
def test_retain_needs_a_rule_it_understands(tmp_path, options):
    finished_run(tmp_path)
    done = nearline("retain", "--root", str(tmp_path), *options)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert RunFolder.open(tmp_path / "lyso" / "1").state == "incomplete"


def test_verify(folder):
    sound = nearline("verify", str(folder.path), COLUMNS="200")
    assert (sound.returncode, "sound" in sound.stdout, "frame 6 missing: lost" in sound.stdout) == (0, True, True)
    shard = folder.stream("eiger").shard(0, 2)
    content = bytearray(shard.read_bytes())
    content[2000] ^= 1
    shard.write_bytes(bytes(content))
    damaged = nearline("verify", "lyso/1", "--root", str(folder.path.parent.parent), "--json")
    report = json.loads(damaged.stdout)
    assert (damaged.returncode, report["is_sound"]) == (2, False)
    assert [(f["file"], f["frame"]) for f in report["findings"]] == [("eiger.zarr/data/c/0/0/0", 0)]
    assert "restore" in nearline("verify", str(folder.path), COLUMNS="200").stdout


def test_verify_of_a_run_without_header_is_a_report(folder):
    (folder.path / "run.json").unlink()
    done = nearline("verify", str(folder.path), "--json")
    assert (done.returncode, json.loads(done.stdout)["findings"][0]["file"]) == (2, "run.json")


def test_verify_of_nothing_is_refused(tmp_path):
    done = nearline("verify", str(tmp_path / "nowhere"))
    assert (done.returncode, "no run in" in done.stderr, "Traceback" in done.stderr) == (1, True, False)
