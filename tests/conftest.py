"""Servers that several folders of tests share."""

from collections.abc import Iterator

import pytest

from .servers import PostgresServer, new_bucket, postgres_programs, s3_server


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """The address of an S3-speaking server."""
    with s3_server() as address:
        yield address


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """``s3://…`` of an empty bucket; clients find its server through the environment."""
    return new_bucket(s3, monkeypatch)


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL server for the whole test run; skipped only where its programs are not installed."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt install postgresql)")
    server = PostgresServer(programs)
    yield server
    server.close()
