"""`nearline init` and `nearline check`, as a person types them."""

import json
import socket

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from nearline.cli import app
from storage.errors import NearlineError, OutputExists
from storage.geometry import Geometry
from storage.geometry_formats import write_geometry
from tests.flows.panels import SHAPE, four_panels, header_of

PEAKS = {"steps": [{"use": "find_peaks"}]}
CELL = {"name": "x", "cell": [79.1, 79.1, 37.9, 90, 90, 90], "space_group": "P 43 21 2"}


def nearline(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def checks(tmp_path, **fields) -> tuple[int, dict[str, list[dict]]]:
    path = tmp_path / "e.yaml"
    path.write_text(yaml.safe_dump({"experiment": "e", "beamline": "b"} | fields))
    result = nearline("check", str(path), "--json", "--api", "http://127.0.0.1:1/api")
    found: dict[str, list[dict]] = {}
    for check in json.loads(result.stdout)["checks"]:
        found.setdefault(check["name"], []).append(check)
    return result.exit_code, found


def test_init_writes_what_check_accepts(tmp_path):
    path = tmp_path / "experiment.yaml"
    assert nearline("init", str(path), "--experiment", "mine-7", "--beamline", "I24").exit_code == 0
    result = nearline("check", str(path), "--json", "--api", "http://127.0.0.1:1/api")
    answer = json.loads(result.stdout)
    assert (result.exit_code, answer["is_well"]) == (0, True)
    assert answer["checks"][0]["found"].startswith("experiment mine-7 at I24")
    assert isinstance(nearline("init", str(path)).exception, OutputExists)
    assert nearline("init", str(path), "--overwrite").exit_code == 0


def test_a_table_for_people(tmp_path):
    (tmp_path / "e.yaml").write_text("experiment: e\nbeamlin: b\n")
    result = nearline("check", str(tmp_path / "e.yaml"))
    assert result.exit_code == 1
    assert "no such field" in " ".join(result.stdout.split())  # wherever the table breaks its lines


@pytest.mark.parametrize(
    ("fields", "row", "words"),
    [
        ({"samples": [CELL | {"cell": [79.1, 80.9, 37.9, 90, 90, 90]}]}, "recipe", ["symmetry", "correct the cell"]),
        ({"samples": [CELL | {"space_group": "F 4 3 2"}]}, "recipe", ["symmetry"]),
        ({"samples": [CELL | {"cell": [3.0, 3.0, 3.0, 90, 90, 90]}]}, "cell", ["Å³", "edges in Å"]),
        ({"samples": [CELL | {"space_group": "P 43 21 9"}]}, "recipe", ["P 43 21 9"]),
        ({"recipes": {"r": "gone.yaml"}}, "recipe", ["gone.yaml"]),
        ({"recipes": {"r": PEAKS | {"mask": "gone.npy"}}}, "recipe", ["gone.npy"]),
        ({"recipes": {"r": PEAKS | {"mask": "full.npy"}}}, "mask", ["100.0 % masked"]),
        ({"recipes": {"r": PEAKS | {"detector": {"detector_distance": 150}}}}, "geometry", ["150 m", "20 m"]),
        ({"recipes": {"r": PEAKS | {"detector": {"incident_energy": 12.4}}}}, "geometry", ["12.4 eV"]),
        ({"recipes": {"r": PEAKS | {"detector": {"incident_energy": 12400, "incident_wavelength": 1.2}}}}, "geometry",
         ["10332 eV", "12400 eV"]),
        ({"deployment": {"root": "/proc/nearline"}}, "data folder", ["/proc/nearline"]),
    ],
    ids=["cell", "system", "volume", "group", "file", "mask", "full mask", "mm", "keV", "contradiction", "folder"],
)  # fmt: skip
def test_what_cannot_be_fails_with_a_remedy(tmp_path, fields, row, words):
    np.save(tmp_path / "full.npy", np.ones((4, 4), np.uint8))
    code, found = checks(tmp_path, **fields)
    (bad,) = [check for check in found[row] if check["state"] == "fail"]
    assert code == 1
    assert [word for word in words if word not in bad["found"] + bad["remedy"]] == []
    assert bad["remedy"]


@pytest.mark.parametrize(
    ("name", "state", "words"),
    [
        ("four.geom", "ok", ["four.geom", "4 panels on 512 × 512 px", "beam centre"]),
        ("path.geom", "warn", ["clen is no number"]),
        ("far.geom", "fail", ["not between", "20 m"]),
        ("gone.geom", None, ["gone.geom"]),
    ],
    ids=["good", "open", "mm", "gone"],
)
def test_a_geometry_file_is_read(tmp_path, name, state, words):
    write_geometry(tmp_path / "four.geom", Geometry.from_header(header_of(four_panels()), SHAPE))
    text = (tmp_path / "four.geom").read_text()
    clen = next(line for line in text.splitlines() if line.startswith("clen"))
    (tmp_path / "path.geom").write_text(text.replace(clen, "clen = /LCLS/detector_1/EncoderValue"))
    (tmp_path / "far.geom").write_text(text.replace(clen, "clen = 150 m"))
    code, found = checks(tmp_path, recipes={"r": PEAKS | {"detector": {"geometry": name}}})
    (row,) = found["geometry"] if state else [c for c in found["recipe"] if c["state"] == "fail"]
    assert row["state"] == (state or "fail")
    assert code == (1 if row["state"] == "fail" else 0)
    assert [word for word in words if word not in row["found"] + row["remedy"]] == []


def test_a_detector_is_reached_or_warned_of(tmp_path):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        source = {"endpoint": f"tcp://127.0.0.1:{listening.getsockname()[1]}"}
        assert checks(tmp_path, data_sources=[source])[1]["detector"][0]["state"] == "ok"
    code, found = checks(tmp_path, data_sources=[source])
    assert (code, found["detector"][0]["state"]) == (0, "warn")
    assert found["prefect"][0]["state"] == "warn"


def test_ambiguous_indexing_is_told(tmp_path):
    _, found = checks(tmp_path, samples=[CELL | {"space_group": "P 43"}])
    assert "2 ways to index" in found["cell"][0]["found"]


def test_deploy_without_a_server_says_so(tmp_path):
    path = tmp_path / "e.yaml"
    nearline("init", str(path))
    error = nearline("deploy", str(path), "--api", "http://127.0.0.1:1/api").exception
    assert isinstance(error, NearlineError)
    assert "http://127.0.0.1:1/api" in str(error)
