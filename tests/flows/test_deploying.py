"""Deploying into a real Prefect server, and real workers that run what was deployed."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psycopg
import pytest
import yaml
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.calls import canary_deployed
from flows.deploying import automation_name, deploy, flow_parameters, undeploy
from flows.experiment import Experiment, load_experiment, service_settings
from nearline.children import Children, free_port
from nearline.prefect_server import server_environment, wait_until_healthy
from storage.errors import BadExperiment, BadRecipe, ServiceUnavailable
from streaming.service import Service
from tests.flows.conftest import N_FRAMES, take_run

LYSOZYME = {"name": "lysozyme", "cell": [79.1, 79.1, 37.9, 90, 90, 90], "space_group": "P 43 21 2"}
INSULIN = {"name": "insulin", "cell": [78.9, 78.9, 78.9, 90, 90, 90], "space_group": "I 21 3"}
POOLS = ("lyso-live", "lyso-reprocess", "lyso-export")
INDEX = {"steps": [{"use": "find_peaks"}, {"use": "index"}]}


def written(folder: Path, name: str, **fields: object) -> Experiment:
    folder.mkdir(exist_ok=True)
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump({"experiment": name, "beamline": "I24", "recipes": {"r": INDEX}} | fields))
    return load_experiment(path)


def pools_of(name: str) -> dict:
    return {
        "pools": {role: {"name": f"{name}-{role}", "concurrency_limit": 2} for role in ("live", "reprocess", "export")}
    }


def api_of(server) -> str:
    return f"http://127.0.0.1:{server.port}/api"


def ask(api: str, path: str, body: dict | None = None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{api}{path}", data, {"Content-Type": "application/json"})
    for _ in range(20):
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code != 503:  # its SQLite is locked; try again, as Prefect's own client does
                raise
            time.sleep(0.5)
    raise AssertionError(f"{path}: 503 for ten seconds")


def actions(changes) -> dict[str, str]:
    return {f"{change.kind} {change.name}": change.action for change in changes if change.action != "left out"}


def test_second_deploy_changes_nothing_and_undeploy_leaves_nothing(prefect_server, tmp_path):
    api = api_of(prefect_server)
    experiment = written(tmp_path, "twice.1", samples=[LYSOZYME], deployment=pools_of("twice"))

    first, second = deploy(experiment, api), deploy(experiment, api)
    assert set(actions(first).values()) == {"created"}
    assert set(actions(second).values()) == {"unchanged"}
    assert {"deployment process-run/twice.1", "deployment process-run/twice.1-again"} <= set(actions(first))

    found = ask(api, "/deployments/name/process-run/twice.1")
    assert found["tags"] == ["nearline", "experiment:twice.1", "beamline:I24"]
    assert found["work_pool_name"] == "twice-live"
    assert found["parameters"]["recipe"]["sample"]["space_group"] == "P 43 21 2"
    assert {"run", "recipe"} <= set(found["parameter_openapi_schema"]["properties"])
    assert ask(api, "/variables/name/nearline_twice_1")["value"]["samples"] == ["lysozyme"]

    removed = actions(undeploy("twice.1", api))
    assert set(removed) == set(actions(first))
    assert set(removed.values()) == {"removed"}
    assert undeploy("twice.1", api) == []


def test_of_several_detectors_one_flow_run_processes_all(prefect_server, tmp_path):
    api = api_of(prefect_server)
    sources = [{"name": name, "endpoint": f"tcp://127.0.0.1:{port}"} for name, port in (("near", 9), ("far", 10))]
    experiment = written(tmp_path, "both", samples=[LYSOZYME], data_sources=sources, deployment=pools_of("both"))
    deploy(experiment, api)
    assert ask(api, "/deployments/name/process-run/both")["parameters"]["data_source"] == "all"
    assert "data_source" not in ask(api, "/deployments/name/export-nexus/both")["parameters"]
    undeploy("both", api)


def test_changes_of_the_file_are_named(prefect_server, tmp_path):
    api = api_of(prefect_server)
    before = written(tmp_path, "edited", samples=[LYSOZYME], deployment=pools_of("edited"))
    deploy(before, api)
    places = pools_of("edited")
    places["pools"]["live"]["concurrency_limit"] = 5
    after = written(tmp_path, "edited", beamline="I23", samples=[LYSOZYME], deployment=places | {"n_threads": 3})

    changes = {f"{c.kind} {c.name}": c for c in deploy(after, api)}
    assert changes["work pool edited-live"].detail == "limit 2 → 5"
    assert changes["work pool edited-export"].action == "unchanged"
    assert changes["deployment process-run/edited"].detail == "parameters, tags"
    assert changes["deployment export-nexus/edited"].detail == "tags"
    assert changes["variable nearline_edited"].detail == "beamline"
    assert changes[f"automation {automation_name('edited')}"].action == "unchanged"
    undeploy("edited", api)


def test_pools_stay_while_another_experiment_uses_them(prefect_server, tmp_path):
    api = api_of(prefect_server)
    for name in ("one", "two"):
        deploy(written(tmp_path / name, name, samples=[LYSOZYME], deployment=pools_of("shared")), api)

    kept = actions(undeploy("one", api))
    assert {kept[f"work pool shared-{role}"] for role in ("live", "reprocess", "export")} == {"kept"}
    assert ask(api, "/deployments/name/process-run/two")["name"] == "two"
    gone = actions(undeploy("two", api))
    assert {gone[f"work pool shared-{role}"] for role in ("live", "reprocess", "export")} == {"removed"}


def test_names_that_share_a_variable_are_refused(prefect_server, tmp_path):
    api = api_of(prefect_server)
    deploy(written(tmp_path / "a", "v-1", samples=[LYSOZYME], deployment=pools_of("v")), api)
    with pytest.raises(BadExperiment, match=r"nearline_v_1 belongs to 'v-1'"):
        deploy(written(tmp_path / "b", "v.1", samples=[LYSOZYME], deployment=pools_of("v")), api)
    for name in ("v-1", "v.1"):
        undeploy(name, api)


def test_samples_that_differ_leave_the_choice_to_the_flow(tmp_path):
    samples = [LYSOZYME | {"runs": "1-9"}, INSULIN | {"runs": "10-"}]
    experiment = written(tmp_path, "many", samples=samples, default_sample="insulin")
    assert flow_parameters(experiment)["recipe"] == f"experiment:{tmp_path / 'experiment.yaml'}"


def test_a_bad_recipe_is_refused_before_anything_changes(prefect_server, tmp_path):
    experiment = written(tmp_path, "bad", deployment=pools_of("bad"))
    with pytest.raises(BadRecipe, match="needs sample"):
        deploy(experiment, api_of(prefect_server))
    assert undeploy("bad", api_of(prefect_server)) == []


def test_a_server_that_is_away_is_named(tmp_path):
    experiment = written(tmp_path, "away", samples=[LYSOZYME])
    api = f"http://127.0.0.1:{free_port()}/api"
    with pytest.raises(ServiceUnavailable, match=api):
        deploy(experiment, api)


def emit(environment: dict[str, str], *runs: tuple[str, int]) -> None:
    code = """
