"""A detector that stands elsewhere than it says: found while the run is processed, and right from a later chunk on."""

from pathlib import Path

import h5py
import numpy as np
import pytest

from flows import geometry_snapshots
from flows.canary import newest_chunks, process_chunks
from flows.detector_refinement import detector_of, write_recipe
from flows.explaining import explain
from flows.merging import MergeRequest, merge_runs
from flows.replaying import replay
from flows.report import write_processing_report
from flows.run_page import RunPage
from flows.run_processing import ProcessRequest, run_processing
from flows.run_tally import header_of
from storage.crystfel import read_stream
from storage.errors import BadRecipe
from storage.geometry import Geometry
from storage.geometry_formats import read_geometry, write_geometry
from storage.models import DetectorHeader, StreamHeader
from storage.provenance import provenance_of
from storage.step_store import ChunkManifest, Processing
from streaming.retrieval import open_run
from streaming.simulator import SimulatorSettings, StillPhysics, StillSimulator, make_frames
from tasks.process_chunk import ChunkResult
from tasks.recipe import RefineDetector, load_recipe
from tests.flows import panels
from tests.flows.stored_runs import store_run

OFF = (0.6, -0.45)
N_FRAMES, CHUNK, N_CRYSTALS, LAG = 80, 5, 15, 3
SETTINGS = SimulatorSettings(size="512", n_frames=N_FRAMES, hit_fraction=0.8, seed=4)
RULE = {"n_crystals": N_CRYSTALS, "lag": LAG}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    simulator = SETTINGS.simulator()
    blobs, _ = make_frames(simulator, N_FRAMES)
    return store_run(tmp_path_factory.mktemp("snapshots"), simulator, blobs, CHUNK)


@pytest.fixture(scope="module")
def truth():
    return SETTINGS.simulator().header


@pytest.fixture(scope="module")
def off_recipe(recipe, truth):
    """Starts with the beam centre off, and looks."""
    moved = {"beam_center_x": truth.beam_center_x + OFF[0], "beam_center_y": truth.beam_center_y + OFF[1]}
    return recipe.model_dump(mode="json") | {"detector": moved, "refine_detector": RULE, "name": "off"}


@pytest.fixture(scope="module")
def processed(run, off_recipe):
    return process(run, off_recipe)


def process(run, content, **options) -> Processing:
    return Processing(
        run.path, run_processing(ProcessRequest(run=str(run.path), recipe=content, **options))["processing"]
    )


def geometry_by_chunk(processing) -> list[int]:
    return [chunk.geometry for chunk in processing.chunks()]


def test_the_beam_centre_is_right_from_the_stated_chunk_on(processed, truth):
    (snapshot,) = processed.geometries()
    centre = [snapshot.detector[f"beam_center_{axis}"] for axis in "xy"]
    assert centre == pytest.approx([truth.beam_center_x, truth.beam_center_y], abs=0.06)
    assert snapshot.largest_shift == pytest.approx(np.hypot(*OFF), abs=0.06)
    assert snapshot.n_crystals >= N_CRYSTALS
    first, last = snapshot.looked_at
    assert (first, snapshot.from_chunk) == (0, last + LAG)
    n_chunks = N_FRAMES // CHUNK
    expected = [int(chunk >= snapshot.from_chunk) for chunk in range(n_chunks)]
    assert geometry_by_chunk(processed) == expected
    assert snapshot.words.startswith("geometry is off by 0.7")
    assert f"snapshot 1 from chunk {snapshot.from_chunk} on" in snapshot.words


def test_crystals_behind_it_have_nothing_left_to_correct(processed):
    before, behind = (processed.table("crystals", geometry=number) for number in (0, 1))
    # m across the beam at the distance of the detector, in parts of it
    assert abs(np.median(before["shift_x"])) > 5 * abs(np.median(behind["shift_x"]))
    _, found = detector_of(processed)
    assert found.n_crystals == len(behind)
    assert np.hypot(*found.shift) < 0.1


