"""Why frames of open chunks are not there, kept so that a crash does not lose the cause.

The commit of a sealed chunk says it; until then one small file for the stream does, in the
journal's format. A gap of any length is one record, whichever chunks it covers.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

from storage.errors import StorageFull
from storage.journal import Account, Journal

__all__ = ["AccountLog"]

log = logging.getLogger("nearline.storage")

# A detector that loses every second frame for a day would fill gigabytes with the causes of sealed chunks.
_LARGEST_BYTES = 1 << 20


class AccountLog:
    """The accounts of one stream: appended to by its writer, read back after a crash."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._journal: Journal | None = None
        self._waiting: list[Account] = []
        self._largest_bytes = _LARGEST_BYTES

    def recover(self) -> Iterator[Account]:
        """Take up what a crash left; the accounts in the order in which they were made."""
        if self.path.exists():
            self._journal = Journal.recover(self.path, 0, 0)
            yield from list(self._journal.accounts)

    def add(self, account: Account) -> None:
        """Keep an account.

        A full disk must not keep the writer from declaring a gap: the record is written with the
        next one that can be, and lost only if a crash comes first.
        """
        self._waiting.append(account)
        try:
            while self._waiting:
                self._open().append_account(self._waiting[0])
                del self._waiting[0]
        except StorageFull as error:
            log.error("causes of %d gaps are in memory only: %s", len(self._waiting), error)

    @property
    def is_long(self) -> bool:
        """Whether it is time to `shorten` it."""
        return self._journal is not None and self._journal.end > self._largest_bytes

    def shorten(self, sealed_to: int) -> None:
        """Begin the file anew, without the accounts of frames below ``sealed_to``."""
        aside = self.path.with_name(f".{self.path.name}")
        aside.unlink(missing_ok=True)
        shorter = Journal.create(aside, 0, 0)
        try:
            for account in self._open().accounts:
                if account.ranges[-1][1] > sealed_to:
                    shorter.append_account(account)
        except StorageFull as error:
            log.error("%s is longer than it need be: %s", self.path, error)
            return
        os.replace(aside, self.path)
        shorter.path, self._journal = self.path, shorter
        self._largest_bytes = max(_LARGEST_BYTES, 2 * shorter.end)

    def sync(self) -> None:
        """Make the accounts durable; from any thread."""
        journal = self._journal
        if journal is not None:
            journal.sync()

    def remove(self) -> None:
        """The stream has ended, its commits say everything."""
        self._journal = None
        self.path.unlink(missing_ok=True)

    def _open(self) -> Journal:
        if self._journal is None:
            self._journal = Journal.create(self.path, 0, 0)
        return self._journal
