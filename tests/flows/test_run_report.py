"""The report of a run: its numbers against the tables, its page as a browser takes it, and what it leaves out."""

import base64
import io
import json
import math
import re
import shutil
import statistics
import time
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import gemmi
import numpy as np
import pytest
from PIL import Image

import nearline
from flows.report.examples import example_pictures, mask_of
from flows.report.gathering import CRYSTAL_COLUMNS, gather
from flows.report.numbers import figures_of
from flows.report.tallies import Blocks, DetectorMap, PeakCounts, Sample
from flows.run_processing import ProcessRequest, run_processing
from storage.errors import BadName, BadRecipe, RunNotFound
from storage.models import StreamHeader
from storage.step_store import Processing
from streaming.retrieval import open_run
from streaming.service import Service, ServiceSettings
from streaming.simulator import SimulatorSettings, make_frames
from tasks.recipe import crystallography
from tests.flows.stored_runs import store_run

SETTINGS = SimulatorSettings(size="512", n_frames=50, hit_fraction=0.7, seed=6)
NO_FILES = {"nexus": "none", "crystfel": False}
VOID = {"meta", "img", "link", "br", "hr", "input"}


class Page(HTMLParser):
    """What a browser makes of it: text by heading, pictures, and all that is loaded from somewhere."""

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: set[str] = set()
        self.text: list[str] = []
        self.pictures: dict[str, Image.Image] = {}
        self.places: list[str] = []
        self.rows: dict[str, str] = {}
        self._row: list[str] = []
        self.html = Path(path).read_text()
        self.feed(self.html)
        self.close()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        assert not [name for name in values if name.startswith("on")]
        self.tags.add(tag)
        self.ids |= {values["id"]} if "id" in values else set()
        self.places += [values[name] for name in ("src", "href", "action", "srcset") if name in values]
        if tag == "img":
            kind, _, content = values["src"].partition(",")
            assert kind == "data:image/png;base64"
            self.pictures[values["alt"]] = Image.open(io.BytesIO(base64.b64decode(content)))
        if tag == "tr":
            self._row = []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        if tag == "tr" and len(self._row) >= 2:
            self.rows[self._row[0]] = " | ".join(self._row[1:])

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self._row.append(data)

    @property
    def all_text(self) -> str:
        return " ".join(self.text)


def whole(path) -> Page:
    """A page that holds together, and needs nothing from anywhere."""
    page = Page(path)
    assert page.open == []
    assert not page.tags & {"script", "iframe", "object", "embed", "link", "base", "form"}
    assert all(place.startswith(("data:image/png;base64,", "#")) for place in page.places)
    assert {place[1:] for place in page.places if place.startswith("#")} <= page.ids
    assert not re.search(r"https?://|url\(|@import", page.html)
    assert all(len(alt) > 5 for alt in page.pictures)
    assert all(picture.size[0] > 400 for picture in page.pictures.values())
    return page


def stored(root, frames=SETTINGS.n_frames, **changes):
    simulator = SETTINGS.simulator()
    blobs, truth = make_frames(simulator, frames) if frames else ([], [])
    folder = store_run(root, simulator, blobs, frames_per_chunk=10)
    if changes:
        path = folder.path / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder.path, truth


def processed(folder, recipe, stop=(), **export):
    content = (recipe if isinstance(recipe, dict) else recipe.model_dump(mode="json")) | {"export": NO_FILES | export}
    return run_processing(ProcessRequest(run=str(folder), recipe=content, n_threads=2, stop=stop))


@pytest.fixture(scope="module")
def choosy(recipe):
    """The recipe with a hit cut that some crystals do not reach."""
    content = recipe.model_dump(mode="json")
    steps = [step | {"params": {"min_peaks": 40}} if step["use"] == "find_peaks" else step for step in content["steps"]]
    return content | {"steps": steps}