def test_each_snapshot_has_files_of_its_own(processed, truth):
    (snapshot,) = processed.geometries()
    files = processed.summary["files"]
    start = snapshot.from_chunk * CHUNK
    frames, centres = [], []
    for name in ("nexus", "nexus_1"):
        with h5py.File(files[name]) as file:
            frames.append(file["entry/data/frame"][()].tolist())
            centres.append(float(file["entry/instrument/detector/beam_center_x"][()]))
    assert frames == [list(range(start)), list(range(start, N_FRAMES))]
    assert centres == pytest.approx([truth.beam_center_x + OFF[0], snapshot.detector["beam_center_x"]], abs=1e-6)
    for name, expected in zip(("crystfel_stream", "crystfel_stream_1"), frames, strict=True):
        assert [frame.frame_index for frame in read_stream(files[name])] == expected
    expected = [snapshot.detector[f"beam_center_{axis}"] for axis in "xy"]
    for path in (Path(files["geometry_1"]), processed.geometry_file(1)):
        assert Geometry(read_geometry(path).panels, 1.0).beam_center == pytest.approx(expected, abs=1e-3)


def test_it_is_the_same_on_more_workers(run, off_recipe, processed):
    other = process(run, off_recipe, execution={"kind": "threads", "workers": 6})
    assert other.name != processed.name
    assert [s.detector for s in other.geometries()] == [s.detector for s in processed.geometries()]
    assert [c.steps for c in other.chunks()] == [c.steps for c in processed.chunks()]


class Interrupted(Exception):
    pass


class InterruptsAt:
    """A reporter that ends the processing at a chunk."""

    def __init__(self, chunk):
        self.chunk = chunk

    def started(self, run, processing, recipe):
        pass

    def chunk_done(self, progress):
        if progress.chunk.chunk == self.chunk:
            raise Interrupted

    def finished(self, summary):
        pass


def test_a_processing_taken_up_again_goes_on_with_its_snapshot(run, off_recipe, processed):
    (known,) = processed.geometries()
    request = ProcessRequest(run=str(run.path), recipe=off_recipe)
    with pytest.raises(Interrupted):
        run_processing(request, reporter=InterruptsAt(known.looked_at[1] + 1))
    written = open_run(str(run.path)).processings
    (unfinished,) = [one for one in written.values() if not one.is_finished]
    (first,) = unfinished.geometries()
    summary = run_processing(request)
    assert summary["processing"] == unfinished.name
    assert unfinished.geometries() == [first]
    assert first.detector == known.detector
    assert [c.steps for c in unfinished.chunks()] == [c.steps for c in processed.chunks()]


def test_a_reflection_behind_it_is_explained_and_replayed(run, processed):
    opened = open_run(str(run.path))
    behind = processed.table("reflections", geometry=1)
    frame = behind["frame_index"][0].as_py()
    explained = explain(opened, frame, processing=processed.name)
    (snapshot,) = processed.geometries()
    assert explained.detector["beam_center_x"] == snapshot.detector["beam_center_x"]
    assert explained.geometry["number"] == 1
    assert explained.geometry["digest"] == snapshot.digest
    done = replay(opened, explained)
    assert done.is_identical, done.differences
    assert not done.differences


def test_another_parameter_is_the_only_difference_of_a_replay_with_it(run, processed, off_recipe):
    opened = open_run(str(run.path))
    frame = processed.table("reflections", geometry=1)["frame_index"][0].as_py()
    content = dict(off_recipe)
    content["steps"] = [
        step | ({"params": {"inner": 4, "middle": 5, "outer": 7}} if step["use"] == "integrate" else {})
        for step in content["steps"]
    ]
    done = replay(opened, explain(opened, frame, processing=processed.name), recipe=load_recipe(content))
    assert {difference.kind for difference in done.differences} == {"parameter"}


