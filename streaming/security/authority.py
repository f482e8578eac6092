"""Who is let in, and how far: a token becomes a grant once, and the grant is asked at every request."""

import time
from collections.abc import Callable
from pathlib import Path

from storage.errors import AccessDenied
from streaming.security.tokens import (
    CLOCK_SKEW_S,
    EVERY_EXPERIMENT,
    HOW_TO_GET_A_TOKEN,
    SCOPES,
    Issued,
    Revoked,
    Scope,
    TokenBook,
)

__all__ = ["Authority", "Grant"]

# How long a token that another process revoked may still be used.
_LOOK_S = 1.0


class Authority:
    """Turns tokens into grants.

    Parameters
    ----------
    folder : the service's state folder (`streaming.security.service_folder`).
    is_required : without it everybody may do everything, and tokens are not looked at.
    clock : UTC, s since 1970.
    """

    def __init__(self, folder: Path, *, is_required: bool, clock: Callable[[], float] = time.time) -> None:
        self.clock = clock
        self.book = TokenBook(folder, clock) if is_required else None
        self.looked_at = 0.0
        self.revoked: dict[str, Revoked] = self.book.log.revoked if self.book else {}

    @property
    def is_required(self) -> bool:
        return self.book is not None

    def admit(self, token: str | None) -> "Grant":
        """What the bearer of this token may do.

        Raises
        ------
        AccessDenied : a token is needed and there is none, or this one is not valid.
        """
        if self.book is None:
            return Grant(self, _ANYBODY)
        if not token:
            raise AccessDenied(f"this service wants a token; {HOW_TO_GET_A_TOKEN}")
        self.look(self.clock())
        return Grant(self, self.book.check(token))

    def revoke(self, token_id: str) -> Issued:
        """Revoke at once; other processes that read the same folder follow within a second."""
        if self.book is None:
            raise AccessDenied("this service asks nobody for a token, so there is none to revoke")
        return self.book.revoke(token_id)

    def look(self, now: float) -> None:
        """See whether another process has revoked something; the grants ask for it once a second."""
        self.looked_at = now
        if self.book is not None:
            self.book.log.refresh()


class Grant:
    """What one bearer may do. Kept with the connection; `require` takes a few hundred ns."""

    __slots__ = ("_allowed", "_authority", "_everywhere", "_expires_at", "experiments", "id", "scope", "subject")

    def __init__(self, authority: Authority, record: Issued) -> None:
        self.id, self.subject, self.scope = record.id, record.subject, record.scope
        self.experiments = record.experiments
        self._authority = authority
        self._expires_at = record.expires_at + CLOCK_SKEW_S
        scopes = SCOPES[: SCOPES.index(record.scope) + 1]
        self._everywhere = frozenset(scopes if EVERY_EXPERIMENT in record.experiments else ())
        # What belongs to no experiment may be read and begun by anyone with the scope; to administer the
        # service as a whole takes a token for all experiments.
        self._allowed: dict[str, frozenset[str | None]] = {
            scope: frozenset(
                () if scope not in scopes else (*record.experiments, *([] if scope == "admin" else [None]))
            )
            for scope in SCOPES
        }

    def require(self, scope: Scope, experiment: str | None) -> None:
        """Return if this may be done now, else raise.

        Parameters
        ----------
        experiment : None for what concerns the service as a whole.

        Raises
        ------
        AccessDenied : expired, revoked, or not reaching so far; the message says what is missing.
        """
        authority = self._authority
        now = authority.clock()
        # A clock that was set back must not put off the look either.
        if not authority.looked_at <= now < authority.looked_at + _LOOK_S:
            authority.look(now)
        if now >= self._expires_at or self.id in authority.revoked:
            raise self._end(now)
        if scope not in self._everywhere and experiment not in self._allowed[scope]:
            raise self._shortfall(scope, experiment)

    def covers(self, experiment: str) -> bool:
        """Whether an experiment is within reach at all: for lists that leave out what is not."""
        return "read" in self._everywhere or experiment in self._allowed["read"]

    def _end(self, now: float) -> AccessDenied:
        why = "expired" if now >= self._expires_at else "been revoked"
        return AccessDenied(f"token {self.id} of {self.subject} has {why}; {HOW_TO_GET_A_TOKEN}")

    def _shortfall(self, scope: str, experiment: str | None) -> AccessDenied:
        what = f"experiment {experiment!r}" if experiment else "the service as a whole"
        name = experiment if experiment else "'*'"
        return AccessDenied(
            f"{scope} access to {what} is needed, and token {self.id} of {self.subject} gives {self.scope} access to "
            f"{', '.join(self.experiments)}; `nearline token create --experiment {name} --scope {scope}` "
            "on the service's machine makes one that does"
        )


_ANYBODY = Issued("-", "anybody", (EVERY_EXPERIMENT,), "admin", 0, 1 << 62)