@pytest.fixture(scope="module")
def taken(tmp_path_factory, choosy):
    """A processed run with its truth; its processing has written a report, too."""
    folder, truth = stored(tmp_path_factory.mktemp("report"), sample="lysozyme", comment="first of the day")
    summary = processed(folder, choosy, ("n_hits >= 5", "n_hits >= 5000"), report=True)
    return folder, truth, summary


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run of ten frames that nobody has processed yet."""
    return stored(tmp_path_factory.mktemp("plain"), frames=10)[0]


@pytest.fixture(scope="module")
def written(taken, tmp_path_factory):
    path = tmp_path_factory.mktemp("written")
    return nearline.report(taken[0], path / "report.html", pictures=path / "pictures")


# ---- numbers ---------------------------------------------------------------------------------------------


def test_counts_and_rates_are_those_of_the_tables(taken, written):
    folder, truth, _ = taken
    found, one = written["figures"], Processing(folder, "p1")
    frames, crystals = one.frames.to_pylist(), one.crystals.to_pylist()
    hits = {row["frame_index"] for row in frames if row["hit"]}
    indexed = {row["frame_index"] for row in crystals}
    peaks = one.peaks["frame_index"].to_pylist()
    assert len(hits) > 25
    assert hits <= {t.index for t in truth if t.is_hit}
    assert (found["n_frames"], found["n_hits"], found["n_indexed"]) == (50, len(hits), len(indexed))
    assert found["n_crystals"] == len(crystals)
    assert found["hit_rate"] == pytest.approx(len(hits) / 50)
    assert found["indexing_rate"] == pytest.approx(len(indexed) / len(hits))
    several = sum(1 for index in indexed if sum(row["frame_index"] == index for row in crystals) > 1)
    assert found["multiple_rate"] == pytest.approx(several / len(indexed))
    assert found["peaks_per_hit"] == pytest.approx(sum(index in hits for index in peaks) / len(hits))
    explained = sum(row["n_indexed"] for row in crystals) / sum(index in indexed for index in peaks)
    assert found["spots_indexed"] == pytest.approx(explained)


def test_crystals_are_summed_up_as_the_tables_have_them(taken, written):
    one, found = Processing(taken[0], "p1"), written["figures"]
    for number, name in enumerate(("a", "b", "c", "alpha", "beta", "gamma")):
        values = one.crystals[name].to_pylist()
        middle = statistics.median(values)
        assert found["cell"][number] == pytest.approx(middle)
        spread = 1.4826 * statistics.median(abs(value - middle) for value in values)
        assert found["cell_sigma"][number] == pytest.approx(spread)
    assert found["resolution"] == pytest.approx(
        statistics.median(one.table("crystal_quality")["resolution"].to_pylist())
    )
    assert found["cell_given"] == pytest.approx([79.1, 79.1, 37.9, 90, 90, 90])
    assert found["cell"][0] == pytest.approx(79.1, rel=1e-3)
    assert math.hypot(*found["beam_shift"]) < 0.1


def test_merging_statistics_are_those_of_counting_by_hand(taken, written):
    """Observations put into gemmi's asymmetric unit one by one."""
    found, one = written["figures"]["merging"], Processing(taken[0], "p1")
    cell, group = gemmi.UnitCell(79.1, 79.1, 37.9, 90, 90, 90), gemmi.SpaceGroup("P 43 21 2")
    asu, operations = gemmi.ReciprocalAsu(group), group.operations()
    d_min = found["d_min"]
    seen: dict[tuple[int, ...], int] = {}
    for row in one.reflections.select(["h", "k", "l"]).to_pylist():
        hkl = [row["h"], row["k"], row["l"]]
        if cell.calculate_d(hkl) >= d_min and not operations.is_systematically_absent(hkl):
            unique = tuple(asu.to_asu(hkl, operations)[0])
            seen[unique] = seen.get(unique, 0) + 1
    possible = gemmi.make_miller_array(cell, group, d_min * (1 - 1e-9), unique=True)
    assert found["n_unique"] == len(seen) > 500
    assert found["n_observations"] == sum(seen.values())
    assert found["completeness"] == pytest.approx(len(seen) / len(possible))
    assert found["multiplicity"] == pytest.approx(sum(seen.values()) / len(seen))


