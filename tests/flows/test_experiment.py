"""Experiment files: what they may say, what is wrong with them in words, and what holds for a run."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from flows.experiment import (
    EXAMPLE,
    RECIPE_PREFIX,
    Experiment,
    load_experiment,
    parse_ranges,
    recipe_for,
    recipe_of_run,
    resolve_recipe,
    retention_policy,
    sample_for,
    serve_arguments,
    service_settings,
    stop_for,
)
from storage.errors import BadExperiment, BadRecipe
from streaming.service import DEFAULT_ADDRESS

ROOT = Path(__file__).parents[2]
MINIMAL: dict[str, Any] = {"experiment": "lyso-2026", "beamline": "I24"}
LYSOZYME = {"name": "lysozyme", "cell": [79.1, 79.1, 37.9, 90, 90, 90], "space_group": "P 43 21 2"}
INSULIN = {"name": "insulin", "cell": [78.9, 78.9, 78.9, 90, 90, 90], "space_group": "I 21 3"}
PEAKS = {"steps": [{"use": "find_peaks"}]}
INDEX = {"steps": [{"use": "find_peaks"}, {"use": "index"}]}


def written(folder: Path, **fields: Any) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(MINIMAL | fields))
    return path


def test_two_fields_are_enough(tmp_path):
    experiment = load_experiment(written(tmp_path))
    assert experiment.root == tmp_path / "nearline-data"
    assert [step.use for step in recipe_for(experiment).steps] == ["bin", "find_peaks"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"experiment": "a/b"}, ["experiment", "'a/b'", "use letters"]),
        ({"beamlin": "x"}, ["beamlin", "no such field", "beamline"]),
        ({"beamline": None}, ["beamline: missing", "add it"]),
        ({"samples": [{"name": "x", "cel": 1}]}, ["samples.0.cel", "no such field", "space_group"]),
        ({"samples": [{"name": "x", "cell": [1, 2, 3, 4, 5, 6]}]}, ["samples.0", "add space_group"]),
        ({"samples": [LYSOZYME | {"runs": "5-2"}]}, ["samples.0.runs", "'5-2'", "smaller number first"]),
        ({"samples": [LYSOZYME | {"recipe": "fast"}]}, ["'fast'", "recipes has none"]),
        ({"samples": [LYSOZYME | {"runs": "1-5"}, INSULIN | {"runs": "5"}]}, ["run 5", "lysozyme", "insulin"]),
        ({"samples": [LYSOZYME, LYSOZYME]}, ["lysozyme", "twice"]),
        ({"data_sources": [{"endpoint": "10.0.0.1:31001"}]}, ["data_sources.0.endpoint", "'10.0.0.1:31001'", "tcp"]),
        ({"data_sources": [{"kind": "jungfrau"}]}, ["data_sources.0.kind", "'jungfrau'", "dectris-stream-2"]),
        ({"stop": ["n_indexed > 3", " "]}, ["stop", "empty stop criterion"]),
        ({"retention": {"older_than": "soon"}}, ["retention.older_than", "'soon'", "30d"]),
        ({"deployment": {"execution": {"kind": "gpu"}}}, ["deployment.execution.kind", "'gpu'", "dask"]),
        ({"deployment": {"execution": {"kind": "threads", "address": "x"}}}, ["kind: dask"]),
        ({"deployment": {"pools": {"live": {"name": "export"}}}}, ["deployment.pools", "name each differently"]),
        ({"deployment": {"service": {"adress": "x"}}}, ["deployment.service.adress", "no such field", "address"]),
        ({"recipes": {"a": PEAKS, "b": PEAKS}}, ["default_recipe", "a, b"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_errors_name_file_field_value_and_remedy(tmp_path, fields, words):
    path = written(tmp_path, **fields)
    with pytest.raises(BadExperiment) as caught:
        load_experiment(path)
    assert [word for word in [str(path), *words] if word not in str(caught.value)] == []


@pytest.mark.parametrize(("text", "word"), [("a: [", "YAML"), ("- 1", "list"), (None, "nearline init")])
def test_no_experiment_at_all(tmp_path, text, word):
    path = tmp_path / "e.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(BadExperiment, match=word):
        load_experiment(path)


def test_models_are_frozen_and_every_field_is_described():
    def described(schema: dict[str, Any]) -> list[str]:
        models = {"Experiment": schema, **schema["$defs"]}
        return [
            f"{model}.{field}"
            for model, content in models.items()
            for field, about in content["properties"].items()
            if not about.get("description")
        ]

    assert described(Experiment.model_json_schema()) == []
    with pytest.raises(ValueError, match="frozen"):
        Experiment.model_validate(MINIMAL).title = "other"  # type: ignore[misc]


def test_committed_schema_is_current():
    committed = json.loads((ROOT / "docs" / "experiment.schema.json").read_text())
    assert committed == Experiment.model_json_schema(), "nearline init --schema > docs/experiment.schema.json"


def test_example_shows_every_field_with_its_default():
    text, schema = EXAMPLE.read_text(), Experiment.model_json_schema()
    fields = {f for model in (schema, *schema["$defs"].values()) for f in model["properties"]}
    assert (
        sorted(
            f
            for f in fields
            if f"{f}:" not in text and f not in ("address", "cluster", "cluster_options", "threads_per_worker")
        )
        == []
    )
    shown = yaml.safe_load(re.sub(r"^(\s+)# (?=\w+:)", r"\1", text, flags=re.MULTILINE))
    service = {k: v for k, v in shown["deployment"]["service"].items() if v is not None}
    assert load_experiment(EXAMPLE).deployment.service.model_dump(exclude_none=True) == service


@pytest.mark.parametrize(
    ("text", "numbers"),
    [("", []), ("3", [3]), ("1-3, 7", [1, 2, 3, 7]), (" 2 - 2 ", [2])],
)
def test_run_ranges_hold_both_ends(text, numbers):
    assert [n for part in parse_ranges(text) for n in part] == numbers


@pytest.mark.parametrize(
    ("run", "named", "expected"),
    [(3, None, "lysozyme"), (30, None, "insulin"), (3, "insulin", "insulin"), (3, "unheard", "lysozyme"),
     (15, None, "lysozyme"), (None, None, "lysozyme")],
)  # fmt: skip
def test_sample_by_name_then_number_then_default(tmp_path, run, named, expected):
    samples = [LYSOZYME | {"runs": "1-9"}, INSULIN | {"runs": "20-", "stop": ["minutes >= 5"]}]
    path = written(tmp_path, samples=samples, default_sample="lysozyme", recipes={"r": INDEX}, stop=["n_indexed > 9"])
    experiment = load_experiment(path)
    assert sample_for(experiment, run, named).name == expected
    recipe = recipe_for(experiment, run, named)
    assert (recipe.sample.name, recipe.sample.space_group) == (
        expected, "P 43 21 2" if expected == "lysozyme" else "I 21 3"
    )  # fmt: skip
    assert stop_for(experiment, run, named) == (("minutes >= 5",) if expected == "insulin" else ("n_indexed > 9",))


def test_recipe_file_keeps_its_own_relative_paths(tmp_path, monkeypatch):
    folder = tmp_path / "recipes"
    folder.mkdir()
    np.save(folder / "mask.npy", np.zeros((4, 4), np.uint8))
    (folder / "r.yaml").write_text(yaml.safe_dump(PEAKS | {"mask": "mask.npy", "export": {"nexus": "all"}}))
    experiment = load_experiment(written(tmp_path, recipes={"r": "recipes/r.yaml"}, exports={"nexus": "hits"}))
    monkeypatch.chdir("/")
    recipe = recipe_for(experiment)
    assert recipe.mask == str(folder / "mask.npy")
    assert recipe.name == "r"
    assert (recipe.export.nexus, recipe.export.crystfel) == ("hits", True)


def test_cell_file_beside_the_experiment(tmp_path, monkeypatch):
    (tmp_path / "l.pdb").write_text("CRYST1   79.100   79.100   37.900  90.00  90.00  90.00 P 43 21 2     8\n")
    path = written(tmp_path, samples=[{"name": "lysozyme", "cell": "l.pdb"}])
    monkeypatch.chdir("/")
    recipe = recipe_for(load_experiment(path))
    assert recipe.sample.cell[2] == 37.9
    assert [step.use for step in recipe.steps] == ["bin", "find_peaks", "index", "integrate"]


def test_bad_recipe_is_named_with_its_sample(tmp_path):
    experiment = load_experiment(written(tmp_path, samples=[{"name": "salt"}], recipes={"r": INDEX}))
    with pytest.raises(BadRecipe, match=r"recipe r for sample salt.*needs sample"):
        recipe_for(experiment)


def test_own_steps_are_found_in_python_path(tmp_path):
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "steps_of_experiment.py").write_text("def mean(chunk):\n    return {}\n")
    recipe = {"steps": [{"use": "steps_of_experiment:mean"}]}
    path = written(tmp_path, recipes={"r": recipe}, deployment={"python_path": ["steps"]})
    assert recipe_for(load_experiment(path)).steps[0].name == "mean"


def test_flow_resolves_the_recipe_of_its_run(tmp_path):
    path = written(tmp_path, samples=[LYSOZYME | {"runs": "1-9"}, INSULIN | {"runs": "10-"}], recipes={"r": INDEX})
    by_file = f"{RECIPE_PREFIX}{path}"
    assert resolve_recipe(by_file, "lyso-2026/12").sample.name == "insulin"
    assert resolve_recipe(by_file, "/data/lyso-2026/12/", "lysozyme").sample.name == "lysozyme"
    content = recipe_of_run(path, "lyso-2026/3")
    assert resolve_recipe(content, "lyso-2026/12").sample.name == "lysozyme"


def test_service_is_started_as_the_file_says(tmp_path):
    sources = [{"endpoint": "tcp://10.0.0.1:31001"}, {"name": "side", "endpoint": "tcp://h:1", "persistence": "online"}]
    place = {
        "bind": "tcp://127.0.0.1:7000",
        "buffer_gib": 2,
        "upload_to": "s3://b/p",
        "http_port": 8601,
        "encrypts": True,
    }
    experiment = load_experiment(written(tmp_path, data_sources=sources, deployment={"service": place}))
    settings = service_settings(experiment)
    assert (settings.bind, settings.buffer_bytes, settings.experiment) == ("tcp://127.0.0.1:7000", 2 << 30, "lyso-2026")
    assert [(s.name, s.persistence) for s in settings.sources] == [("eiger", "stored"), ("side", "online")]
    assert (settings.upload_to, settings.encrypts) == ("s3://b/p", True)
    assert experiment.deployment.service.address == DEFAULT_ADDRESS
    arguments = serve_arguments(experiment)
    pairs = dict(zip(arguments[::2], arguments[1::2], strict=False))
    assert pairs["--buffer"] == "2"
    assert pairs["--online"] == "side"
    assert pairs["--http"] == "8601"
    assert "--encrypt" in arguments


def test_serve_takes_these_arguments():
    import typer

    from nearline.cli import app

    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    arguments = serve_arguments(load_experiment(EXAMPLE))
    assert serve.make_context("serve", arguments, resilient_parsing=False).params["experiment"] == "lyso-2026"


def test_retention_is_the_file_s_rule(tmp_path):
    assert retention_policy(load_experiment(written(tmp_path, retention={"keep_last": 3}))) is None
    policy = retention_policy(load_experiment(written(tmp_path, retention={"older_than": "30d", "keep_last": 3})))
    assert (policy.older_than.days, policy.keep_last, policy.experiment) == (30, 3, "lyso-2026")
