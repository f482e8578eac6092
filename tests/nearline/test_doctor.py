"""The doctor: what it finds on a machine that is well, and on one that is not."""

import json
import os
import shutil
import socket
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest

from nearline import doctor
from nearline.doctor import CHECKS, Check, Place, examine
from nearline.round_trip import _compare
from storage.errors import NearlineError
from streaming.security import TokenBook, save_credentials, server_keys, service_folder

ROOT = Path(__file__).parents[2]


def run_doctor(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "nearline.cli", "doctor", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, env=os.environ | environment)


def found(name: str, place: Place) -> list[Check]:
    return list(CHECKS[name](place))


@pytest.fixture
def place(tmp_path, monkeypatch) -> Place:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return Place(tmp_path)


# ---- the whole ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def healthy(tmp_path_factory) -> "subprocess.CompletedProcess[str]":
    folder = tmp_path_factory.mktemp("doctor")
    return run_doctor("--json", "--root", str(folder / "not-there-yet"), XDG_CONFIG_HOME=str(folder))


def test_this_machine_can_run_nearline(healthy):
    checks = json.loads(healthy.stdout)
    assert [c for c in checks if c["state"] == "fail"] == []
    assert healthy.returncode == 0
    assert all(set(c) == {"name", "state", "found", "remedy"} for c in checks)
    assert all(c["remedy"] for c in checks if c["state"] == "warn")


def test_frames_went_there_and_back(healthy):
    (trip,) = (c for c in json.loads(healthy.stdout) if c["name"] == "round trip")
    assert trip["found"].startswith("40 frames there and back, compared")


def test_nothing_is_left_behind(place):
    for name in ("disk", "keys", "ports"):
        found(name, place)
    assert list(place.root.iterdir()) == []


def test_the_table_is_readable_in_eighty_columns_and_says_what_to_do(place, monkeypatch, tmp_path):
    TokenBook(service_folder(tmp_path))
    (service_folder(tmp_path) / "token.key").chmod(0o644)
    done = run_doctor("--root", str(tmp_path), COLUMNS="80")
    assert done.returncode == 1
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "FAIL keys" in done.stdout
    assert "→ chmod 600" in done.stdout
    assert "1 failed" in done.stdout.splitlines()[-1]


def test_a_foreign_streaming_package_is_found_out(tmp_path):
    (tmp_path / "other" / "streaming").mkdir(parents=True)
    (tmp_path / "other" / "streaming" / "__init__.py").write_text("")
    path = os.pathsep.join([str(tmp_path / "other"), str(ROOT)])
    command = [sys.executable, "-P", "-m", "nearline.cli", "doctor", "--json", "--root", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=180, cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 1, done.stderr
    checks = json.loads(done.stdout)
    (imports,) = (c for c in checks if c["name"] == "imports")
    assert (imports["state"], "streaming comes from" in imports["found"]) == ("fail", True)
    assert str(tmp_path / "other" / "streaming") in imports["found"]
    assert {c["name"] for c in checks if c["state"] == "fail"} == {"imports", "keys", "round trip"}


# ---- what is not well -----------------------------------------------------------------------------

Usage = namedtuple("Usage", "total used free")


def _little_room(monkeypatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1 << 40, 0, free))


def _speed(monkeypatch, rate: float, sync_s: float) -> None:
    monkeypatch.setattr(doctor, "_write_speed", lambda _: (rate, sync_s))


def _versions(monkeypatch, **others: str | None) -> None:
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: others.get(name, real(name)))


def _no_entry_point(monkeypatch) -> None:
    monkeypatch.setattr(doctor.metadata, "entry_points", lambda group: [])