def test_a_canary_sees_the_detector_as_the_processing_knows_it(run, processed, off_recipe):
    opened = open_run(str(run.path))
    stream = opened["eiger"]
    content = off_recipe | {"name": "tried out"}
    chunks = newest_chunks(stream, minutes=10.0)
    canary, _ = process_chunks(opened, stream, load_recipe(content), chunks)
    for chunk in canary.chunks():
        known = processed.chunk(chunk.chunk)
        assert (chunk.geometry, chunk.steps) == (known.geometry, known.steps)
    assert canary.newest_geometry == 1
    assert header_of(canary).detector == header_of(processed).detector


def test_a_snapshot_of_the_last_moment_does_not_keep_from_refining(run, off_recipe, truth, tmp_path):
    """It has too few crystals of its own: those before it say where the detector is."""
    late = RULE | {"lag": N_FRAMES // CHUNK - 4}
    processing = process(run, off_recipe | {"refine_detector": late})
    assert processing.newest_geometry == 1
    assert len(processing.table("crystals", geometry=1)) < 10
    findings, found = detector_of(processing)
    assert found.n_crystals == len(processing.table("crystals", geometry=0))
    assert findings.beam_center_x == pytest.approx(truth.beam_center_x, abs=0.06)
    write_recipe(processing, findings, found, tmp_path / "better.yaml")
    assert load_recipe(tmp_path / "better.yaml").refine_detector is None


def test_the_distance_is_refined_where_the_cell_is_trusted(run, recipe, truth):
    wrong = {"detector_distance": 0.985 * truth.detector_distance}
    content = recipe.model_dump(mode="json") | {"detector": wrong, "refine_detector": RULE | {"distance": True}}
    processing = process(run, content)
    first, *_ = processing.geometries()
    assert first.distance == pytest.approx(truth.detector_distance, rel=5e-4)
    assert first.detector["detector_distance"] == pytest.approx(first.distance, abs=1e-7)
    # px, of the outer spots: 1.5 % of some 300 px
    assert 1.0 < first.largest_shift < 6.0
    assert f"; {1e3 * first.distance:.3f} mm away" in first.words
    again, _ = detector_of(processing, trust_cell=True)
    assert again.distance == pytest.approx(truth.detector_distance, rel=5e-4)
    left_alone = process(run, content | {"refine_detector": RULE})
    assert all("detector_distance" not in s.detector or s.distance is None for s in left_alone.geometries())


def test_its_provenance_names_the_crystals(run, processed):
    graph = provenance_of(run.path, processed.name)
    (entity,) = (e for e in graph.entities.values() if e.kind == "geometry")
    (snapshot,) = processed.geometries()
    assert entity.digest == snapshot.digest
    used_by = [r.subject for r in graph.related("used", object=entity.id)]
    n_chunks = N_FRAMES // CHUNK
    assert used_by == [f"{processed.name}/chunk/{chunk:05d}" for chunk in range(snapshot.from_chunk, n_chunks)]
    sources = {r.object for r in graph.related("wasDerivedFrom", subject=entity.id)}
    looked_at = [c for c in processed.chunks() if c.chunk <= snapshot.looked_at[1]]
    assert sources == {f"step/{digest}" for chunk in looked_at for digest in chunk.steps.values()}


def test_both_parts_are_merged(run, processed, tmp_path):
    merged = merge_runs(MergeRequest(runs=(str(run.path),), processing=processed.name), tmp_path)
    assert merged.statistics.n_crystals == len(np.unique(processed.reflections["frame_index"]))


def test_the_page_and_the_report_say_so(run, processed, off_recipe, tmp_path):
    words = processed.geometries()[0].words
    assert processed.summary["geometries"] == [words]
    path = tmp_path / "report.html"
    write_processing_report(open_run(str(run.path)), processed, path)
    assert words in path.read_text()
    page = Page()
    run_processing(ProcessRequest(run=str(run.path), recipe=off_recipe), reporter=page)
    assert any(words in text for text in page.texts)


class Page(RunPage):
    """The page's text without a server."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def started(self, run, processing, recipe):
        super().started(run, processing, recipe)
        page = self._page
        page.show = lambda text, is_last: self.texts.append(text)


def test_a_run_that_ends_before_its_snapshot_is_in_force(run, off_recipe, truth):
    processing = process(run, off_recipe | {"refine_detector": RULE | {"lag": 40}})
    (snapshot,) = processing.geometries()
    assert snapshot.from_chunk > N_FRAMES // CHUNK
    assert set(geometry_by_chunk(processing)) == {0}
    findings, found = detector_of(processing)
    assert found.n_crystals == len(processing.crystals)
    assert findings.beam_center_x == pytest.approx(truth.beam_center_x, abs=0.06)


def test_looks_are_at_twice_as_many_crystals_each_and_begin_anew(recipe, monkeypatch):
    """So that all looks together cost some two of the last, and a drift is seen."""
    looked_at = []

    def too_few(found, *_, trust_cell):
        looked_at.append(len(found))
        raise BadRecipe("nothing to say")

    monkeypatch.setattr(geometry_snapshots, "refine_detector", too_few)
    monkeypatch.setattr(geometry_snapshots, "_spots_of", lambda result, cell: [None] * 5)
    chunk = ChunkManifest(chunk=0, start=0, stop=1, chunk_digest="", steps={}, n_frames=1, n_hits=1, n_indexed=1)
    watch = geometry_snapshots._Watch(RefineDetector(n_crystals=10), recipe)
    header = StreamHeader(
        experiment="a", run=1, data_source="e", shape=(2, 2), dtype="uint16", detector=DetectorHeader()
    )
    for _ in range(2 * 160 // 5):
        if watch.is_due(ChunkResult(chunk, {})):
            assert watch.snapshot(recipe, header, 1) is None
    assert looked_at == [10, 20, 40, 80, 160] * 2


def test_a_detector_where_it_says_is_left_alone(run, recipe):
    processing = process(run, recipe.model_dump(mode="json") | {"refine_detector": RULE})
    assert processing.geometries() == []
    assert set(geometry_by_chunk(processing)) == {0}


def test_what_is_off_by_less_than_asked_is_left_alone(run, off_recipe):
    processing = process(run, off_recipe | {"refine_detector": RULE | {"min_shift": 1.0}})
    assert processing.geometries() == []


def test_panels_move_each_by_itself(recipe, tmp_path):
    physics = StillPhysics(hit_fraction=1.0)
    true = StillSimulator(panels.SHAPE, detector=panels.header_of(panels.four_panels()), physics=physics, seed=5)
    blobs, _ = make_frames(true, 60)
    plain = StillSimulator(
        panels.SHAPE, detector=panels.flat_header(), physics=StillPhysics(gaps=False, bad_pixel_fraction=0)
    )
    run = store_run(tmp_path, plain, blobs, 10)
    wrong = panels.displaced(panels.four_panels(), 1, (-1.1, 0.7))
    write_geometry(tmp_path / "wrong.geom", Geometry.from_header(panels.header_of(wrong), panels.SHAPE), ())
    content = recipe.model_dump(mode="json") | {
        "detector": {"geometry": str(tmp_path / "wrong.geom")},
        "refine_detector": {"n_crystals": 25, "lag": 1},
    }
    processing = process(run, content)
    snapshots = processing.geometries()
    assert snapshots
    assert snapshots[0].largest_shift == pytest.approx(np.hypot(1.1, 0.7), abs=0.2)
    found = header_of(processing).detector.panels
    for one, expected in zip(found, panels.four_panels().panels, strict=True):
        np.testing.assert_allclose(one.corner, expected.corner, atol=7.5e-6)


def test_it_needs_crystals(recipe):
    content = recipe.model_dump(mode="json") | {"refine_detector": {}}
    content["steps"] = [step for step in content["steps"] if step["use"] == "find_peaks"]
    with pytest.raises(BadRecipe, match="no step uses index"):
        load_recipe(content)
