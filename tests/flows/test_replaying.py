"""Results are walked back to their bytes and computed again; what has changed is named."""

import json
import os
import random
import subprocess
import sys

import pyarrow as pa
import pytest

from flows.explaining import explain
from flows.replaying import replay
from flows.run_processing import ProcessRequest, run_processing
from storage.errors import BadQuery, FrameMissing
from storage.provenance import provenance_of
from streaming.retrieval import open_run
from tasks.recipe import load_recipe

STEP = "def brightest(chunk):\n    return {'top': [float(chunk.data(i).max()) for i in range(len(chunk))]}\n"
REPLAY_AGAIN = """
import sys
from flows.explaining import explain
from flows.replaying import replay
from streaming.retrieval import open_run
run = open_run(sys.argv[1])
print(replay(run, explain(run, 2)).model_dump_json())
"""


@pytest.fixture(scope="module")
def processed(simulated_run, tmp_path_factory):
    """A run processed by the preset, recorded as it went."""
    from tasks.recipe import crystallography
    from tasks.unit_cell import read_cell

    folder = simulated_run.copy_to(tmp_path_factory.mktemp("processed"))
    recipe = crystallography(read_cell("79.1,79.1,37.9,90,90,90", "P 43 21 2"))
    process(folder, recipe)
    return open_run(folder)


def process(folder, recipe):
    request = ProcessRequest(run=str(folder), recipe=recipe.model_dump(mode="json"))
    return run_processing(request, flow_run=("11111111-2222", "http://127.0.0.1/11111111-2222"))


@pytest.fixture
def small(simulated_run, tmp_path, monkeypatch):
    """A run processed by peak search and a step of one's own, to be spoilt."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "bright_steps.py").write_text(STEP)
    monkeypatch.delitem(sys.modules, "bright_steps", raising=False)
    folder = simulated_run.copy_to(tmp_path)
    content = {"steps": [{"use": "find_peaks"}, {"use": "bright_steps:brightest"}], "export": {"nexus": "none"}}
    process(folder, load_recipe(content | {"export": {"nexus": "none", "crystfel": False}}))
    return folder


def first_peak(run):
    return explain(run, run.processings["p1"].peaks["frame_index"][0].as_py(), peak=0)


def kinds(result):
    return {difference.kind for difference in result.differences}


def test_random_peaks_and_reflections_come_out_the_same(processed):
    chosen, tables = random.Random(7), processed.processings["p1"]
    for table, n in ((tables.peaks, 12), (tables.reflections, 8)):
        for row in chosen.sample(range(len(table)), n):
            values = table.slice(row, 1).to_pylist()[0]
            frame = values["frame_index"]
            if table is tables.peaks or "h" not in values:
                first = table["frame_index"].to_pylist().index(frame)
                found = explain(processed, frame, peak=row - first)
            else:
                found = explain(processed, frame, reflection=(values["h"], values["k"], values["l"]))
            assert found.values == values
            assert all(place.is_verified for place in found.bytes)
            result = replay(processed, found)
            assert (result.is_identical, result.differences, result.notes) == (True, [], [])


def test_bytes_named_are_the_frames(processed):
    (place,) = explain(processed, 5).bytes
    with open(processed.folder / place.file, "rb") as file:
        file.seek(place.offset)
        assert file.read(place.length) == processed["eiger"][5].blob


def test_another_parameter_is_named(small):
    run = open_run(small)
    changed = {"steps": [{"use": "find_peaks", "params": {"min_snr": 7.0}}, {"use": "bright_steps:brightest"}]}
    result = replay(run, first_peak(run), recipe=load_recipe(changed))
    assert [d.what for d in result.differences] == ["find_peaks.min_snr was 5.0, is 7.0"]


def test_a_changed_manifest_is_named(small):
    path = small / "processed" / "p1" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["recipe"]["steps"][0]["params"] = {"min_snr": 4.0}
    path.write_text(json.dumps(manifest))
    run = open_run(small)
    result = replay(run, first_peak(run))
    assert result.is_identical
    assert "find_peaks.min_snr was 5.0" in result.differences[0].what


def test_a_flipped_byte_is_named(small):
    run = open_run(small)
    found = first_peak(run)
    with open(small / found.bytes[0].file, "r+b") as file:
        file.seek(found.bytes[0].offset + 100)
        byte = file.read(1)[0]
        file.seek(found.bytes[0].offset + 100)
        file.write(bytes([byte ^ 1]))
    run = open_run(small)
    again = first_peak(run)
    result = replay(run, again)
    assert not again.bytes[0].is_verified
    assert not result.is_identical
    assert kinds(result) == {"bytes"}
    assert f"frame {found.frame} " in result.differences[0].what


def test_an_edited_step_is_named(small, tmp_path):
    # Of another length: Python tells by second and size whether what it compiled is still true.
    (tmp_path / "bright_steps.py").write_text(STEP.replace("max()", "min()") + "# edited\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", REPLAY_AGAIN, str(small)], env=environment, capture_output=True, text=True, check=True
    )
    result = json.loads(done.stdout)
    assert not result["is_identical"]
    (difference,) = result["differences"]
    assert difference["what"] == "the code of brightest is another: module bright_steps"
    assert any("top of row 0" in column for table in result["tables"] for column in table["columns"])


def test_what_there_is_not(processed):
    with pytest.raises(BadQuery, match="no peak 9999"):
        explain(processed, 2, peak=9999)
    with pytest.raises(FrameMissing, match="0 to 23"):
        explain(processed, 24)


def test_the_graph_has_all_and_survives_without_its_lines(processed):
    graph = provenance_of(processed.folder, "p1")
    kinds = [activity.kind for activity in graph.activities.values()]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "processing": 1, "chunk": 3, "recording": 3, "export": 1,
    }  # fmt: skip
    known = graph.activities | graph.entities | graph.agents
    assert [r for r in graph.relations if r.subject not in known or r.object not in known] == []
    assert {a.kind for a in graph.agents.values()} == {"software", "person", "flow run", "data source"}
    assert all(e.digest for e in graph.entities.values())


def test_a_torn_line_is_left_out(small, caplog):
    before = provenance_of(small, "p1")
    (lines,) = (small / "provenance").glob("p1.*.jsonl")
    with open(lines, "a") as file:
        file.write('{"entity": {"id": "fi')
    after = provenance_of(small, "p1")
    assert (after.entities, after.relations) == (before.entities, before.relations)
    assert "torn" in caplog.text


def test_tables_say_what_they_hold(processed):
    step = explain(processed, 2).steps[1]
    assert set(step.content) == {"frames", "peaks"}
    assert step.made["user"]
    assert isinstance(processed.processings["p1"].peaks, pa.Table)
