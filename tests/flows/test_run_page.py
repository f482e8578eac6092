"""The run's page: charts, warnings in words, and what the forms of the flows say."""

import base64
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pyarrow as pa
import pytest
from prefect.utilities.callables import parameter_schema

from flows.canary_run import canary_run
from flows.charts import as_image, histogram, lines
from flows.export_nexus import export_nexus
from flows.merge_dataset import merge_dataset
from flows.process_run import process_run
from flows.reprocess_runs import reprocess_runs
from flows.retain_run import retain_run
from flows.run_page import RunPage
from flows.run_processing import ProcessRequest, run_processing
from flows.run_warnings import ChunkFigures, warnings_of
from flows.step_columns import StepColumns


def chunks(n: int, *, hits=10, indexed=5, lag=0, start=0, **values) -> list[ChunkFigures]:
    return [ChunkFigures(10 * k, 10 * k + 100, 100, hits, indexed, lag, **values) for k in range(start, start + n)]


def growing(n: int) -> list[ChunkFigures]:
    return [ChunkFigures(100 * k, 100 * k + 100, 100, 10, 5, 60 * k) for k in range(n)]


WARNINGS = [
    (chunks(20), []),
    (chunks(20) + chunks(5, hits=40, indexed=20, start=20), ["The hit rate rose from 10.0 % to 40.0 %"]),
    (chunks(20) + chunks(5, hits=0, indexed=0, start=20), ["No hits since frame 290"]),
    (chunks(6, hits=0, indexed=0), ["No hit on any of the 600 frames"]),
    (growing(12), ["The analysis falls behind"]),
    (chunks(20, n_reflections=90, n_saturated=10), ["10.0 % of reflections are saturated"]),
]


@pytest.mark.parametrize(("figures", "words"), WARNINGS, ids=[str(words) for _, words in WARNINGS])
def test_warnings_in_words(figures, words):
    found = warnings_of(figures)
    assert len(found) == len(words)
    assert all(text.startswith(start) for text, start in zip(found, words, strict=True))


def test_no_hits_are_no_news_where_nobody_seeks_them():
    assert warnings_of(chunks(6, hits=0, indexed=0), seeks_hits=False) == []


def test_charts_are_svg_whatever_the_values():
    for svg in (
        lines([1, 2, 3], {"a<b": [1.0, float("nan"), 3.0]}, title="t & u", x_label="x"),
        lines([], {"a": []}, title="t", x_label="x"),
        lines(range(5000), {"a": np.arange(5000.0)}, title="t", x_label="x"),
        lines([1, 2], {"a": [-3.0, -3.0]}, title="t", x_label="x", lowest=None),
        lines([], {"a": []}, title="t", x_label="x", lowest=None),
        histogram(np.array([1.0, 2.0, np.nan]), title="t", x_label="x"),
        histogram(np.empty(0), title="t", x_label="x"),
    ):
        assert ElementTree.fromstring(svg).tag.endswith("svg")
        assert len(svg) < 10_000
        assert base64.b64decode(as_image(svg, "x").partition("base64,")[2].rstrip(")")).decode() == svg


def test_page_holds_all_of_a_run(simulated_run, recipe, tmp_path, monkeypatch):
    shown: list[str] = []
    monkeypatch.setattr(
        "flows.markdown_page.MarkdownPage.show", lambda self, text, is_last=False: bool(shown.append(text))
    )
    folder = simulated_run.copy_to(tmp_path)
    summary = run_processing(
        ProcessRequest(run=str(folder), recipe=recipe.model_dump(mode="json")), reporter=RunPage(0.0)
    )
    text = shown[-1]
    assert f"**{summary['hits']}** hits" in text
    assert text.count("data:image/svg+xml") == 6
    assert text.count("data:image/jpeg") == len(summary["pictures"]) > 0
    assert summary["files"]["nexus"] in text
    assert len(text) < 500_000


def own_measures(chunk):
    """A scalar that rises with the index, one that is text, one that is mostly not there, and an array a frame."""
    index = chunk.frame_index
    return {
        "warmth": 300.0 + index,
        "label": np.array([f"shot {i}" for i in index]),
        "rare": np.where(index == 3, 7.0, np.nan),
        "ramp": np.where(np.arange(5) == 4, np.nan, np.add.outer(10.0 * index, np.arange(5.0))),
    }


def test_page_shows_the_columns_of_own_steps(simulated_run, tmp_path, monkeypatch):
    shown: list[str] = []
    monkeypatch.setattr(
        "flows.markdown_page.MarkdownPage.show", lambda self, text, is_last=False: bool(shown.append(text))
    )
    folder = simulated_run.copy_to(tmp_path)
    recipe = {"steps": [{"use": f"{__name__}:own_measures"}], "export": {"nexus": "none", "crystfel": False}}
    summary = run_processing(ProcessRequest(run=str(folder), recipe=recipe, n_threads=1), reporter=RunPage(0.0))

    text, n = shown[-1], summary["frames"]
    charts = [base64.b64decode(part).decode() for part in re.findall(r"svg\+xml;base64,([^)]+)\)", text)]
    titles = [re.search(r'bold">([^<]*)<', chart)[1] for chart in charts]
    assert titles[0] == "lag, frames"
    assert titles[1] == f"ramp, mean of {n} frames"
    assert [title.partition(",")[0] for title in titles[2:]] == ["warmth", "rare"]
    assert "hit" not in text, "nobody seeks hits here"
    # The array's mean rises by one an element from the mean of the ten-folds, and its last element is never there.
    (drawn,) = re.findall(r'points="([^"]*)"', charts[1])
    heights = [float(point.split(",")[1]) for point in drawn.split()]
    top = 10 * (n - 1) / 2 + 3
    expected = [126 - 102 * (top - 3 + i) / top for i in range(4)]
    assert heights == pytest.approx(expected, abs=0.06)


def test_columns_of_a_long_run_take_no_more_room():
    columns = StepColumns()
    for chunk in range(3000):
        index = np.arange(10 * chunk, 10 * chunk + 10)
        columns.take_in(pa.table({"frame_index": index, "x": 5.0 - index, "ok": index % 2 == 0}))
    kept = columns.scalars["x"]
    assert len(kept.at) <= 2000
    assert np.allclose(np.array(kept.means), 5.0 - np.array(kept.at))
    assert kept.at == sorted(kept.at)
    assert kept.at[-1] == 29_999
    assert "x over frames" in columns.charts()
    assert "ok over frames" in columns.charts()


ALL_FLOWS = [process_run, reprocess_runs, canary_run, merge_dataset, retain_run, export_nexus]


@pytest.mark.parametrize("flow", ALL_FLOWS, ids=lambda flow: flow.name)
def test_every_parameter_says_in_the_form_what_it_is(flow):
    for name, field in parameter_schema(flow.fn).properties.items():
        assert field["title"] != name
        assert len(field["description"]) > 15, name


def test_choices_and_limits_are_in_the_form():
    fields = parameter_schema(reprocess_runs.fn).properties
    assert fields["how"]["enum"] == ["subflows", "deployments"]
    assert (fields["parallel"]["minimum"], fields["parallel"]["maximum"]) == (1, 64)
