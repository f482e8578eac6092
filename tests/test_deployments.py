"""Each deployment's entrypoint is a flow that exists, takes the parameters given, and is dotted."""

from pathlib import Path

import pytest
import yaml
from prefect.flows import load_flow_from_entrypoint

DEPLOYMENTS = yaml.safe_load((Path(__file__).parent.parent / "deployments" / "prefect.yaml").read_text())["deployments"]


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=[d["name"] for d in DEPLOYMENTS])
def test_entrypoint_is_a_flow_with_these_parameters(deployment) -> None:
    entrypoint = deployment["entrypoint"]
    flow = load_flow_from_entrypoint(entrypoint)

    assert ":" not in entrypoint
    assert flow.name == deployment["name"]
    assert set(deployment.get("parameters", {})) <= set(flow.parameters.properties)


def test_every_flow_is_deployed() -> None:
    assert {d["entrypoint"] for d in DEPLOYMENTS} == {
        "flows.process_run.process_run",
        "flows.export_nexus.export_nexus",
    }
