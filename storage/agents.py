"""Who computes here: program, source, environment, machine and user, as far as a program can tell of itself."""

import functools
import getpass
import json
import os
import platform
import socket
import subprocess
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

import blake3
from pydantic import Field

from storage.files import publish
from storage.models import Record

__all__ = ["AgentFacts", "environment_changes", "publish_environment", "read_environment", "this_agent"]

_GIT_TIMEOUT_S = 5


class AgentFacts(Record):
    """One process that computes, with all that may matter for its numbers."""

    program: str = "nearline"
    version: str = ""
    commit: str | None = Field(None, description="git commit of the source, with +changes if it differs from it")
    environment: str = Field("", description="blake3 of all installed distributions and versions, hex")
    python: str = ""
    host: str = ""
    machine: str = Field("", description="architecture and processor")
    user: str = ""
    pid: int = 0


@functools.cache
def this_agent() -> AgentFacts:
    """This process; looked up once (a tenth of a second)."""
    return AgentFacts(
        version=_version(),
        commit=_commit(),
        environment=_digest(_installed()),
        python=platform.python_version(),
        host=socket.gethostname(),
        machine=_machine(),
        user=_user(),
        pid=os.getpid(),
    )


def publish_environment(run: Path) -> str:
    """Keep the list of this environment's distributions in a run folder; its digest."""
    installed = _installed()
    digest = _digest(installed)
    path = _environment_path(run, digest)
    if not path.exists():
        publish(path, json.dumps(installed, indent=0).encode())
    return digest


def read_environment(run: Path, digest: str) -> dict[str, str] | None:
    """Distribution → version of an environment that computed in this run; None if it was not kept."""
    path = _environment_path(run, digest)
    return json.loads(path.read_bytes()) if digest and path.exists() else None


def environment_changes(before: dict[str, str]) -> dict[str, tuple[str | None, str | None]]:
    """Distributions whose version is another in this process: name → (then, now), None where it is not there."""
    now = _installed()
    names = sorted(before.keys() | now.keys())
    return {name: (before.get(name), now.get(name)) for name in names if before.get(name) != now.get(name)}


def _environment_path(run: Path, digest: str) -> Path:
    return run / "provenance" / "environments" / f"{digest}.json"


@functools.cache
def _installed() -> dict[str, str]:
    found = {str(d.metadata["Name"]).lower().replace("_", "-"): d.version for d in distributions()}
    return dict(sorted(found.items()))


def _digest(installed: dict[str, str]) -> str:
    return blake3.blake3(json.dumps(installed).encode()).hexdigest()


def _version() -> str:
    try:
        return version("nearline")
    except PackageNotFoundError:  # a bare clone, nothing installed
        return "unknown"


def _commit() -> str | None:
    """Of the repository this source lies in; None if it was installed without one."""
    source = Path(__file__).resolve().parent.parent
    if not (source / ".git").exists():
        return None
    try:
        commit = _git(source, "rev-parse", "HEAD")
        changes = _git(source, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+changes" if changes else commit


def _git(source: Path, *arguments: str) -> str:
    command = ["git", "--no-optional-locks", "-C", str(source), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S, check=True).stdout.strip()


def _machine() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return ", ".join([platform.machine(), *models[:1]])


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return str(os.getuid())
