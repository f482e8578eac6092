"""Health, metrics and runs over HTTP: a real server beside a real service, and a service that tells what we like."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from nearline.children import free_port
from nearline.web import WebChild, create_app
from nearline.web.serve import WebSettings, serve_web
from nearline.web.service_view import ServiceView
from storage.errors import AccessDenied, ServiceUnavailable, SourceBusy
from streaming import wire
from streaming.client import is_reachable
from streaming.metrics import ServiceMetrics
from streaming.security import TokenBook, save_credentials, server_keys, service_folder

from ..streaming.harness import record_run, serving, wait_for

GOOD_TOKEN = "good"


class ToldService:
    """A service that answers what a test says, and counts how often it is asked."""

    def __init__(self, **status: Any) -> None:
        self.status: dict[str, Any] = {"address": "tcp://127.0.0.1:1", "root": "/data"} | status
        self.error: Exception | None = None
        self.wants_token = False
        self.n_asked = 0
        self.n_open = 0
        self.lock = threading.Lock()

    def connect(self, address: str, token: str | None) -> "ToldService._Asker":
        with self.lock:
            self.n_open += 1
        return self._Asker(self, token)

    class _Asker:
        def __init__(self, service: "ToldService", token: str | None) -> None:
            self.service, self.token = service, token

        def ask_json(self, request: Any) -> bytes:
            with self.service.lock:
                self.service.n_asked += 1
            if self.service.error is not None:
                raise self.service.error
            if self.service.wants_token and self.token != GOOD_TOKEN:
                raise AccessDenied("this service wants a token")
            content = self.service.status if isinstance(request, wire.GetStatus) else [{"experiment": "lyso", "run": 1}]
            return json.dumps(content).encode()

        def close(self) -> None:
            with self.service.lock:
                self.service.n_open -= 1


@contextlib.contextmanager
def listening(view: ServiceView) -> Iterator[str]:
    """A real uvicorn with the application; its URL."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(create_app(view), port=port, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def get(url: str, token: str | None = None, **headers: str) -> tuple[int, str]:
    """Status code and body."""
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def samples(url: str, token: str | None = None) -> dict[tuple[str, ...], float]:
    """Metrics by (name, sorted label values)."""
    code, text = get(f"{url}/metrics", token)
    assert code == 200
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, *(f"{k}={v}" for k, v in sorted(sample.labels.items())))
            assert key not in found, key
            found[key] = sample.value
    return found


@pytest.fixture
def told() -> ToldService:
    return ToldService()


@pytest.fixture
def url(told) -> Iterator[str]:
    with listening(ServiceView("tcp://127.0.0.1:1", told.connect)) as address:
        yield address


# ---- with a real service --------------------------------------------------------------------------


def test_a_real_service_is_healthy_and_counted(tmp_path):
    with serving(tmp_path) as service:
        record_run(service.address, range(7))
        with listening(ServiceView(service.address)) as url:
            code, body = get(f"{url}/health")
            assert (code, json.loads(body)["problems"]) == (200, [])
            found = samples(url)
            stream = ("data_source=eiger", "experiment=lyso", "run=1")
            assert found["nearline_up",] == found["nearline_healthy",] == 1
            assert found["nearline_stream_frames", *stream, "state=stored"] == 7
            assert found["nearline_stream_frames", *stream, "state=missing"] == 0
            assert found["nearline_stream_balanced", *stream] == 1
            assert found["nearline_buffer_budget_bytes",] == 64 << 20
            assert found["nearline_disk_free_bytes",] > 0
            (run,) = json.loads(get(f"{url}/runs?experiment=lyso")[1])
            assert (run["experiment"], run["run"], run["state"]) == ("lyso", 1, "completed")
            assert json.loads(get(f"{url}/runs?experiment=other")[1]) == []


def test_a_service_that_goes_and_comes_back(tmp_path):
    port = free_port()
    bind = f"tcp://127.0.0.1:{port}"
    with listening(ServiceView(bind)) as url:
        code, body = get(f"{url}/health")
        assert (code, json.loads(body)["status"]) == (503, "unreachable")
        assert "nearline serve" in json.loads(body)["problems"][0]
        assert samples(url) == {("nearline_up",): 0}
        with serving(tmp_path, bind=bind):
            wait_for(lambda: get(f"{url}/health")[0] == 200)
        wait_for(lambda: get(f"{url}/health")[0] == 503)
        with serving(tmp_path, bind=bind):
            wait_for(lambda: get(f"{url}/health")[0] == 200)