def test_the_page_says_the_same(written):
    page, found = whole(written["path"]), written["figures"]
    assert page.rows["hits"] == f"{found['n_hits']}, {100 * found['hit_rate']:.1f} % of frames"
    assert page.rows["resolution, median"] == f"{found['resolution']:.2f} Å"
    assert page.rows["lyso/1"].startswith("50 | 50 | 50 | 50 | 0 |")
    first = found["merging"]["shells"][0]
    shell = page.rows[f"{first['d_max']:.2f}–{first['d_min']:.2f}"]
    assert shell.startswith(f"{first['n_possible']:,} | {first['n_unique']:,} | {100 * first['completeness']:.1f} % |")
    assert "sample lysozyme" in page.all_text
    assert "first of the day" in page.all_text
    assert "all of it is processed" in page.all_text
    assert "use: find_peaks" in page.all_text
    assert found["runs"][0]["digest"] in page.all_text
    assert len(page.html) < 3_000_000


def test_what_was_decided_stands_in_it(written):
    (decision,) = written["figures"]["decisions"]
    assert decision["criterion"] == "n_hits >= 5"
    n_hits = decision["values"]["n_hits"]
    said = f"enough, by 'n_hits >= 5' (n_hits {n_hits:g}), at chunk {decision['chunk']} of lyso/1."
    assert said in whole(written["path"]).all_text


def test_all_pictures_are_there_and_in_the_folder(written):
    page = whole(written["path"])
    for words in (
        "hit rate and indexing rate", "number of peaks of a frame", "density of peaks", "cell lengths", "resolution of",
        "share of the peaks", "beam centre", "pole figures", "merging statistics", "background", "most indexed spots",
        "a hit in the middle", "the fullest frame that is no hit",
    ):  # fmt: skip
        assert any(words in alt for alt in page.pictures), words
    files = [Path(path) for path in written["pictures"]]
    assert len(files) == len(page.pictures)
    for path, shown in zip(files, page.pictures.values(), strict=True):
        with Image.open(path) as kept:
            assert np.array_equal(np.asarray(kept.convert("RGB")), np.asarray(shown.convert("RGB")))
            # Something is drawn: not all of it is white.
            assert len(np.unique(np.asarray(kept.convert("L")))) > 10


def test_examples_are_the_frames_they_are_called(taken, written):
    frames = {row["frame_index"]: row for row in Processing(taken[0], "p1").frames.to_pylist()}
    text = whole(written["path"]).all_text
    ((n, near),) = re.findall(r"The fullest frame that is no hit, with (\d+) peaks?: lyso/1, frame (\d+)", text)
    assert not frames[int(near)]["hit"]
    assert int(n) == frames[int(near)]["n_peaks"] == max(r["n_peaks"] for r in frames.values() if not r["hit"]) > 0
    ((n, usual),) = re.findall(r"A hit in the middle, with (\d+) peaks: lyso/1, frame (\d+)", text)
    assert frames[int(usual)]["n_peaks"] == int(n)
    assert abs(int(n) - statistics.median(r["n_peaks"] for r in frames.values() if r["hit"])) <= 5


# ---- what a processing lacks -----------------------------------------------------------------------------


def test_a_recipe_can_ask_for_it(taken):
    folder, _, summary = taken
    path = folder / "processed" / "p1" / "report.html"
    assert summary["files"] == {"report": str(path)}
    page = whole(path)
    assert page.rows["hits"].startswith(str(summary["hits"]))
    assert "all of it is processed" in page.all_text


def test_a_recipe_that_asks_for_it_gives_the_same_results(recipe):
    asking = recipe.model_copy(update={"export": recipe.export.model_copy(update={"report": True})})
    assert asking.digest == recipe.digest


def test_a_report_that_cannot_be_written_costs_no_processing(plain, tmp_path, caplog):
    folder = tmp_path / "lyso" / "1"
    shutil.copytree(plain, folder)
    (folder / "processed" / "p1" / "report.html" / "in the way").mkdir(parents=True)
    summary = processed(folder, {"steps": [{"use": f"{__name__}:own_measures"}]}, report=True)
    assert summary["files"] == {}
    assert summary["frames"] == 10
    assert "no report of" in caplog.text


def test_without_a_cell_it_speaks_of_peaks_alone(taken, tmp_path):
    folder = tmp_path / "lyso" / "1"
    shutil.copytree(taken[0], folder, ignore=shutil.ignore_patterns("processed"))
    summary = processed(folder, crystallography(None))
    result = nearline.report(folder, tmp_path / "r.html")
    page, found = whole(result["path"]), result["figures"]
    assert found["n_hits"] == summary["hits"] > 25
    assert found["n_indexed"] is found["cell"] is found["merging"] is found["orientation"] is None
    assert any("no crystals" in note for note in found["notes"])
    assert "no crystals: the recipe does not index, and gives no cell" in page.all_text
    assert not any("cell" in alt or "pole" in alt or "merging" in alt for alt in page.pictures)
    assert any("density of peaks" in alt for alt in page.pictures)


