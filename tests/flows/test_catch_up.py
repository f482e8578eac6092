"""Catching up against a real Prefect server: runs that nobody started, flow runs whose process is gone."""

import os
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
import yaml
from prefect.client.schemas.objects import StateType
from prefect.states import Cancelled, Failed, Running

from flows.catch_up import CatchUp
from flows.decisions import Decision, decisions_of
from flows.deploying import deploy, prefect_client, undeploy
from flows.experiment import Experiment, load_experiment
from flows.keeping import due_vetoes
from flows.run_processing import ProcessRequest, run_processing
from flows.telling import event_id, tell_again
from flows.veto_frames import VetoRequest, next_step
from storage.errors import DeploymentNotFound, ServiceUnavailable
from storage.models import RunState
from storage.run_folder import RunFolder
from storage.step_store import Processing
from storage.stream_store import StreamStore
from storage.veto import undo_veto
from tests.storage.stores import new_header, put

NAME = "lyso"
NOBODY = "tcp://127.0.0.1:9"


@pytest.fixture
def deployed(prefect_server, simulated_run, tmp_path):
    """An experiment with one finished run that nobody has processed; and the address of the server."""
    simulated_run.copy_to(tmp_path / "data")
    path = tmp_path / "experiment.yaml"
    pools = {role: {"name": f"catch-up-{role}"} for role in ("live", "reprocess", "export")}
    content = {
        "experiment": NAME, "beamline": "I24", "recipes": {"r": {"steps": [{"use": "find_peaks"}]}},
        "deployment": {"root": "data", "pools": pools, "service": {"address": NOBODY}},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(content))
    experiment, api = load_experiment(path), f"http://127.0.0.1:{prefect_server.port}/api"
    deploy(experiment, api)
    yield experiment, api
    with prefect_client(api) as client:
        for flow_run in client.read_flow_runs():
            if flow_run.deployment_id is not None and "catch-up" in (flow_run.tags or []):
                client.delete_flow_run(flow_run.id)
    undeploy(NAME, api)


def with_retention(experiment: Experiment, **retention) -> Experiment:
    """The same, as if its file had said so; deployed already."""
    kept = experiment.retention.model_copy(update=retention)
    return experiment.model_copy(update={"retention": kept})


def catch_up(experiment: Experiment, api: str) -> list:
    return CatchUp(experiment, api, patience_s=0).look()


def read(api: str, flow_run_id: str):
    with prefect_client(api) as client:
        return client.read_flow_run(UUID(flow_run_id))


def pretend(api: str, flow_run_id: str, state, pid: int | None = None) -> None:
    """Say of a flow run what its worker would have said."""
    with prefect_client(api) as client:
        client.set_flow_run_state(UUID(flow_run_id), state, force=True)
        if pid is not None:
            client.update_flow_run(UUID(flow_run_id), infrastructure_pid=str(pid))


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_run_that_nobody_processed_is_started_once(deployed):
    experiment, api = deployed
    (deed,) = catch_up(experiment, api)
    assert (deed.run, deed.action, deed.why) == ("lyso/1", "started", "nobody has processed it")
    flow_run = read(api, deed.flow_run_id)
    assert flow_run.parameters["run"] == "lyso/1"
    assert flow_run.work_pool_name == "catch-up-reprocess", "an old run does not stand before live ones"
    assert {"experiment:lyso", "catch-up"} <= set(flow_run.tags)
    assert catch_up(experiment, api) == [], "it waits for a worker"


def test_a_processed_run_is_left_alone(deployed):
    experiment, api = deployed
    recipe = {"steps": [{"use": "find_peaks"}]}
    run_processing(ProcessRequest(run=str(experiment.root / "lyso" / "1"), recipe=recipe))
    assert catch_up(experiment, api) == []


def test_a_run_of_two_detectors_is_done_when_both_are(deployed):
    experiment, api = deployed
    second = experiment.data_sources[0].model_copy(update={"name": "jungfrau", "endpoint": "tcp://127.0.0.1:31002"})
    experiment = experiment.model_copy(update={"data_sources": (*experiment.data_sources, second)})
    folder = RunFolder.open(experiment.root / "lyso" / "1")
    detector = folder.stream_header("eiger").detector
    store = StreamStore.create(folder, new_header(data_source="jungfrau", detector=detector))
    put(store, 0, 1, 2)
    store.finish(3, "lost")
    store.close()
    recipe = {"steps": [{"use": "find_peaks"}]}
    for source, deeds in (("eiger", ["started"]), ("jungfrau", [])):
        run_processing(ProcessRequest(run=str(folder.path), recipe=recipe, data_source=source))
        assert [deed.action for deed in catch_up(experiment, api)] == deeds
        if deeds:
            with prefect_client(api) as client:  # or it would be under way
                for flow_run in client.read_flow_runs():
                    client.delete_flow_run(flow_run.id)