# ---- health ---------------------------------------------------------------------------------------

STREAM = {"data_source": "eiger", "experiment": "lyso", "run": 1, "announced": 10, "received": 10, "stored": 10}
SOURCE = {"name": "eiger", "messages": 10}
GROUP = {"experiment": "lyso", "run": 1, "data_source": "eiger", "group": "hits"}
SICK = [
    ({"disk": {"free_bytes": 0, "is_full": True}}, "disk of /data is full"),
    ({"sources": [SOURCE | {"is_paused": True}], "buffer": {"used_bytes": 9 << 20}}, "buffer is full (9 of 0 MiB)"),
    ({"streams": [STREAM | {"stored": 9}]}, "ledger does not balance: lyso/1/eiger: eiger: 10 frames received"),
    ({"catalog": {"behind": 2, "error": "database is locked"}}, "catalog is behind by 2 runs (database is locked)"),
    ({"catalog": {"behind": 10}}, "catalog is behind by 10 runs (it is slow)"),
]
WORRYING = [
    ({"disk": {"free_bytes": 1, "total_bytes": 100}}, "less than 5 %"),
    ({"uploads": {"waiting": 3, "error": "no route"}}, "3 chunks wait for their object store: no route"),
    ({"uploads": {"refused": {"lyso/1": "it is there already"}}}, "run lyso/1 is not uploaded: it is there already"),
    ({"groups": [GROUP | {"dead_letters": 4}]}, "group lyso/1/eiger:hits has set 4 frames aside"),
    ({"sources": [SOURCE | {"bad_messages": 5}]}, "5 messages that could not be understood"),
]


@pytest.mark.parametrize(("status", "words"), SICK, ids=[words for _, words in SICK])
def test_what_keeps_a_service_from_its_work_is_said(told, url, status, words):
    told.status |= status
    code, body = get(f"{url}/health")
    assert (code, json.loads(body)["status"]) == (503, "failing")
    assert words in json.loads(body)["problems"][0]
    assert samples(url)["nearline_healthy",] == 0


@pytest.mark.parametrize(("status", "words"), WORRYING, ids=[words for _, words in WORRYING])
def test_what_should_be_looked_at_is_said_with_200(told, url, status, words):
    told.status |= status
    code, body = get(f"{url}/health")
    assert (code, json.loads(body)["problems"]) == (200, [])
    assert words in json.loads(body)["warnings"][0]


def test_a_run_on_its_way_to_the_catalog_is_no_problem(told, url):
    told.status["catalog"] = {"behind": 2}
    assert get(f"{url}/health")[0] == 200


def test_an_answer_of_another_version_is_understood(told, url):
    told.status |= {"new": {"in": 2030}, "streams": [STREAM | {"half_life": 3}]}
    assert get(f"{url}/health")[0] == 200
    told.status.clear()
    assert get(f"{url}/metrics")[0] == 200


# ---- metrics --------------------------------------------------------------------------------------


def test_counters_and_times_come_through(told, url):
    metrics = ServiceMetrics()
    metrics.frames_stored.add(12)
    for seconds in (0.00005, 0.003, 0.003, 60.0):
        metrics.write.observe(seconds)
    told.status |= {"metrics": json.loads(json.dumps(metrics.as_dict())), "memory_bytes": 123, "rejected_messages": 4}
    found = samples(url)
    assert found["nearline_frames_stored_total",] == 12
    assert found["nearline_resident_memory_bytes",] == 123
    assert found["nearline_rejected_messages_total",] == 4
    buckets = {k[1]: v for k, v in found.items() if k[0] == "nearline_write_seconds_bucket"}
    assert (buckets["le=0.0001"], buckets["le=0.0025"], buckets["le=0.005"], buckets["le=+Inf"]) == (1, 1, 3, 4)
    assert found["nearline_write_seconds_count",] == 4
    assert found["nearline_write_seconds_sum",] == pytest.approx(60.00605)


def test_every_counter_of_the_service_has_a_metric(told, url):
    metrics = ServiceMetrics()
    metrics.seal.observe(1)
    told.status["metrics"] = metrics.as_dict()
    names = {key[0] for key in samples(url)}
    counters = {f"nearline_{name}_total" for name in metrics.as_dict()["counters"]}
    histograms = {f"nearline_{name}_seconds_count" for name in metrics.as_dict()["histograms"]}
    assert counters | histograms <= names