def test_a_run_without_frames_has_a_page(tmp_path, recipe):
    folder, _ = stored(tmp_path, frames=0)
    processed(folder, recipe)
    result = nearline.report(folder, tmp_path / "r.html")
    page = whole(result["path"])
    assert result["figures"]["n_frames"] == 0
    assert "no chunk is processed yet" in page.all_text
    assert page.pictures == {}


# As nobody should choose them.
HOSTILE_NAMES = (
    '<img src=x onerror="alert(1)">',
    r"$\frac{1}{$ ^_",
    "温度 \N{GRINNING FACE}",
)


def own_measures(chunk):
    tag, formula, unicode = HOSTILE_NAMES
    index = chunk.frame_index.astype(float)
    return {
        "warmth": 300.0 + index,
        tag: np.where(index == 3, np.nan, index % 7),
        formula: index**2,
        unicode: -index,
        "label": np.array([f"<b>{i:g}</b>" for i in index]),
        "ramp": np.add.outer(index, np.arange(6.0)),
    }


HOSTILE = "<script>alert('1')</script> & \"quotes\" $x^$ {{ 7 * 7 }}"


def test_names_are_text_whatever_they_are_and_columns_are_drawn(tmp_path):
    folder, _ = stored(tmp_path, frames=10, sample=HOSTILE, comment=HOSTILE)
    recipe = {"name": HOSTILE, "steps": [{"use": f"{__name__}:own_measures"}]}
    processed(folder, recipe)
    result = nearline.report(folder, tmp_path / "r.html", pictures=tmp_path / "pictures")
    page, found = whole(result["path"]), result["figures"]
    assert found["n_hits"] is None
    assert found["sample"] == HOSTILE
    assert page.all_text.count(HOSTILE) >= 3
    assert "49" not in page.rows["frames"]
    for name in ("warmth", *HOSTILE_NAMES):
        assert sum(f"{name} over the frames" in alt or f"histogram of {name}" in alt for alt in page.pictures) == 2
    assert "mean of ramp over all frames" in page.pictures
    assert found["columns"]["warmth"] == {
        "n_values": 10, "mean": 304.5, "sigma": pytest.approx(math.sqrt(8.25)), "least": 300, "greatest": 309,
    }  # fmt: skip
    assert found["columns"]['<img src=x onerror="alert(1)">']["n_values"] == 9
    assert page.rows["warmth"].startswith("10 | 304.5 |")
    assert not any("label" in alt for alt in page.pictures)
    assert sorted(p.name for p in (tmp_path / "pictures").iterdir()) == sorted(Path(p).name for p in result["pictures"])
    assert all(re.fullmatch(r"[a-z0-9-]+\.png", Path(path).name) for path in result["pictures"])


# ---- live, and several -----------------------------------------------------------------------------------


def test_a_run_under_way_is_reported_as_far_as_it_is(tmp_path, monkeypatch, in_thread):
    with Service(ServiceSettings(root=tmp_path / "data", bind="tcp://127.0.0.1:*", sources=())) as service:
        monkeypatch.setenv("NEARLINE_SERVICE", service.address)
        recipe = {"steps": [{"use": f"{__name__}:own_measures"}], "export": NO_FILES}
        with nearline.producer("live", "cam").run(1) as out:
            out.start(
                StreamHeader(experiment="live", run=1, data_source="cam", shape=(4,), dtype="uint16", codec="raw",
                             frames_per_chunk=5)
            )  # fmt: skip
            processing = in_thread(lambda: nearline.process("live/1", recipe, n_threads=1))
            for index in range(13):
                out.send(np.arange(index, index + 4, dtype=np.uint16))
            deadline = time.monotonic() + 30
            while len(list((tmp_path / "data").glob("live/1/processed/p1/chunks/*.json"))) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            now = nearline.report("live/1", tmp_path / "now.html")
        processing()
        then = nearline.report("live/1", tmp_path / "then.html")
    assert (now["figures"]["n_frames"], then["figures"]["n_frames"]) == (10, 13)
    assert "still growing" in whole(now["path"]).all_text
    assert "all of it is processed" in whole(then["path"]).all_text
    assert now["figures"]["runs"][0]["digest"] != then["figures"]["runs"][0]["digest"]
    assert "the frames are not images" not in then["figures"]["notes"]


