"""The run's page: charts, warnings in words, and what the forms of the flows say."""

import base64
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from prefect.utilities.callables import parameter_schema

from flows.canary_run import canary_run
from flows.charts import as_image, histogram, lines
from flows.reprocess_runs import reprocess_runs
from flows.run_page import RunPage
from flows.run_processing import ProcessRequest, run_processing
from flows.run_warnings import ChunkFigures, warnings_of


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


def test_charts_are_svg_whatever_the_values():
    for svg in (
        lines([1, 2, 3], {"a<b": [1.0, float("nan"), 3.0]}, title="t & u", x_label="x"),
        lines([], {"a": []}, title="t", x_label="x"),
        lines(range(5000), {"a": np.arange(5000.0)}, title="t", x_label="x"),
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


@pytest.mark.parametrize("flow", [reprocess_runs, canary_run], ids=lambda flow: flow.name)
def test_every_parameter_says_in_the_form_what_it_is(flow):
    for name, field in parameter_schema(flow.fn).properties.items():
        assert field["title"] != name
        assert len(field["description"]) > 15, name


def test_choices_and_limits_are_in_the_form():
    fields = parameter_schema(reprocess_runs.fn).properties
    assert fields["how"]["enum"] == ["subflows", "deployments"]
    assert (fields["parallel"]["minimum"], fields["parallel"]["maximum"]) == (1, 64)
