"""The detector's bytes of hits as a stream of their own, live and finished."""

import pytest

from flows.run_processing import ProcessRequest, run_processing
from nearline.children import free_port
from storage.errors import BadRecipe, FrameMissing
from storage.run_folder import ChunkCommit
from storage.states import FrameState
from storage.step_store import Processing
from storage.verify import verify_run
from streaming.derived import Row, _messages
from streaming.retrieval import Run, open_run
from streaming.service import Service, ServiceSettings, SourceSettings
from tasks.recipe import Recipe, load_recipe

from .conftest import N_FRAMES, take_run, wait_for_run

CONTENT = {"steps": [{"use": "find_peaks"}], "export": {"nexus": "none", "crystfel": False, "hits_stream": True}}


def hits_of(folder, name="p1") -> set[int]:
    table = Processing(folder, name).frames
    return set(table.filter(table["hit"])["frame_index"].to_pylist())


def check_hits(run: Run, hits: set[int]) -> None:
    """Exactly the hits, byte for byte; what is not there was left out."""
    stream, parent = run["eiger.hits@p1"], run["eiger"]
    assert 0 < len(hits) < N_FRAMES
    assert {frame.frame_index: bytes(frame.blob) for frame in stream} == {i: bytes(parent[i].blob) for i in hits}
    assert all((frame.data == parent[frame.frame_index].data).all() for frame in stream)
    assert (stream.header.codec, stream.header.parent) == (parent.header.codec, "eiger")
    ledger = stream.ledger()
    found = (ledger.announced, ledger.stored, ledger.left_out, ledger.missing, ledger.is_balanced, ledger.is_terminal)
    assert found == (N_FRAMES, len(hits), N_FRAMES - len(hits), 0, True, True)
    with pytest.raises(FrameMissing, match=r"is not a hit, and was left out; see eiger"):
        stream[min(set(range(N_FRAMES)) - hits)]


def test_a_group_follows_hits_of_a_live_run(tmp_path, in_thread):
    detector = f"tcp://127.0.0.1:{free_port()}"
    settings = ServiceSettings(root=tmp_path, bind="tcp://127.0.0.1:*", sources=(SourceSettings(endpoint=detector),))
    with Service(settings) as service:
        taking = in_thread(take_run, service, detector, None)
        wait_for_run(service)
        request = ProcessRequest(run="lyso/1", recipe=CONTENT, service=service.address)
        processing = in_thread(run_processing, request)
        stream = wait_for_hits(service)
        assert not processing_is_finished(tmp_path)
        members = [in_thread(lambda: [f.frame_index for f in stream.follow("users", lease_s=30)]) for _ in range(2)]
        summary, run = processing(), taking()
        given = sorted(index for member in members for index in member())
        hits = hits_of(run.folder)
        assert given == sorted(hits)
        assert summary["hits"] == len(hits)
        check_hits(open_run(f"{service.address}/lyso/1"), hits)
    check_hits(open_run(str(run.folder)), hits)
    assert verify_run(run.folder).findings == []


def wait_for_hits(service):
    while "eiger.hits@p1" not in (run := open_run(f"{service.address}/lyso/1")):
        pass
    return run["eiger.hits@p1"]


def processing_is_finished(root) -> bool:
    return Processing(root / "lyso" / "1", "p1").is_finished


def test_hits_of_a_finished_run(simulated_run, tmp_path):
    folder = simulated_run.copy_to(tmp_path)
    run_processing(ProcessRequest(run=str(folder), recipe=CONTENT))
    check_hits(open_run(str(folder)), hits_of(folder))
    states = {r.state for commit in (folder / "eiger.hits@p1.chunks").glob("*.json") for r in _ranges(commit)}
    assert states == {FrameState.stored.name, FrameState.left_out.name}


def _ranges(path):
    return ChunkCommit.model_validate_json(path.read_bytes()).ranges


def test_without_a_step_that_finds_hits_there_is_a_remedy(simulated_run, tmp_path):
    folder = simulated_run.copy_to(tmp_path)
    content = CONTENT | {"steps": [{"use": "bin"}]}
    with pytest.raises(BadRecipe, match="add find_peaks"):
        run_processing(ProcessRequest(run=str(folder), recipe=content))


def test_recipes_without_such_a_stream_keep_their_digest():
    before = "b33e2e1c4287d3a1ceb8315590f77ad23d8b77f7219c9f08fc7c94063b9be94d"
    export = {"nexus": "none", "crystfel": False}
    assert load_recipe({"steps": [{"use": "find_peaks"}], "export": export}).digest == before
    assert load_recipe(CONTENT).digest != before
    assert Recipe.model_validate(load_recipe(CONTENT).model_dump()).digest == load_recipe(CONTENT).digest


def test_messages_are_bounded_in_rows_and_bytes():
    rows = [Row(i, bytes(20 << 20) if i < 3 else None, {}) for i in range(1203)]
    messages = list(_messages(rows))
    assert [row for message in messages for row in message] == rows
    assert [len(message) for message in messages] == [1, 1, 500, 500, 201]