@pytest.mark.parametrize("pid", [None, "dead"])
def test_a_flow_run_of_another_kind_whose_process_is_gone_is_ended_and_left(deployed, pid):
    """Or it would hold its place in the pool for ever."""
    experiment, api = deployed
    run_processing(ProcessRequest(run=str(experiment.root / "lyso" / "1"), recipe={"steps": [{"use": "find_peaks"}]}))
    with prefect_client(api) as client:
        deployment = client.read_deployment_by_name(f"reprocess-runs/{NAME}")
        made = client.create_flow_run_from_deployment(deployment.id, parameters={"runs": ["lyso/1"]}, tags=["catch-up"])
    assert catch_up(experiment, api) == [], "it waits for a worker"
    pretend(api, str(made.id), Running(), dead_pid() if pid else None)
    deeds = catch_up(experiment, api)
    assert [deed.action for deed in deeds] == (["ended"] if pid else []), "a worker may be about to name its process"
    assert read(api, str(made.id)).state.type is (StateType.CRASHED if pid else StateType.RUNNING)
    assert catch_up(experiment, api) == []


def test_runs_go_when_the_file_says_so(deployed):
    experiment, api = deployed
    run_processing(ProcessRequest(run=str(experiment.root / "lyso" / "1"), recipe={"steps": [{"use": "find_peaks"}]}))
    assert catch_up(with_retention(experiment, older_than="30d"), api) == []
    assert catch_up(with_retention(experiment, older_than="0min", keep_last=1), api) == []
    (deed,) = catch_up(with_retention(experiment, older_than="0min"), api)
    assert (deed.run, deed.action) == ("lyso/1", "deleted")
    folder = RunFolder.open(experiment.root / "lyso" / "1")
    assert folder.state is RunState.deleted
    assert "retention of lyso" in str([event.payload for event in folder.events("run_deleted")])


def test_non_hits_are_marked_and_go_when_their_time_is_over(deployed):
    experiment, api = deployed
    run = experiment.root / "lyso" / "1"
    recipe = {"steps": [{"use": "find_peaks"}]}
    run_processing(ProcessRequest(run=str(run), recipe=recipe))
    experiment = with_retention(experiment, veto_non_hits="1min")
    work = CatchUp(experiment, api, patience_s=0)
    (deed,) = work.look()
    assert (deed.run, deed.action, deed.why) == ("lyso/1", "started", "retain-run: marked by p1: not a hit")
    asked = read(api, deed.flow_run_id)
    assert asked.work_pool_name == "catch-up-reprocess"
    assert asked.parameters | {"grace": ""} == asked.parameters | {"run": "lyso/1", "processing": "p1", "grace": ""}
    assert [work.look(), catch_up(experiment, api)] == [[], []], "it is asked for once"
    # It is asked for again if it has failed.
    pretend(api, deed.flow_run_id, Failed(message="disk full"))
    (again,) = catch_up(experiment, api)
    assert (again.action, again.why) == ("started", deed.why)
    assert again.flow_run_id != deed.flow_run_id
    for _ in range(2):
        pretend(api, again.flow_run_id, Failed(message="disk full"))
        (again,) = catch_up(experiment, api)
    assert (again.action, "failed 3 times" in again.why) == ("left", True)
    # What the flow does, without a worker: as marked, nothing is due for an hour, and then it is.
    given = {name: asked.parameters[name] for name in ("run", "processing", "grace")}
    step = next_step(VetoRequest(**given | {"run": str(run)}, by="test"))
    assert step.stage == "marked"
    assert step.plan.due_at > datetime.now(UTC) + timedelta(minutes=55)
    assert list(due_vetoes(experiment)) == []
    undo_veto(RunFolder.open(run), by="test")
    assert list(due_vetoes(experiment)) == [], "somebody wants to keep them"


def test_a_decision_that_the_server_missed_is_told_once(deployed):
    experiment, api = deployed
    recipe, run = {"steps": [{"use": "find_peaks"}]}, str(experiment.root / "lyso" / "1")
    run_processing(ProcessRequest(run=run, recipe=recipe, stop=("n_frames >= 5",)))  # nobody is told
    looks = CatchUp(experiment, api, patience_s=0)
    (deed,) = looks.look()
    assert (deed.run, deed.action) == ("lyso/1", "told")
    assert "n_frames >= 5" in deed.why
    assert looks.look() == []
    (decision,) = decisions_of(Processing(experiment.root / "lyso" / "1", "p1"))
    event = wait_for_event(api, event_id(decision))
    assert event["event"] == "nearline.run.enough"
    assert event["payload"]["values"] == {"n_frames": 10.0}
    assert catch_up(experiment, api) == [], "another catch-up finds it on the server"