@pytest.fixture(scope="module")
def pair(taken, tmp_path_factory):
    """The same run twice, as runs 1 and 2 of one sample."""
    root = tmp_path_factory.mktemp("sample")
    for number in (1, 2):
        folder = root / "lyso" / str(number)
        shutil.copytree(taken[0], folder)
        for path in (folder / "run.json", *folder.glob("*.stream.json")):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"run": number}))
    return root


def test_runs_of_a_sample_are_one_report(pair, written, tmp_path):
    result = nearline.report(out=tmp_path / "r.html", sample="lysozyme", root=pair)
    one, both = written["figures"], result["figures"]
    assert [run["run"] for run in both["runs"]] == ["lyso/1", "lyso/2"]
    for name in ("n_frames", "n_hits", "n_indexed", "n_crystals"):
        assert both[name] == 2 * one[name]
    assert both["hit_rate"] == one["hit_rate"]
    assert both["cell"] == pytest.approx(one["cell"])
    # Outliers are judged in the light of all: twice the observations let go of others.
    assert both["merging"]["n_unique"] == pytest.approx(one["merging"]["n_unique"], rel=0.01)
    assert both["merging"]["multiplicity"] == pytest.approx(2 * one["merging"]["multiplicity"], rel=0.02)
    page = whole(result["path"])
    assert "2 runs of lysozyme" in page.all_text
    assert page.rows["lyso/2"].startswith("50 | 50 |")


def test_runs_of_other_crystals_are_not_thrown_together(pair, recipe, tmp_path):
    content = recipe.model_dump(mode="json")
    content["sample"] = {"cell": (90.0, 90.0, 40.0, 90.0, 90.0, 90.0), "space_group": "P 43 21 2"}
    root = tmp_path / "data"
    shutil.copytree(pair, root)
    content["steps"] = [step for step in content["steps"] if step["use"] == "find_peaks"]
    processed(root / "lyso" / "2", content)
    with pytest.raises(BadRecipe, match=r"the cell of .* report runs of one sample together"):
        nearline.report("lyso/1-2", tmp_path / "r.html", root=root)


@pytest.mark.parametrize(
    ("runs", "options", "error", "words"),
    [
        ((), {}, BadName, "name a run"),
        ("lyso/1", {"processing": "p9"}, RunNotFound, "no processing 'p9'"),
        ("lyso/7", {}, RunNotFound, "lyso/7"),
        ((), {"sample": "o'hara"}, RunNotFound, "o''hara"),
    ],
    ids=["none named", "no such processing", "no such run", "no such sample"],
)
def test_what_is_not_there_is_said(pair, tmp_path, runs, options, error, words):
    with pytest.raises(error, match=words):
        nearline.report(runs, tmp_path / "r.html", root=pair, **options)
    assert not (tmp_path / "r.html").exists()


def test_a_run_that_is_not_processed_is_left_out(plain, tmp_path):
    for number in (1, 2):
        shutil.copytree(plain, tmp_path / "lyso" / str(number))
    for path in (tmp_path / "lyso" / "2" / "run.json", *(tmp_path / "lyso" / "2").glob("*.stream.json")):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"run": 2}))
    with pytest.raises(RunNotFound, match="it is not processed; nearline process"):
        nearline.report("lyso/1", tmp_path / "r.html", root=tmp_path)
    processed(tmp_path / "lyso" / "2", {"steps": [{"use": f"{__name__}:own_measures"}]})
    result = nearline.report("lyso/1-2", tmp_path / "r.html", root=tmp_path)
    assert result["left_out"] == {"lyso/1": "it is not processed; nearline process does that"}
    assert [run["run"] for run in result["figures"]["runs"]] == ["lyso/2"]


def test_frames_that_are_gone_are_left_out_with_a_word(pair, tmp_path):
    folder = tmp_path / "lyso" / "1"
    shutil.copytree(pair / "lyso" / "1", folder, ignore=shutil.ignore_patterns("c"))
    run = open_run(folder)
    found = gather([(run, run.processing("p1"))])
    assert example_pictures(found, mask_of(found.parts[0])) == []
    assert sum("is not shown" in note for note in figures_of(found).notes) == 3
    assert figures_of(found).n_frames == 50


