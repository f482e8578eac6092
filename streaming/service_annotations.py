"""Annotations kept by a running service: `storage.annotations.AnnotationStore` over the wire."""

import json

from streaming import wire
from streaming.client import Client

__all__ = ["ServiceAnnotations"]


class ServiceAnnotations:
    """The annotations of a run whose folder need not be visible from here."""

    def __init__(self, client: Client, experiment: str, run: int) -> None:
        self._client, self._experiment, self._run = client, experiment, run

    def append(self, batch: bytes) -> int:
        request = wire.Annotate(id=0, experiment=self._experiment, run=self._run)
        reply, _ = self._client.connection.ask(request, [batch])
        return int(json.loads(reply.body)["batch"])

    def read_all(self, after: int = 0) -> list[tuple[int, bytes]]:
        found: list[tuple[int, bytes]] = []
        while True:
            request = wire.GetAnnotations(id=0, experiment=self._experiment, run=self._run, after=after)
            reply, parts = self._client.connection.ask(request)
            found += zip(reply.numbers, (part.bytes for part in parts), strict=True)
            if reply.is_end or not reply.numbers:
                return found
            after = reply.numbers[-1]
