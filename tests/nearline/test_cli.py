"""The command line: what it prints, what it refuses, and in which words."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from nearline.children import free_port

SERVE = [sys.executable, "-m", "nearline.cli", "serve"]


def nearline(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "nearline.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)


COMMANDS = ["serve", "simulate", "replay", "process", "export", "runs", "info", "ledger", "status", "demo", "upload"]
COMMANDS += ["token", "web", "doctor"]
COMMANDS += ["delete", "retain", "verify"]
COMMANDS += ["query", "annotate"]


def test_help_names_every_command():
    text = nearline("--help").stdout
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    done = nearline(command, "--help")
    assert done.returncode == 0
    assert "Usage" in done.stdout


REFUSALS = [
    (["info", "nowhere/1", "--root", "/nonexistent"], "no run nowhere/1"),
    (["info", "./nowhere"], "no run.json"),
    (["info", "lyso"], "experiment/number"),
    (["info", "../etc/1"], "no run"),
    (["status", "--service", "tcp://127.0.0.1:1"], "nothing listens"),
    (["process", "x/1", "--cell", "1,2,3", "--root", "/nonexistent"], "neither a file nor six numbers"),
    (["process", "x/1", "--recipe", "missing.yaml", "--root", "/nonexistent"], "cannot read recipe"),
    (["serve", "--bind", "tcp://0.0.0.0:5600", "--root", "ROOT"], "only loopback is safe"),
    (["serve", "--experiment", "../x", "--root", "ROOT"], "not usable as a name"),
    (["replay", "missing.cbf", "--bind", "tcp://127.0.0.1:*"], "missing.cbf"),
    (["simulate", "--size", "tiny", "--bind", "tcp://127.0.0.1:*"], "size 'tiny'"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSALS, ids=[" ".join(a[:2]) for a, _ in REFUSALS])
def test_refusals_are_one_sentence(arguments, words, tmp_path):
    done = nearline(*[str(tmp_path) if a == "ROOT" else a for a in arguments], COLUMNS="300")
    assert done.returncode not in (0, -11)
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_busy_port_is_named(tmp_path):
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    with subprocess.Popen([*SERVE, "--root", str(tmp_path / "a"), "--bind", address], stderr=subprocess.PIPE) as first:
        try:
            while b"Ctrl-C stops" not in first.stderr.readline():
                assert first.poll() is None
            second = nearline("serve", "--root", str(tmp_path / "b"), "--bind", address)
            assert second.returncode == 1
            assert str(port) in second.stderr
            assert "choose another" in " ".join(second.stderr.split())
        finally:
            first.send_signal(signal.SIGTERM)
            first.communicate(timeout=20)
    assert first.returncode == 0


def test_serve_simulate_look_and_stop(tmp_path):
    """The commands of the README, against each other."""
    service, detector = (f"tcp://127.0.0.1:{free_port()}" for _ in range(2))
    serving = subprocess.Popen(
        [*SERVE, "--root", str(tmp_path), "--bind", service, "--source", f"eiger={detector}"],
        stderr=subprocess.DEVNULL,
    )
    try:
        done = nearline("simulate", "--size", "512", "--frames", "12", "--rate", "0", "--bind", detector, "--json")
        assert json.loads(done.stdout)["n_frames"] == 12
        deadline = time.monotonic() + 20
        while "completed" not in nearline("info", "default/1", "--service", service).stdout:
            assert time.monotonic() < deadline
        ledger = json.loads(nearline("ledger", "default/1", "--service", service, "--json").stdout)
        assert ledger["is_balanced"]
        assert ledger["ledger"]["eiger"]["stored"] == 12
        (row,) = json.loads(nearline("runs", "--service", service, "--json").stdout)
        assert (row["experiment"], row["run"], row["state"]) == ("default", 1, "completed")
        status = json.loads(nearline("status", "--service", service, "--json").stdout)
        assert status["sources"][0]["bad_messages"] == 0
        export = nearline("export", "default/1", "-o", str(tmp_path / "x.h5"), "--service", service, "--json")
        assert json.loads(export.stdout)["frames"] == 12
        again = nearline("export", "default/1", "-o", str(tmp_path / "x.h5"), "--service", service)
        assert again.returncode == 1
        assert "--overwrite" in again.stderr or "overwrite" in again.stderr
    finally:
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(20) == 0
    offline = nearline("ledger", str(tmp_path / "default" / "1"))
    assert offline.returncode == 0
    assert "balances" in offline.stdout
    # As after a disk that forgot a file: frames that nobody can account for.
    (tmp_path / "default" / "1" / "eiger.chunks" / "00000.json").unlink()
    torn = nearline("ledger", str(tmp_path / "default" / "1"))
    assert torn.returncode == 2
    assert "does not balance" in torn.stdout