def test_labels_stay_few_however_many_streams_and_groups(told, url):
    told.status["streams"] = [STREAM | {"run": n, "is_terminal": n != 3} for n in range(1, 1001)]
    told.status["groups"] = [GROUP | {"group": f"g{n}", "lag": n} for n in range(1000)]
    found = samples(url)
    assert len(found) < 2500
    runs = {key[3] for key in found if key[0] == "nearline_stream_announced_frames"}
    assert {"run=3", "run=1000", "run=938"} <= runs
    assert "run=500" not in runs
    assert found["nearline_streams_not_shown",] == 1000 - len(runs)
    lags = {v for key, v in found.items() if key[0] == "nearline_group_lag_frames"}
    assert max(lags) == 999
    assert found["nearline_groups_not_shown",] == 1000 - len(lags)


def test_odd_names_do_not_break_the_format(told, url):
    told.status["groups"] = [GROUP | {"group": 'a"b\\c\nd', "lag": 7}]
    assert (
        samples(url)["nearline_group_lag_frames", "data_source=eiger", "experiment=lyso", 'group=a"b\\c\nd', "run=1"]
        == 7
    )


def test_openmetrics_is_spoken_to_who_asks_for_it(url):
    code, text = get(f"{url}/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert (code, text.splitlines()[-1]) == (200, "# EOF")


# ---- asking the service ---------------------------------------------------------------------------


def test_a_crowd_costs_the_service_one_question_a_second(told, url):
    def scrape() -> None:
        for _ in range(5):
            assert get(f"{url}/metrics")[0] == get(f"{url}/health")[0] == 200

    began = time.monotonic()
    threads = [threading.Thread(target=scrape) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert 1 <= told.n_asked <= 2 + (time.monotonic() - began)


def test_a_silent_service_is_not_asked_by_everyone_in_turn(told):
    now = [0.0]
    view = ServiceView("tcp://x:1", told.connect, clock=lambda: now[0])
    told.error = ServiceUnavailable("silent")
    for _ in range(5):
        with pytest.raises(ServiceUnavailable):
            view.status(None)
    assert told.n_asked == 1
    now[0] += 1.0
    told.error = None
    assert view.status(None).root == "/data"


TOKENS = [
    (None, 401),
    ("wrong", 401),
    (GOOD_TOKEN, 200),
    ("", 401),
    ("x" * 5000, 401),
]


@pytest.mark.parametrize(("token", "code"), TOKENS, ids=["none", "wrong", "good", "empty", "huge"])
@pytest.mark.parametrize("path", ["health", "metrics", "runs"])
def test_where_the_service_wants_a_token_so_does_the_web(told, url, path, token, code):
    told.wants_token = True
    found, body = get(f"{url}/{path}", token)
    assert found == code
    assert not token or token == GOOD_TOKEN or token not in body


def test_one_callers_answers_are_not_anothers(told, url):
    told.wants_token = True
    assert get(f"{url}/runs", GOOD_TOKEN)[0] == 200
    assert get(f"{url}/runs")[0] == 401
    assert get(f"{url}/runs", "wrong")[0] == 401
    assert get(f"{url}/runs", GOOD_TOKEN)[0] == 200


def test_the_web_process_lends_nobody_its_own_token(told, url, monkeypatch):
    told.wants_token = True
    monkeypatch.setenv("NEARLINE_TOKEN", GOOD_TOKEN)
    assert get(f"{url}/runs")[0] == 401


def test_many_tokens_do_not_pile_up(told, url):
    told.wants_token = True
    for n in range(100):
        get(f"{url}/health", f"guess-{n}")
    assert told.n_open <= 32


@pytest.mark.parametrize("header", ["Basic abc", "Bearer", "Bearer ", GOOD_TOKEN])
def test_other_headers_are_refused(url, header):
    assert get(f"{url}/health", Authorization=header)[0] == 401


def test_a_page_elsewhere_cannot_ask_under_a_name_of_its_own(url):
    assert get(f"{url}/runs", Host="evil.example")[0] == 400


# ---- the process ----------------------------------------------------------------------------------


def test_the_command_refuses_to_listen_beyond_loopback(tmp_path):
    with serving(tmp_path) as service:
        command = ["web", "--service", service.address, "--host", "0.0.0.0", "--port", str(free_port())]
        done = subprocess.run(
            [sys.executable, "-m", "nearline.cli", *command], capture_output=True, text=True, timeout=60
        )
    assert done.returncode == 1
    assert "without tokens and encryption" in " ".join(done.stderr.split())


def test_the_command_names_a_busy_port(monkeypatch):
    monkeypatch.setenv("NEARLINE_TOKEN", GOOD_TOKEN)
    with listening(ServiceView("tcp://127.0.0.1:1", ToldService().connect)) as url:
        port = int(url.rpartition(":")[2])
        with pytest.raises(SourceBusy, match=f"{port}.*--port"):
            serve_web(WebSettings("tcp://127.0.0.1:1", port=port))
    # And it has put its user's token away.
    assert os.environ["NEARLINE_TOKEN"] == ""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def child_url(tmp_path) -> Iterator[tuple[WebChild, str]]:
    port = free_port()
    with serving(tmp_path) as service, WebChild(["--service", service.address, "--port", str(port)]) as child:
        url = f"http://127.0.0.1:{port}"
        wait_until_up(url)
        yield child, url


def wait_until_up(url: str) -> None:
    def is_up() -> bool:
        try:
            return get(f"{url}/health")[0] == 200
        except OSError:
            return False

    wait_for(is_up, timeout=30)


def test_a_child_that_dies_is_started_again(child_url):
    child, url = child_url
    first = child.pid
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: child.pid not in (first, None), timeout=20)
    wait_until_up(url)


def test_the_child_ends_with_its_context(tmp_path):
    with serving(tmp_path) as service, WebChild(["--service", service.address, "--port", str(free_port())]) as child:
        pid = wait_for(lambda: child.pid)
    assert not alive(pid)


def test_the_child_ends_when_its_parent_is_killed(tmp_path):
    script = (
        "import time; from nearline.web import WebChild\n"
        f"with WebChild(['--service', 'tcp://127.0.0.1:1', '--port', '{free_port()}']) as child:\n"
        "    while not child.pid: time.sleep(0.01)\n"
        "    print(child.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        time.sleep(2)
        assert alive(pid)
        parent.kill()
    wait_for(lambda: not alive(pid), timeout=10)


# ---- tokens and encryption, end to end ------------------------------------------------------------


@contextlib.contextmanager
def nearline_serve(root: Path, *options: str) -> Iterator[str]:
    """`nearline serve` in a process of its own, as people start it; its address."""
    address = f"tcp://127.0.0.1:{free_port()}"
    arguments = ["--root", str(root), "--bind", address, "--source", f"eiger=tcp://127.0.0.1:{free_port()}"]
    child = subprocess.Popen([sys.executable, "-m", "nearline.cli", "serve", *arguments, *options])
    try:
        wait_for(lambda: is_reachable(address) or child.poll() is not None, timeout=30)
        assert child.poll() is None
        yield address
        child.send_signal(signal.SIGINT)
        assert child.wait(20) == 0
    finally:
        child.kill()
        child.wait()


def test_a_guarded_service_shows_each_caller_what_their_token_reaches(tmp_path, monkeypatch):
    """The web process's own user has an admin token and lends it to nobody."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    book = TokenBook(service_folder(tmp_path))
    reach = {"*": "admin", "lyso": "read", "other": "read"}
    admin, lyso, other = (book.issue("x", [name], scope, 600)[0] for name, scope in reach.items())
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with nearline_serve(tmp_path, "--tokens", "--encrypt", "--http", str(port)) as address:
        key = server_keys(service_folder(tmp_path)).public.decode()
        save_credentials(address, token=admin, server_key=key)
        record_run(address, range(3))
        wait_for(lambda: code_of(f"{url}/health", lyso) == 200, timeout=30)
        assert code_of(f"{url}/health") == code_of(f"{url}/runs") == code_of(f"{url}/metrics", "forged") == 401
        stream = ("nearline_stream_frames", "data_source=eiger", "experiment=lyso", "run=1", "state=stored")
        assert samples(url, lyso)[stream] == samples(url, admin)[stream] == 3
        assert [row["run"] for row in json.loads(get(f"{url}/runs", lyso)[1])] == [1]
        assert stream not in samples(url, other)
        assert json.loads(get(f"{url}/runs", other)[1]) == []
        assert get(f"{url}/runs?experiment=lyso", other)[0] == 401
        book.revoke(TokenBook(service_folder(tmp_path)).check(lyso).id)
        wait_for(lambda: code_of(f"{url}/health", lyso) == 401)


def code_of(url: str, token: str | None = None) -> int | None:
    """The status code; None while nobody listens."""
    try:
        return get(url, token)[0]
    except OSError:
        return None