# ---- warnings --------------------------------------------------------------------------------------------


def test_crystals_that_lie_alike_are_warned_of(taken, recipe):
    run = open_run(taken[0])
    found = gather([(run, run.processing("p1"))])
    assert not figures_of(found).orientation.is_preferred
    cell, n = found.cell, 200
    about = np.random.default_rng(0).uniform(0, 2 * np.pi, n)
    # c along y, turned at random about it.
    zero, one = np.zeros(n), np.ones(n)
    turned = np.array([[np.cos(about), np.sin(about), zero], [zero, zero, one], [np.sin(about), -np.cos(about), zero]])
    rows = np.full((n, len(CRYSTAL_COLUMNS)), 1.0)
    rows[:, :9] = (turned.transpose(2, 0, 1) @ cell.B).transpose(0, 2, 1).reshape(n, 9)
    found.crystals = Sample(len(CRYSTAL_COLUMNS))
    found.crystals.add(rows)
    (text,) = (text for text in figures_of(found).warnings if "preferred orientation" in text)
    assert "c* points up and down" in text


# ---- memory ----------------------------------------------------------------------------------------------


def test_a_sample_stays_small_and_even():
    sample = Sample(1, most=100)
    for start in range(0, 5000, 7):
        sample.add(np.arange(start, min(start + 7, 5000), dtype=float)[:, None])
    kept = sample.rows[:, 0]
    assert sample.n_seen == 5000
    assert not sample.is_whole
    assert 50 <= len(kept) <= 100
    assert len(set(np.diff(kept))) == 1
    assert kept[0] == 0


def test_blocks_stay_few_and_lose_no_frame():
    blocks, rng = Blocks(), np.random.default_rng(0)
    n_hits = n_peaks = 0
    for chunk in range(400):
        index, hit, peaks = np.arange(100) + 100 * chunk, rng.random(100) < 0.3, rng.integers(0, 50, 100)
        n_hits, n_peaks = n_hits + hit.sum(), n_peaks + peaks[hit].sum()
        blocks.add(index, hit, hit & (peaks > 20), peaks)
    groups = blocks.grouped(80)
    assert len(groups) <= 80
    assert sum(g.n_frames for g in groups) == 40_000
    assert (sum(g.n_hits for g in groups), sum(g.n_peaks for g in groups)) == (n_hits, n_peaks)
    assert [g.middle for g in groups] == sorted(g.middle for g in groups)
    assert np.average([g.middle for g in groups], weights=[g.n_frames for g in groups]) == pytest.approx(19_999.5)


def test_peaks_are_counted_where_they_are():
    found = DetectorMap((100, 400))
    found.add(np.array([0.0, 399.9, 401.0, -1.0, 7.9]), np.array([0.0, 99.9, 5.0, 5.0, 3.9]))
    assert found.factor == 4
    assert found.counts.shape == (25, 100)
    assert {(y, x): found.counts[y, x] for y, x in np.argwhere(found.counts)} == {(0, 0): 1, (24, 99): 1, (0, 1): 1}
    coarse, size = DetectorMap((4000, 4000)), 0
    coarse.add(np.full(500, 3999.0), np.full(500, 1.0))
    counts, size = coarse.coarse()
    assert counts.sum() == counts[0, -1] == 500
    assert size > coarse.factor


def test_the_middle_hit_has_the_median_of_peaks():
    counts, rng = PeakCounts(), np.random.default_rng(1)
    peaks, hit = rng.integers(0, 90, 501), np.ones(501, bool)
    counts.add(peaks, hit)
    counts.add(np.array([1000]), np.array([False]))
    assert counts.median_of_hits == int(np.median(peaks))
    assert counts.counts.sum() == 502


def test_the_clock_is_that_of_sealing(taken):
    run = open_run(taken[0])
    (part,) = gather([(run, run.processing("p1"))]).parts
    assert [frame for frame, _ in part.sealed] == [10, 20, 30, 40, 50]
    assert all(abs((datetime.now(UTC) - at).total_seconds()) < 3600 for _, at in part.sealed)