AILMENTS = [
    ("disk", lambda m: _little_room(m, 5 << 30), "disk space", "warn", "--root"),
    ("disk", lambda m: _little_room(m, 1 << 20), "disk space", "fail", "--root"),
    ("disk", lambda m: _speed(m, 40.0, 0.001), "disk speed", "warn", "130 MB/s"),
    ("disk", lambda m: _speed(m, 900.0, 0.2), "disk speed", "warn", "local disk"),
    ("disk", lambda m: m.setattr(os, "access", lambda *_: False), "disk speed", "fail", "right to write"),
    ("packages", lambda m: _versions(m, zarr="2.0"), "packages", "warn", "pip install -r"),
    ("packages", lambda m: _versions(m, zarr=None), "packages", "fail", "pip install -r"),
    ("codecs", _no_entry_point, "zarr codec", "warn", "pip install --no-deps"),
    ("clock", lambda m: m.setattr(doctor, "_is_clock_synced", lambda: False), "clock", "warn", "chronyd"),
    ("clock", lambda m: m.setattr(doctor.time, "sleep", lambda _: _leap(m)), "clock", "warn", "NTP slew"),
    ("memory", lambda m: m.setattr(doctor, "_LEAST_MEMORY", 1 << 60), "memory", "warn", "--buffer"),
    ("prefect", lambda m: m.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api"), "prefect", "warn", "PREFECT_API_URL"),
    ("python", lambda m: m.setattr(sys, "version_info", (3, 10, 1)), "python", "fail", "3.11 or newer"),
    ("round trip", lambda m: m.setattr(sys, "executable", "/bin/false"), "round trip", "fail", "nearline.round_trip"),
]


def _leap(monkeypatch) -> None:
    now = doctor.time.time()
    monkeypatch.setattr(doctor.time, "time", lambda: now + 3600)


@pytest.mark.parametrize(
    ("check", "ail", "name", "state", "remedy"), AILMENTS, ids=[f"{a[2]} {a[4]}" for a in AILMENTS]
)
def test_what_is_not_well_is_said_with_a_remedy(place, monkeypatch, check, ail, name, state, remedy):
    ail(monkeypatch)
    (one,) = (c for c in found(check, place) if c.name == name)
    assert (one.state, remedy in one.remedy) == (state, True), one


@pytest.mark.parametrize("is_synced", [True, None])
def test_a_clock_that_is_kept_or_silent_is_in_order(place, monkeypatch, is_synced):
    monkeypatch.setattr(doctor, "_is_clock_synced", lambda: is_synced)
    assert [c.state for c in found("clock", place)] == ["ok"]


def test_a_port_taken_by_somebody_else_is_named_with_its_process(place):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        service = Place(place.root, f"tcp://127.0.0.1:{port}")
        (check,) = (c for c in found("ports", service) if c.name == f"port {port}")
    assert check.state == "warn"
    assert f"pid {os.getpid()} " in check.found


def test_a_port_taken_by_our_own_is_in_order(place):
    script = (
        "import socket, time; s = socket.create_server(('127.0.0.1', 0))\n"
        "print(s.getsockname()[1], flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", script, "nearline", "serve"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        port = int(server.stdout.readline())
        service = Place(place.root, f"tcp://127.0.0.1:{port}")
        (check,) = (c for c in found("ports", service) if c.name == f"port {port}")
        server.kill()
    assert (check.state, f"pid {server.pid} " in check.found) == ("ok", True)


KEYS = [
    (lambda folder: TokenBook(folder), "token.key", "chmod 600"),
    (lambda folder: server_keys(folder), "curve.key", "chmod 600"),
]


@pytest.mark.parametrize(("make", "name", "remedy"), KEYS, ids=["token key", "curve key"])
def test_keys_are_looked_at(place, make, name, remedy):
    make(service_folder(place.root))
    assert [c.state for c in found("keys", place)] == ["ok"]
    (service_folder(place.root) / name).chmod(0o640)
    (check,) = found("keys", place)
    assert (check.state, remedy in check.remedy) == ("fail", True)


def test_credentials_are_looked_at(place):
    path = save_credentials("tcp://127.0.0.1:5600", token="abc")
    assert [c.state for c in found("keys", place)] == ["ok"]
    path.write_text("no toml")
    (check,) = found("keys", place)
    assert (check.state, "not TOML" in check.found, "save again" in check.remedy) == ("fail", True, True)


def test_a_check_that_fails_itself_does_not_end_the_others(place, monkeypatch):
    def broken(_: Place):
        raise PermissionError("no")
        yield

    monkeypatch.setattr(doctor, "CHECKS", {"broken": broken, "python": CHECKS["python"]})
    assert [(c.name, c.state) for c in examine(place)] == [("broken", "fail"), ("python", "ok")]


CHANGED = {
    "one pixel": lambda frames: [*frames[:-1], frames[-1] + 1],
    "one missing": lambda frames: frames[:-1],
    "one too many": lambda frames: [*frames, frames[0]],
    "another order": lambda frames: frames[::-1],
}


@pytest.mark.parametrize("change", CHANGED.values(), ids=CHANGED)
def test_the_round_trip_would_notice(change):
    sent = np.arange(24).reshape(4, 2, 3)
    _compare(sent, list(sent), "unchanged")
    with pytest.raises(NearlineError, match="came back"):
        _compare(sent, change(list(sent)), "changed")
