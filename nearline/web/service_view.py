"""What the web process knows of its service: asked over the native wire, at most once a second.

Each caller's token is shown to the service, and the answer kept for that token alone: this process has
no rights of its own, and nobody sees through it what the service would not tell them.
"""

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Protocol

from storage.errors import AccessDenied, NearlineError, ServiceUnavailable
from streaming import wire
from streaming.client import Connection, is_reachable
from streaming.status import ServiceStatus

__all__ = ["Asker", "ServiceView", "WireAsker"]

_FRESH_S = 1.0
_PATIENCE_S = 3.0
# Callers with tokens of their own, and experiments they ask for; the least recently seen are forgotten.
_KEEP_CALLERS = 32
_KEEP_ANSWERS = 64
# Longer than any token.
_MAX_TOKEN_CHARS = 4096


class Asker(Protocol):
    """One caller's way to the service; closed when forgotten."""

    def ask_json(self, request: Any) -> Any:
        """The body of the answer; NearlineError as the service says it, ServiceUnavailable when it is silent."""

    def close(self) -> None: ...


class WireAsker:
    """A connection that is made when first needed, and anew after a failure."""

    def __init__(self, address: str, token: str | None) -> None:
        self._address, self._token = address, token
        self._connection: Connection | None = None

    def ask_json(self, request: Any) -> Any:
        if not is_reachable(self._address):
            self.close()
            raise ServiceUnavailable(f"nothing listens at {self._address}; start the service with `nearline serve`")
        if self._connection is None:
            self._connection = Connection(self._address, token=self._token or "")
        try:
            reply, _ = self._connection.ask(request, timeout=_PATIENCE_S)
        except ServiceUnavailable:
            self.close()
            raise
        return reply.body

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class ServiceView:
    """Answers of one service, each at most a second old.

    Parameters
    ----------
    connect : a way to the service for a caller's token; `WireAsker` by default.
    """

    def __init__(
        self,
        address: str,
        connect: Callable[[str, str | None], Asker] = WireAsker,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.address = address
        self._connect, self._clock = connect, clock
        self._callers: OrderedDict[bytes, _Caller] = OrderedDict()
        self._lock = threading.Lock()

    def status(self, token: str | None) -> ServiceStatus:
        """The service's account of itself, as far as the token reaches.

        Raises
        ------
        AccessDenied, ServiceUnavailable
        """
        body: bytes = self._caller(token).ask("status", wire.GetStatus(id=0))
        return ServiceStatus.model_validate_json(body)

    def runs(self, token: str | None, experiment: str | None) -> bytes:
        """The runs in the service's catalog, as JSON; errors as `status`."""
        body: bytes = self._caller(token).ask(f"runs {experiment or ''}", wire.ListRuns(id=0, experiment=experiment))
        return body

    def close(self) -> None:
        """End every connection."""
        with self._lock:
            for caller in self._callers.values():
                caller.close()
            self._callers.clear()

    def _caller(self, token: str | None) -> "_Caller":
        if token is not None and len(token) > _MAX_TOKEN_CHARS:
            raise AccessDenied(f"a token of {len(token)} characters is none; at most {_MAX_TOKEN_CHARS}")
        # The token itself stays only where it must be shown.
        key = hashlib.sha256((token or "").encode(errors="replace")).digest()
        with self._lock:
            caller = self._callers.get(key)
            if caller is None:
                caller = self._callers[key] = _Caller(self._connect(self.address, token), self._clock)
                if len(self._callers) > _KEEP_CALLERS:
                    self._callers.popitem(last=False)[1].close()
            self._callers.move_to_end(key)
            return caller


class _Caller:
    """The answers for one token; failures are kept as long as answers, or a crowd would wait for each of them."""

    def __init__(self, asker: Asker, clock: Callable[[], float]) -> None:
        self._asker, self._clock = asker, clock
        self._answers: OrderedDict[str, tuple[float, Any]] = OrderedDict()
        self._lock = threading.Lock()

    def ask(self, name: str, request: Any) -> Any:
        with self._lock:
            asked_at, answer = self._answers.get(name, (float("-inf"), None))
            if self._clock() - asked_at >= _FRESH_S:
                answer = self._ask_now(request)
                self._answers[name] = (self._clock(), answer)
                self._answers.move_to_end(name)
                if len(self._answers) > _KEEP_ANSWERS:
                    self._answers.popitem(last=False)
        if isinstance(answer, NearlineError):
            raise answer
        return answer

    def close(self) -> None:
        with self._lock:
            self._asker.close()

    def _ask_now(self, request: Any) -> Any:
        try:
            return self._asker.ask_json(request)
        except NearlineError as error:
            return error
