"""The live table and the logs: what an operator reads."""

import io
import json
import logging
import os
import subprocess
import sys

import pytest
from rich.console import Console

from nearline.children import free_port
from nearline.logs import configure_logs
from nearline.status_view import Sample, live_status, render_status
from storage.errors import ServiceUnavailable
from streaming.metrics import ServiceMetrics
from streaming.status import ServiceStatus

from ..streaming.harness import record_run, serving, status_of

LONG = "lysozyme-2026-beamtime-with-a-name-of-nearly-a-hundred-characters-that-somebody-thought-was-a-good-idea"


def status(n_frames: int = 0, **changes: object) -> ServiceStatus:
    """A service that has taken so many frames of 1 MB."""
    metrics = ServiceMetrics()
    metrics.frames_received.add(n_frames)
    metrics.bytes_received.add(n_frames * 1_000_000)
    for seconds in (0.002, 0.002, 0.3):
        metrics.write.observe(seconds)
    stream = {"experiment": LONG, "run": 1234567, "data_source": "eiger.threshold_2", "planned": 1_000_000}
    counted = dict.fromkeys(("announced", "received", "stored"), n_frames)
    group = {"experiment": LONG, "run": 1234567, "data_source": "eiger.threshold_2", "group": "hits-" + "x" * 80}
    content = {
        "address": "tcp://127.0.0.1:5600",
        "root": "/data/" + "very-long/" * 20,
        "pid": 7,
        "uptime_s": 12345.6,
        "memory_bytes": 700 << 20,
        "buffer": {"used_bytes": 300 << 20, "budget_bytes": 2 << 30},
        "disk": {"free_bytes": 1 << 40, "total_bytes": 10 << 40},
        "sources": [{"name": "eiger", "messages": n_frames, "bad_messages": 2}],
        "streams": [stream | counted | {"sealing": 12}],
        "groups": [group | {"lag": 123456, "leases": 4096, "members": 40, "dead_letters": 3}],
        "metrics": metrics.as_dict(),
    }
    return ServiceStatus.model_validate(content | changes)


def shown(now: Sample, before: Sample | None = None, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(render_status(now, before))
    return console.file.getvalue()


# ---- the table ------------------------------------------------------------------------------------


def test_everything_fits_into_eighty_columns():
    lines = shown(Sample(2.0, status(123456)), Sample(1.0, status(0))).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= 80
    stream = next(line for line in lines if line.endswith("live") or " live " in line)
    assert "eiger.threshold_2" in stream
    assert "123456 of 1000000  123456.0" in stream
    group = next(line for line in lines if "4096" in line)
    assert group.split()[1:] == ["123456", "4096", "40", "3"]
    # Nothing that matters was cut; only the data folder's path and the long names were.
    assert sum("…" in line for line in lines) == 3


def test_rates_are_those_between_the_samples():
    text = shown(Sample(14.0, status(1100)), Sample(10.0, status(100)))
    assert "250.0 frames/s, 250.0 MB/s" in text
    assert [line.split()[2] for line in text.splitlines() if line.startswith("eiger ")] == ["250.0"]


@pytest.mark.parametrize(
    "before",
    [None, Sample(10.0, status(5000, pid=8)), Sample(14.0, status(0))],
    ids=["first look", "restarted meanwhile", "no time between"],
)
def test_no_rate_where_there_is_none(before):
    line = next(line for line in shown(Sample(14.0, status(1000)), before).splitlines() if line.startswith("eiger "))
    assert line.split()[1:3] == ["1000", "–"]


WORDS = [
    ({"disk": {"is_full": True}}, "FULL"),
    ({"disk": {"is_full": True}}, "problem: the disk of"),
    ({"sources": [{"name": "eiger", "is_paused": True}]}, "paused: buffer full"),
    ({"streams": [{"experiment": "a", "run": 1, "data_source": "b", "received": 1}]}, "UNBALANCED"),
    ({"streams": [{"experiment": "a", "run": n, "data_source": "b"} for n in range(40)]}, "… and 28 more"),
    ({"streams": [{"experiment": "a", "run": 1, "data_source": "b", "is_terminal": True}]}, "ended"),
    ({}, "≤ 2.5 ms  ≤ 500 ms   300 ms"),
    ({}, "3 h 25 min"),
    ({"uptime_s": 90}, "90 s"),
    ({"uptime_s": 3 * 86400 + 7200}, "3 d 2 h"),
]


@pytest.mark.parametrize(("changes", "words"), WORDS, ids=[words for _, words in WORDS])
def test_what_is_wrong_stands_out(changes, words):
    assert words in shown(Sample(0.0, status(**changes)))


def test_an_empty_service_is_shown_too():
    text = shown(Sample(0.0, ServiceStatus()))
    assert "service" in text
    assert "stream" not in text


def test_a_service_that_goes_away_is_waited_for():
    answers = [status(100), ServiceUnavailable("nothing listens"), status(200)]
    seen = []

    def look() -> ServiceStatus:
        answer = answers.pop(0)
        seen.append(answer)
        if isinstance(answer, Exception):
            raise answer
        return answer

    console = Console(file=io.StringIO(), width=80)
    live_status(look, console, n_looks=3, clock=iter([1.0, 2.0, 3.0]).__next__, sleep=lambda _: None)
    assert len(seen) == 3
    assert "50.0 frames/s" in console.file.getvalue()


def test_a_service_that_is_not_there_at_first_is_an_error():
    def look() -> ServiceStatus:
        raise ServiceUnavailable("nothing listens")

    with pytest.raises(ServiceUnavailable):
        live_status(look, Console(file=io.StringIO()), n_looks=1)


# ---- the commands ---------------------------------------------------------------------------------


def nearline(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "nearline.cli", *arguments]
    environment = os.environ | {"COLUMNS": "80"}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)