def test_more_decisions_than_the_server_answers_for_at_once(prefect_server):
    api, made = f"http://127.0.0.1:{prefect_server.port}/api", datetime.now(UTC)
    decisions = [
        Decision(
            criterion=f"n_frames >= {n}", at=made, run="lyso/77", processing="p1", chunk=n, values={"n_frames": n},
            inputs=[], recipe_digest="digest",
        )
        for n in range(60)
    ]  # fmt: skip
    with prefect_client(api) as client:
        assert tell_again(client, decisions) == decisions
        for decision in decisions:
            wait_for_event(api, event_id(decision))
        assert tell_again(client, decisions) == []


def wait_for_event(api: str, known_as: UUID) -> dict:
    """The server writes events in batches."""
    deadline = time.monotonic() + 30
    with prefect_client(api) as client:
        while True:
            answer = client.request("POST", "/events/filter", json={"filter": {"id": {"id": [str(known_as)]}}})
            if events := answer.json()["events"]:
                return events[0]
            assert time.monotonic() < deadline, "the event did not arrive"
            time.sleep(0.2)


def test_a_run_that_somebody_works_on_is_left_alone(deployed):
    experiment, api = deployed
    run = experiment.root / "lyso" / "1"
    recipe = {"steps": [{"use": "find_peaks"}]}
    summary = run_processing(ProcessRequest(run=str(run), recipe=recipe))
    processing = Processing(run, summary["processing"])
    (processing.folder / "summary.json").unlink()  # as if it were under way
    claim = processing.claim()
    assert catch_up(experiment, api) == []
    os.close(claim)
    assert [deed.action for deed in catch_up(experiment, api)] == ["started"]


def test_a_flow_run_whose_process_is_gone_is_ended_and_its_run_started_anew(deployed):
    experiment, api = deployed
    (first,) = catch_up(experiment, api)
    pretend(api, first.flow_run_id, Running(), dead_pid())
    ended, started = catch_up(experiment, api)
    assert (ended.action, started.action) == ("ended", "started")
    assert read(api, first.flow_run_id).state.type is StateType.CRASHED
    assert "is gone" in read(api, first.flow_run_id).state.message
    assert started.flow_run_id != first.flow_run_id
    assert "ended as Crashed" in started.why


def test_a_flow_run_at_work_is_left_alone(deployed):
    experiment, api = deployed
    (first,) = catch_up(experiment, api)
    environment = os.environ | {"PREFECT__FLOW_RUN_ID": first.flow_run_id}
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env=environment)
    try:
        pretend(api, first.flow_run_id, Running(), process.pid)
        assert catch_up(experiment, api) == []
        # The same number, but another program: the machine was started anew.
        other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        pretend(api, first.flow_run_id, Running(), other.pid)
        assert [deed.action for deed in catch_up(experiment, api)] == ["ended", "started"]
        other.communicate(b"\n")
    finally:
        process.communicate(b"\n")


def test_what_somebody_cancelled_stays_so(deployed):
    experiment, api = deployed
    (first,) = catch_up(experiment, api)
    pretend(api, first.flow_run_id, Cancelled())
    work = CatchUp(experiment, api, patience_s=0)
    (deed,) = work.look()
    assert deed.action == "left"
    assert "cancelled" in deed.why
    assert work.look() == [], "it is said once"


def test_what_fails_again_and_again_is_left_to_people(deployed):
    experiment, api = deployed
    for _ in range(3):
        (deed,) = catch_up(experiment, api)
        assert deed.action == "started"
        pretend(api, deed.flow_run_id, Failed(message="no such mask"))
    (deed,) = catch_up(experiment, api)
    assert deed.action == "left"
    assert "failed 3 times" in deed.why


def test_an_experiment_that_is_not_deployed_is_named(deployed):
    experiment, api = deployed
    undeploy(NAME, api)
    with pytest.raises(DeploymentNotFound, match="nearline deploy"):
        catch_up(experiment, api)
    with pytest.raises(ServiceUnavailable, match="does not answer"):
        catch_up(experiment, "http://127.0.0.1:9/api")
    deploy(experiment, api)
