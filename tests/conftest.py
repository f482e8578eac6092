"""Servers that several folders of tests share."""

import os
from collections.abc import Iterator

import pytest

from .servers import CREDENTIALS, PostgresServer, postgres_programs, s3_server


@pytest.fixture(scope="session")
def _s3() -> Iterator[str]:
    with s3_server() as address:
        yield address


@pytest.fixture
def bucket(_s3: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """``s3://…`` of an empty bucket on an S3-speaking server; clients find it through the environment."""
    import s3fs

    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": _s3}.items():
        monkeypatch.setenv(name, value)
    name = f"tests-{os.urandom(6).hex()}"
    s3fs.S3FileSystem().mkdir(name)
    return f"s3://{name}"


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server for the whole test run; skipped only where its programs are not installed."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt install postgresql)")
    server = PostgresServer(programs)
    yield server
    server.close()