def test_a_real_service_by_command(tmp_path):
    with serving(tmp_path) as service:
        record_run(service.address, range(5))
        assert ServiceStatus.model_validate(status_of(service.address)).streams[0].stored == 5
        table = nearline("status", "--once", "--service", service.address)
        content = json.loads(nearline("status", "--json", "--service", service.address).stdout)
    assert (table.returncode, table.stderr) == (0, "")
    line = next(line for line in table.stdout.splitlines() if line.startswith("lyso/1/eiger"))
    assert line.split() == ["lyso/1/eiger", "5", "0.0", "0", "ended"]
    assert content["streams"][0]["stored"] == 5


# ---- logs -----------------------------------------------------------------------------------------


@pytest.fixture
def logged():
    """Configure logs as asked for; what was written since."""
    root, ours = logging.getLogger(), logging.getLogger("nearline")
    handlers, level, our_level = list(root.handlers), root.level, ours.level
    file = io.StringIO()

    def configure(log_format: str, **options: bool) -> io.StringIO:
        configure_logs(Console(file=file, width=200), log_format=log_format, **options)
        return file

    yield configure
    root.handlers[:] = handlers
    root.setLevel(level)
    ours.setLevel(our_level)


def test_logs_are_one_object_a_line(logged):
    file = logged("json")
    log = logging.getLogger("nearline.recorder")
    log.info("run %s\nstarted: Å", "lyso/1", extra={"run": "lyso/1", "stream": ("lyso", 1, "eiger"), "other": 1})
    log.debug("not said")
    logging.getLogger("elsewhere").info("not said")
    try:
        raise ValueError("why")
    except ValueError:
        log.exception("failed")
    first, second = (json.loads(line) for line in file.getvalue().splitlines())
    assert list(first) == ["time", "level", "logger", "message", "run", "stream"]
    assert (first["message"], first["run"], first["level"]) == ("run lyso/1\nstarted: Å", "lyso/1", "info")
    assert first["stream"] == "lyso/1/eiger"
    assert first["time"].endswith("+00:00")
    assert "ValueError: why" in second["traceback"]


def test_text_logs_are_for_people_and_verbose_says_more(logged):
    file = logged("text", is_verbose=True)
    logging.getLogger("nearline.recorder").debug("a detail [of] %s", "lyso/1")
    assert "a detail [of] lyso/1" in file.getvalue()


def test_the_service_logs_as_asked(tmp_path):
    command = [sys.executable, "-m", "nearline.cli", "serve", "--log-format", "json", "--root", str(tmp_path)]
    command += ["--bind", f"tcp://127.0.0.1:{free_port()}", "--source", f"eiger=tcp://127.0.0.1:{free_port()}"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as service:
        for line in service.stderr:
            if "serving" in line:
                break
        service.terminate()
        rest = [json.loads(line) for line in service.stderr]
    assert "serving" in json.loads(line)["message"]
    assert rest[-1]["message"] == "stopped"
