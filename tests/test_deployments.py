"""Each declaration is held against what it speaks of: flows, units, Slurm's keywords, manifests."""

import configparser
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from prefect.flows import load_flow_from_entrypoint

from flows.deploying import FLOWS
from flows.experiment import load_experiment
from nearline.cli import app
from nearline.prefect_server import server_environment

FOLDER = Path(__file__).parent.parent / "deployments"
DEPLOYMENTS = yaml.safe_load((FOLDER / "prefect.yaml").read_text())["deployments"]
UNITS = sorted((FOLDER / "one-machine").glob("*.service"))
MANIFESTS = list(yaml.safe_load_all((FOLDER / "kubernetes" / "nearline.yaml").read_text()))


# ---- Prefect --------------------------------------------------------------------------------------


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=[d["name"] for d in DEPLOYMENTS])
def test_entrypoint_is_a_flow_with_these_parameters(deployment) -> None:
    entrypoint = deployment["entrypoint"]
    assert ":" not in entrypoint
    flow = load_flow_from_entrypoint(entrypoint)

    assert flow.name == deployment["name"].removesuffix("-again")
    assert set(deployment.get("parameters", {})) <= set(flow.parameters.properties)


def test_prefect_yaml_has_what_nearline_deploy_makes() -> None:
    mine = {(d["entrypoint"], d["work_pool"]["name"], d["name"].endswith("-again")) for d in DEPLOYMENTS}
    assert mine == {(f.entrypoint, f.pool, f.suffix == "-again") for f in FLOWS}


# ---- one machine ----------------------------------------------------------------------------------


@functools.cache
def prefect_options(*command: str) -> set[str]:
    """The options of a command of Prefect's, as its help names them."""
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1", "DO_NOT_TRACK": "1"}
    program = [sys.executable, "-m", "prefect", *command, "--help"]
    text = subprocess.run(program, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout
    return set(re.findall(r"--[a-z][a-z-]+", text))


def is_command(words: list[str]) -> None:
    """Fail unless these are a program of ours or Prefect's with options that it has."""
    program, *rest = words
    if Path(program).name == "nearline":
        command = typer.main.get_command(app).commands[rest[0]]  # type: ignore[attr-defined]
        command.make_context(rest[0], rest[1:])
        return
    assert Path(program).name == "prefect"
    options = {word for word in rest if word.startswith("--")}
    assert options <= prefect_options(*rest[:2]), f"prefect {' '.join(rest[:2])} has not all of {options}"


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_unit_is_whole(unit: Path) -> None:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(unit)
    assert {"Description", "After"} <= set(parser["Unit"])
    assert parser["Service"]["Restart"] == "always"
    assert parser["Install"]["WantedBy"] == "multi-user.target"
    is_command(parser["Service"]["ExecStart"].replace("%i", "live").replace("%H", "host").split())


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    for unit in UNITS:
        # What is not on this machine, its own account and folder, is not what is asked.
        text = unit.read_text().replace("/opt/nearline/.venv/bin/", "/bin/true ").replace("User=nearline\n", "")
        (tmp_path / unit.name).write_text(text)
    names = [str(tmp_path / unit.name.replace("@.", "@live.")) for unit in UNITS]
    (tmp_path / "nearline-worker@live.service").symlink_to(tmp_path / "nearline-worker@.service")
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *names], capture_output=True, text=True)
    assert [line for line in done.stderr.splitlines() if str(tmp_path) in line or "nearline-" in line] == []


def test_environment_is_that_of_our_own_servers() -> None:
    lines = (FOLDER / "one-machine" / "environment").read_text().splitlines()
    given = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    ours = server_environment(Path("/var/lib/nearline/prefect"), 4200)
    assert {name: ours.get(name) for name in given} == given


# ---- Slurm ----------------------------------------------------------------------------------------


def test_slurm_takes_the_documented_keywords() -> None:
    jobqueue = pytest.importorskip("dask_jobqueue", reason="dask-jobqueue is not installed")
    execution = load_experiment(FOLDER / "slurm" / "experiment.yaml").deployment.execution
    assert execution is not None
    assert execution.cluster == "dask_jobqueue.SLURMCluster"
    loopback = {"host": "127.0.0.1", "dashboard_address": None}
    with jobqueue.SLURMCluster(**execution.cluster_options, scheduler_options=loopback) as cluster:
        script = cluster.job_script()
    for line in ("#SBATCH -p beamline", "#SBATCH -A nearline", "#SBATCH --mem=32G", "#SBATCH -t 04:00:00"):
        assert line in script
    assert "source /opt/nearline/.venv/bin/activate" in script


# ---- Kubernetes -----------------------------------------------------------------------------------

API = {
    "Namespace": "v1", "PersistentVolumeClaim": "v1", "ConfigMap": "v1", "Service": "v1", "Deployment": "apps/v1",
}  # fmt: skip


def of_kind(kind: str) -> dict[str, dict[str, Any]]:
    return {m["metadata"]["name"]: m for m in MANIFESTS if m["kind"] == kind}


def test_manifests_have_what_kubernetes_requires() -> None:
    assert {(m["kind"], m["apiVersion"]) for m in MANIFESTS} == set(API.items())
    assert {m["metadata"].get("namespace", "nearline") for m in MANIFESTS} == {"nearline"}
    for claim in of_kind("PersistentVolumeClaim").values():
        assert claim["spec"]["accessModes"]
        assert claim["spec"]["resources"]["requests"]["storage"]
    for values in of_kind("ConfigMap").values():
        assert all(isinstance(v, str) for v in values["data"].values())
    for service in of_kind("Service").values():
        (target,) = [
            d for d in of_kind("Deployment").values() if d["metadata"]["labels"] == service["spec"]["selector"]
        ]
        ports = {p["containerPort"] for c in target["spec"]["template"]["spec"]["containers"] for p in c["ports"]}
        assert {p["targetPort"] for p in service["spec"]["ports"]} <= ports


@pytest.mark.parametrize("name", of_kind("Deployment"))
def test_pods_run_commands_that_exist_on_volumes_that_exist(name: str) -> None:
    spec = of_kind("Deployment")[name]["spec"]
    assert spec["selector"]["matchLabels"] == spec["template"]["metadata"]["labels"]
    pod = spec["template"]["spec"]
    volumes = {v["name"]: v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"]}
    assert set(volumes.values()) <= set(of_kind("PersistentVolumeClaim"))
    for container in pod["containers"]:
        assert container["image"]
        assert {m["name"] for m in container["volumeMounts"]} <= set(volumes)
        is_command(container["command"])


def test_each_pool_has_a_worker() -> None:
    commands = [d["spec"]["template"]["spec"]["containers"][0]["command"] for d in of_kind("Deployment").values()]
    assert {c[-1] for c in commands if "worker" in c} == {f.pool for f in FLOWS}
