"""Real servers that tests start themselves: one that speaks S3, and PostgreSQL."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_DEFAULT_REGION": "us-east-1"}


@contextlib.contextmanager
def s3_server(port: int = 0) -> Iterator[str]:
    """The address of an object store on loopback, empty at first."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield f"http://{host}:{port}"
    finally:
        server.stop()


def new_bucket(address: str, environment: pytest.MonkeyPatch) -> str:
    """``s3://…`` of an empty bucket; the environment then leads to its server."""
    import s3fs

    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": address}.items():
        environment.setenv(name, value)
    name = f"tests-{os.urandom(6).hex()}"
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def postgres_programs() -> Path | None:
    """The folder of Debian's or anybody's ``initdb`` and ``postgres``; None where there is none."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    return next((f for f in reversed(folders) if (f / "postgres").exists() and (f / "initdb").exists()), None)


class PostgresServer:
    """A PostgreSQL cluster of its own in a temporary folder, reached by a Unix socket in it.

    The server refuses to run as root: then it runs as ``nobody``.
    """

    def __init__(self, programs: Path) -> None:
        self._programs = programs
        self._folder = Path(tempfile.mkdtemp(prefix="nearline-postgres-"))
        self._user = {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid} if os.geteuid() == 0 else {}
        if self._user:
            shutil.chown(self._folder, self._user["user"])
        options = ["-D", str(self._folder / "data"), "-U", "nearline", "--auth=trust", "--no-sync"]
        self._run("initdb", *options, "--encoding=UTF8", "--locale=C")
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql+psycopg://nearline@/postgres?host={self._folder}"

    def start(self) -> None:
        command = [str(self._programs / "postgres"), "-D", str(self._folder / "data"), "-k", str(self._folder)]
        log = open(self._folder / "log", "ab")  # noqa: SIM115 (the server's, while it lives)
        self.process = subprocess.Popen(
            [*command, "-c", "listen_addresses=", "-c", "fsync=off"], stdout=log, stderr=log, cwd="/", **self._user
        )
        log.close()
        self._wait()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        # A killed server's children end by themselves once they notice.
        (self._folder / "data" / "postmaster.pid").unlink(missing_ok=True)

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _run(self, program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(self._programs / program), *arguments], cwd="/", capture_output=True, text=True, **self._user
        )
        assert done.returncode == 0, done.stderr

    def _wait(self) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            arguments = ["-h", str(self._folder), "-U", "nearline", "-q"]
            if subprocess.run([str(self._programs / "pg_isready"), *arguments], cwd="/").returncode == 0:
                return
            assert self.process.poll() is None, (self._folder / "log").read_text()
            time.sleep(0.05)
        raise AssertionError("PostgreSQL did not start: " + (self._folder / "log").read_text())
