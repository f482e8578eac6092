"""Hosts on one machine: network namespaces on a switch, whose links can be cut; they share nothing but a folder."""

import contextlib
import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..servers import PostgresServer

__all__ = ["Host", "HostPostgres", "Network", "why_not"]

_numbers = itertools.count()
_NETWORK = "10.213.7"


def why_not() -> str | None:
    """Why no namespaces can be made here; None where they can."""
    if shutil.which("ip") is None:
        return "network namespaces need the program ip (Debian: apt install iproute2)"
    name = _new_name("try")
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces are not permitted here (ip netns add: {made.stderr.strip()}); they need root"
    _ip("netns", "del", name)
    return None


class Host:
    """A network namespace with one address; everything in it sees only that network and a loopback of its own."""

    def __init__(self, namespace: str, address: str, switch: str, port: str) -> None:
        self.namespace, self.address = namespace, address
        self._switch, self._port = switch, port

    def command(self, *command: str) -> list[str]:
        """A command as it is to be run, so that it runs on this host."""
        return ["ip", "netns", "exec", self.namespace, *command]

    @property
    def number(self) -> int:
        """What a process on this host finds as the inode of ``/proc/self/ns/net``."""
        return os.stat(f"/run/netns/{self.namespace}").st_ino

    @contextlib.contextmanager
    def cut_off(self) -> Iterator[None]:
        """With its cable pulled at the switch: no packet comes or goes, and nobody is told."""
        _ip("-n", self._switch, "link", "set", self._port, "down")
        try:
            yield
        finally:
            _ip("-n", self._switch, "link", "set", self._port, "up")

    def cut_off_for(self, seconds: float) -> None:
        with self.cut_off():
            time.sleep(seconds)


class Network:
    """A switch in a namespace of its own, and the hosts at it; a context manager that removes them."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._n_hosts = 0

    def __enter__(self) -> "Network":
        with contextlib.ExitStack() as stack:
            self._switch = self._namespace(stack, "switch")
            _ip("-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "bridge", "up")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def host(self, name: str) -> Host:
        """A new host, its link up."""
        self._n_hosts += 1
        address, port = f"{_NETWORK}.{self._n_hosts}", f"port{self._n_hosts}"
        namespace = self._namespace(self._stack, name)
        # Made inside the switch: no name of ours appears on the machine's own network.
        peer = ("peer", "name", "eth0", "netns", namespace)
        _ip("-n", self._switch, "link", "add", port, "type", "veth", *peer)
        _ip("-n", self._switch, "link", "set", port, "master", "bridge", "up")
        _ip("-n", namespace, "address", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", namespace, "link", "set", "eth0", "up")
        return Host(namespace, address, self._switch, port)

    def _namespace(self, stack: contextlib.ExitStack, name: str) -> str:
        namespace = _new_name(name)
        _ip("netns", "add", namespace)
        stack.callback(_ip, "netns", "del", namespace)
        _ip("-n", namespace, "link", "set", "lo", "up")
        return namespace


class HostPostgres(PostgresServer):
    """PostgreSQL on a host of the network, for all others there."""

    def __init__(self, programs: Path, host: Host) -> None:
        self._host = host
        super().__init__(programs)

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://nearline@{self._host.address}/postgres"

    def start(self) -> None:
        with open(self._folder / "data" / "pg_hba.conf", "a") as file:
            file.write(f"host all all {_NETWORK}.0/24 trust\n")
        options = ["-k", str(self._folder), "-c", f"listen_addresses={self._host.address}", "-c", "fsync=off"]
        # Only root enters a namespace, and as root the server does not run.
        nobody = ["setpriv", "--reuid", self._user["user"], "--regid", str(self._user["group"]), "--clear-groups"]
        server = [str(self._programs / "postgres"), "-D", str(self._folder / "data"), *options]
        with open(self._folder / "log", "ab") as log:
            self.process = subprocess.Popen(self._host.command(*nobody, *server), stdout=log, stderr=log, cwd="/")
        self._wait()


def require_namespaces() -> None:
    """Skip the test, with the reason, where no namespaces can be made."""
    if reason := why_not():
        pytest.skip(reason)


def _new_name(name: str) -> str:
    return f"nearline-{os.getpid()}-{next(_numbers)}-{name}"


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