import json, sys
from prefect.events import emit_event
for experiment, run in json.loads(sys.argv[1]):
    name = f"{experiment}/{run}"
    emit_event("nearline.run.started", payload={"experiment": experiment, "run": run, "name": name},
        resource={"prefect.resource.id": f"nearline.run.{experiment}.{run}", "prefect.resource.name": name})
"""
    subprocess.run([sys.executable, "-c", code, json.dumps(runs)], env=environment, check=True, timeout=60)


@pytest.mark.timeout(240)
def test_workers_run_what_an_event_and_a_person_ask_for(prefect_server, tmp_path):
    """From a clone: the workers stand elsewhere, and are told where the packages are by the deployment alone.

    The file has two samples, so the worker itself finds in it what the run is processed with.
    """
    api, (service_port, detector_port) = api_of(prefect_server), (free_port(), free_port())
    place = {"root": "data", "service": {"address": f"tcp://127.0.0.1:{service_port}"}} | pools_of("lyso")
    sources = [{"endpoint": f"tcp://127.0.0.1:{detector_port}"}]
    samples = [LYSOZYME | {"runs": "1-9"}, INSULIN | {"runs": "10-"}]
    experiment = written(
        tmp_path, "lyso", samples=samples, default_sample="insulin", data_sources=sources, deployment=place
    )
    deploy(experiment, api)
    environment = {k: v for k, v in prefect_server.environment.items() if k != "PYTHONPATH"}
    workers = Children(tmp_path / "logs")
    try:
        with Service(service_settings(experiment)) as service, pytest.MonkeyPatch.context() as context:
            context.chdir(tmp_path)
            for pool in POOLS:
                workers.start(pool, ["prefect", "worker", "start", "--type", "process", "--pool", pool], environment)
            run = take_run(service, sources[0]["endpoint"], tmp_path / "truth.parquet")
            emit(prefect_server.environment, ("lyso.2", 1), ("lyso", 1))
            export = ask(api, "/deployments/name/export-nexus/lyso")["id"]
            output = str(tmp_path / "lyso_1.h5")
            ask(api, f"/deployments/{export}/create_flow_run", {"parameters": {"run": "lyso/1", "output": output}})
            done = finished(api, workers, {"process lyso/1", "export lyso/1"})
            assert {f["state_type"] for f in done} == {"COMPLETED"}, [f["state"] for f in done]
            assert len(done) == 2, "nothing was started for lyso.2/1"
            assert os.path.getsize(output) > 1_000_000
            assert sum(chunk.n_frames for chunk in run.processings["p1"].chunks()) == N_FRAMES
            assert run.processings["p1"].manifest.recipe["sample"]["space_group"] == LYSOZYME["space_group"]
            options = {"service": service.address, "minutes": 0.05}
            context.setenv("PREFECT_API_URL", api)
            with temporary_settings({PREFECT_API_URL: api}):
                tried = canary_deployed("lyso/1", INDEX | {"sample": LYSOZYME}, options, timeout=100)
            assert tried["processing"] == "canary1"
            assert tried["part"][1] == N_FRAMES
            assert tried["comparison"]["a"]["name"].endswith(":p1")
    finally:
        workers.stop_all()
        undeploy("lyso", api)


def finished(api: str, workers: Children, names: set[str]) -> list[dict]:
    """The flow runs of the experiment, once those named have come to an end."""
    deadline = time.monotonic() + 150
    wanted = {"flow_runs": {"tags": {"all_": ["experiment:lyso"]}}}
    while True:
        found = ask(api, "/flow_runs/filter", wanted)
        ends = {f["name"] for f in found if f["state_type"] in ("COMPLETED", "FAILED", "CRASHED")}
        if names <= ends:
            return found
        for pool in POOLS:
            workers.check(pool)
            log = workers.log(pool).read_text()
        assert time.monotonic() < deadline, f"{[(f['name'], f['state_type']) for f in found]}\n{log[-3000:]}"
        time.sleep(0.5)


@pytest.mark.campaign
@pytest.mark.timeout(240)
def test_postgresql_under_prefect(postgres, tmp_path):
    """As docs/experiments.md says: one variable, and the deployments are in PostgreSQL."""
    with psycopg.connect(postgres.url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute("CREATE DATABASE prefect")
    url = postgres.url.replace("+psycopg", "+asyncpg").replace("/postgres?", "/prefect?")
    port = free_port()
    environment = server_environment(tmp_path / "home", port) | {"PREFECT_SERVER_DATABASE_CONNECTION_URL": url}
    server = Children(tmp_path / "logs")
    try:
        server.start("prefect", ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)], environment)
        wait_until_healthy(port, 150, lambda: server.check("prefect"))
        api = f"http://127.0.0.1:{port}/api"
        experiment = written(tmp_path, "lyso", samples=[LYSOZYME])
        deploy(experiment, api)
        assert set(actions(deploy(experiment, api)).values()) == {"unchanged"}
    finally:
        server.stop_all()
    with psycopg.connect(postgres.url.replace("+psycopg", "").replace("/postgres?", "/prefect?")) as connection:
        names = {name for (name,) in connection.execute("SELECT name FROM deployment")}
    assert names >= {"lyso", "lyso-again"}
