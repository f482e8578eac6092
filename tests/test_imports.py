"""What an import costs, and whose packages these are."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def loaded_by(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter after the statement."""
    script = f"{statement}; import sys, json; print(json.dumps(sorted({{m.split('.')[0] for m in sys.modules}})))"
    out = subprocess.check_output([sys.executable, "-c", script], text=True, cwd=ROOT)
    return set(json.loads(out))


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import nearline", {"prefect", "h5py", "numba", "duckdb"}),
        ("import nearline; nearline.open", {"prefect", "h5py", "numba", "duckdb", "awscrt"}),
        (
            "import numpy, storage.codec as c; c.decode(c.encode(numpy.zeros((64, 64))), (64, 64), 'f8')",
            {"numba", "awscrt"},
        ),
        ("import storage, storage.stream_store, storage.step_store, storage.catalog", {"prefect", "h5py", "zmq"}),
        ("import streaming.service, streaming.producer, streaming.retrieval, streaming.derived", {"prefect", "h5py"}),
    ],
    ids=["nearline", "nearline.open", "one frame", "storage", "streaming"],
)
def test_import_does_not_load(statement, absent):
    assert loaded_by(statement) & absent == set()


@pytest.mark.parametrize("package", ["nearline", "flows", "tasks", "streaming", "storage"])
def test_package_is_ours(package):
    """`streaming` is also the name of a well-known library."""
    script = f"import {package}; print({package}.__file__)"
    out = subprocess.check_output([sys.executable, "-c", script], text=True, cwd="/")
    assert Path(out.strip()) == ROOT / package / "__init__.py"
