"""Carry the outbox's facts to a Prefect server, as events; in a process of its own.

A fact is carried when the server's database has it: a server that said yes keeps an event in memory for
some seconds, and a killed one has lost it. So the place in the outbox moves on only behind events
that can be read back. After any doubt (a restart of this process, a server that was away) it is asked
first which of them are there; only the others are sent again, with the id they had.
"""

import fcntl
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import PrefectException
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings

from storage.errors import ServiceUnavailable, SourceBusy
from storage.files import replace
from storage.names import run_key
from streaming.outbox import Fact, OutboxReader, outbox_folder

__all__ = ["EVENTS_AT_ONCE", "Relay", "event_of", "relay_events"]

log = logging.getLogger("nearline.relay")

_LOOK_S = 0.2
_CONFIRM_S = 1.0
_LOST_S = 30.0
# The most that a Prefect server answers for in one request.
EVENTS_AT_ONCE = 50
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.5, 10.0
_AWAY = (httpx.HTTPError, PrefectException, OSError)


def event_of(fact: Fact) -> dict[str, Any]:
    """A fact as Prefect's API takes an event."""
    name = run_key(fact.experiment, fact.run)
    return {
        "id": fact.id,
        "occurred": fact.at.isoformat(),
        "event": f"nearline.{fact.kind}",
        "resource": {
            "prefect.resource.id": f"nearline.run.{fact.experiment}.{fact.run}",
            "prefect.resource.name": name,
            "nearline.experiment": fact.experiment,
        },
        "payload": {"experiment": fact.experiment, "run": fact.run, "name": name} | fact.payload,
    }


def relay_events(root: Path, stop: threading.Event, *, once: bool = False) -> int:
    """Carry facts until ``stop``, or with ``once`` until all are carried; how many.

    Raises
    ------
    ServiceUnavailable : no Prefect server is named.
    SourceBusy : another relay reads this outbox.
    """
    if not PREFECT_API_URL.value():
        raise ServiceUnavailable("no Prefect server: set PREFECT_API_URL, e.g. to http://127.0.0.1:4200/api")
    with _only_relay(root), temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
        return Relay(root, stop).run(once=once)


class Relay:
    """Reads the outbox, sends, and reads back what was sent."""

    def __init__(self, root: Path, stop: threading.Event) -> None:
        self._reader, self._stop = OutboxReader(root), stop
        self._path = outbox_folder(root) / "relay.json"
        self._place = self._read_place()
        self._sent: dict[str, Fact] = {}  # in the order of the outbox, not read back yet
        self._to_send: list[Fact] = []
        self._read_to = self._place
        self._is_in_doubt, self._looked_back_at, self._sent_at = True, 0.0, 0.0
        self._n_carried = 0

    def run(self, *, once: bool) -> int:
        """Go on until told to stop; a server that is away is asked again and again, with growing pauses."""
        pause = _FIRST_PAUSE_S
        while not self._stop.is_set():
            self._read()
            if once and not (self._to_send or self._sent):
                break
            try:
                if self._to_send or self._sent:
                    self._carry()
                if pause > _FIRST_PAUSE_S:
                    log.info("the Prefect server is back; %d events carried", self._n_carried)
                pause = _FIRST_PAUSE_S
            except _AWAY as error:
                if pause == _FIRST_PAUSE_S:
                    log.warning("the Prefect server takes no events, they wait in the outbox: %s", error)
                self._is_in_doubt = True
                self._stop.wait(pause)
                pause = min(2 * pause, _LAST_PAUSE_S)
                continue
            self._stop.wait(_LOOK_S)
        return self._n_carried

    def _read(self) -> None:
        if not self._to_send and (self._reader.has_news() or self._is_in_doubt):
            for fact in self._reader.facts(after=self._read_to):
                self._to_send.append(fact)
                self._read_to = fact.number

    def _carry(self) -> None:
        with get_client(sync_client=True) as client:
            if self._is_in_doubt:
                self._look_what_is_there(client)
            batch = self._to_send[:EVENTS_AT_ONCE]
            if batch:
                self._post(client, batch)
                self._sent |= {fact.id: fact for fact in batch}
                del self._to_send[: len(batch)]
                self._sent_at = time.monotonic()
            if time.monotonic() - self._looked_back_at > _CONFIRM_S:
                self._look_back(client)

    def _look_what_is_there(self, client: SyncPrefectClient) -> None:
        waiting = [*self._sent.values(), *self._to_send]
        there: set[str] = set()
        for at in range(0, len(waiting), EVENTS_AT_ONCE):
            there |= _known_ids(client, waiting[at : at + EVENTS_AT_ONCE])
        self._to_send = [fact for fact in waiting if fact.id not in there]
        self._sent = {}
        self._n_carried += len(waiting) - len(self._to_send)
        self._is_in_doubt = False
        self._move_on()

    def _look_back(self, client: SyncPrefectClient) -> None:
        self._looked_back_at = time.monotonic()
        for fact_id in _known_ids(client, list(self._sent.values())[:EVENTS_AT_ONCE]):
            del self._sent[fact_id]
            self._n_carried += 1
        if self._sent and self._looked_back_at - self._sent_at > _LOST_S:
            log.warning("%d events were taken by the server and are not there; sending them again", len(self._sent))
            self._is_in_doubt = True
        self._move_on()

    def _move_on(self) -> None:
        """The place behind which nothing is open, kept durably."""
        open_ones = [fact.number for fact in (*self._sent.values(), *self._to_send)]
        place = min(open_ones) - 1 if open_ones else self._read_to
        if place != self._place:
            replace(self._path, json.dumps({"carried": place}).encode())
            self._place = place

    def _post(self, client: SyncPrefectClient, facts: list[Fact]) -> None:
        for fact in facts:
            log.info("nearline.%s %s", fact.kind, fact.payload.get("name", ""), extra={"run": fact.payload.get("name")})
        client.request("POST", "/events", json=[event_of(fact) for fact in facts])

    def _read_place(self) -> int:
        try:
            return int(json.loads(self._path.read_bytes())["carried"])
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return 0  # from the beginning: what is there already is not sent again


def _known_ids(client: SyncPrefectClient, facts: list[Fact]) -> set[str]:
    """Which of these the server's database has."""
    if not facts:
        return set()
    wanted = {"id": {"id": [fact.id for fact in facts]}}
    oldest = min(fact.at for fact in facts)
    wanted["occurred"] = {"since": oldest.isoformat()}  # type: ignore[dict-item]
    answer = client.request("POST", "/events/filter", json={"filter": wanted, "limit": EVENTS_AT_ONCE})
    return {event["id"] for event in answer.json()["events"]}


@contextmanager
def _only_relay(root: Path) -> Iterator[None]:
    folder = outbox_folder(root)
    folder.mkdir(parents=True, exist_ok=True)
    fd = os.open(folder / "relay.lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise SourceBusy(f"another relay reads the outbox of {root}; one is enough, stop this or that") from error
    try:
        yield
    finally:
        os.close(fd)
