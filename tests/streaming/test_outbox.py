"""The outbox: what has happened to runs is told once, in order, whatever dies or refuses meanwhile."""

import json
import shutil
from datetime import UTC, datetime
from pathlib import Path

from storage.models import RunHeader, StreamHeader
from storage.run_folder import RunFolder
from streaming.outbox import CHUNK_SEALED, RUN_FINISHED, RUN_STARTED, Outbox, OutboxReader, outbox_folder
from tests.streaming.harness import SHAPE, ServiceProcess, blob, producing, serving, status_of, wait_for

STORED = 6


def a_header(run: int, planned: int = STORED) -> StreamHeader:
    return StreamHeader(
        experiment="lyso",
        run=run,
        data_source="eiger",
        shape=SHAPE,
        dtype="uint16",
        frames_per_chunk=2,
        planned=planned,
    )


def take(address: str, run: int, n_frames: int = STORED) -> None:
    with producing(address, run) as out:
        out.start(a_header(run, n_frames))
        for index in range(n_frames):
            out.send(blob(index))
        out.finish()


def told(root: Path) -> list[tuple[int, str]]:
    return [(fact.run, fact.kind) for fact in OutboxReader(root).facts()]


def until_told(root: Path, run: int, kind: str) -> None:
    wait_for(lambda: (run, kind) in told(root))


def test_a_run_is_told_in_order(tmp_path):
    with serving(tmp_path) as service:
        take(service.address, 1)
        until_told(tmp_path, 1, RUN_FINISHED)
        facts = list(OutboxReader(tmp_path).facts())
        assert [f.kind for f in facts][:2] == [RUN_STARTED, CHUNK_SEALED]
        assert [f.kind for f in facts][-2:] == [CHUNK_SEALED, RUN_FINISHED]
        assert [f.number for f in facts] == list(range(1, len(facts) + 1))
        assert len({f.id for f in facts}) == len(facts)
        assert facts[-2].payload["stop"] == STORED, "the last chunk is always told"
        assert facts[0].payload["root"] == str(tmp_path)
        assert facts[0].payload["service"] == service.address
        assert facts[-1].payload["state"] == "completed"
        wait_for(lambda: status_of(service.address)["outbox"] == {"told": len(facts), "error": None})


def test_chunks_are_told_at_most_once_a_second(tmp_path):
    with serving(tmp_path) as service:
        take(service.address, 1, 80)
        until_told(tmp_path, 1, RUN_FINISHED)
    assert told(tmp_path).count((1, CHUNK_SEALED)) <= 4, "of 40 chunks in a second or two"


def test_a_killed_service_tells_of_the_runs_it_left(tmp_path):
    with ServiceProcess(tmp_path, idle_timeout_s=1) as first:
        with producing(first.address, 1) as out:
            out.start(a_header(1))
            out.send(blob(0))
            until_told(tmp_path, 1, RUN_STARTED)
            first.kill()
            before = [f.id for f in OutboxReader(tmp_path).facts()]
        with ServiceProcess(tmp_path, idle_timeout_s=1):
            until_told(tmp_path, 1, RUN_FINISHED)
    facts = list(OutboxReader(tmp_path).facts())
    assert [f.id for f in facts][: len(before)] == before
    assert told(tmp_path).count((1, RUN_FINISHED)) == told(tmp_path).count((1, RUN_STARTED)) == 1


def test_what_a_crash_kept_out_is_told_later_with_the_same_id(tmp_path):
    with serving(tmp_path) as service:
        take(service.address, 1)
        until_told(tmp_path, 1, RUN_FINISHED)
    (segment,) = outbox_folder(tmp_path).glob("*.jsonl")
    lines = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(b"".join(lines[:-1]) + lines[-1][:30])  # the end of the run was being written
    with serving(tmp_path):
        until_told(tmp_path, 1, RUN_FINISHED)
    again = segment.read_bytes().splitlines()[-1]
    assert json.loads(again)["id"] == json.loads(lines[-1])["id"]


def test_runs_before_the_first_outbox_are_no_news(tmp_path):
    with serving(tmp_path) as service:
        take(service.address, 1)
    shutil.rmtree(outbox_folder(tmp_path))
    with serving(tmp_path) as service:
        take(service.address, 2)
        until_told(tmp_path, 2, RUN_FINISHED)
    assert {run for run, _ in told(tmp_path)} == {2}


def test_a_broken_outbox_disturbs_no_frame(tmp_path):
    """Its folder is a file: nothing can be written. Once it can, what was missed is told."""
    outbox_folder(tmp_path).parent.mkdir(parents=True)
    outbox_folder(tmp_path).write_text("in the way")
    with serving(tmp_path) as service:
        take(service.address, 1)
        assert wait_for(lambda: status_of(service.address)["outbox"]["error"])
        folder = RunFolder.open(tmp_path / "lyso" / "1")
        wait_for(lambda: folder.state.is_terminal)
        assert folder.state == "completed"
        outbox_folder(tmp_path).unlink()
        until_told(tmp_path, 1, RUN_FINISHED)
        assert wait_for(lambda: status_of(service.address)["outbox"]["error"] is None)


def test_an_imbalance_is_told(tmp_path):
    with serving(tmp_path) as service:
        folder = service.recorder.start_run("lyso", 7)
        ledger = {"data_source": "eiger", "announced": 5, "received": 4, "stored": 4, "is_terminal": True}
        folder.add_event("run_finished", {"state": "incomplete", "cause": None, "ledgers": [ledger]})
        service._outbox.run_changed(folder)
        until_told(tmp_path, 7, "ledger.imbalance")
    (fact,) = [f for f in OutboxReader(tmp_path).facts() if f.kind == "ledger.imbalance"]
    assert "5 frames announced" in fact.payload["problems"][0]


def test_disk_use_is_bounded_and_nothing_is_told_again(tmp_path):
    def outbox() -> Outbox:
        return Outbox(tmp_path, most_bytes=12_000, segment_bytes=3_000)

    first = outbox()
    first.start()
    for run in range(1, 61):
        header = RunHeader(experiment="lyso", run=run, started_at=datetime.now(UTC))
        first.run_changed(RunFolder.create(tmp_path, header))
    wait_for(lambda: first.status()["told"] == 60)
    first.stop()
    assert sum(p.stat().st_size for p in outbox_folder(tmp_path).glob("*")) <= 12_000
    kept = [f.number for f in OutboxReader(tmp_path).facts()]
    assert kept[0] > 1
    assert kept == list(range(kept[0], 61))
    assert [f.number for f in OutboxReader(tmp_path).facts(after=55)] == [56, 57, 58, 59, 60]
    again = outbox()
    again.start()
    again.stop()
    assert again.status()["told"] == 60


def test_a_reader_sees_news_once(tmp_path):
    outbox = Outbox(tmp_path)
    outbox.start()
    outbox.stop()
    reader = OutboxReader(tmp_path)
    assert reader.has_news()
    assert not reader.has_news()
