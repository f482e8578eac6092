"""Tokens: who may do what with which experiments, until when.

A token is a JWT signed by the service's own key (HS256: the service issues and checks, so one
secret is enough). Its header is always the same text, and anything else is refused unread: no other
algorithm, no key of the sender's choice. What was issued and revoked stands in an append-only log;
the tokens themselves are kept nowhere.
"""

import fcntl
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jwt
import msgspec

from storage.errors import AccessDenied, CredentialsUnusable
from storage.names import check_name
from streaming.security.private_files import create_private, read_private

__all__ = [
    "CLOCK_SKEW_S",
    "EVERY_EXPERIMENT",
    "HOW_TO_GET_A_TOKEN",
    "SCOPES",
    "Issued",
    "Revoked",
    "Scope",
    "TokenBook",
    "TokenLog",
    "service_folder",
]

log = logging.getLogger("nearline.security")

Scope = Literal["read", "write", "admin"]
# Each includes those before it.
SCOPES: tuple[Scope, ...] = ("read", "write", "admin")
EVERY_EXPERIMENT = "*"
# Clocks kept by NTP agree to milliseconds; this forgives one that is not, and shortens no token's life.
CLOCK_SKEW_S = 10
LONGEST_LIFE_S = 366 * 86400
HOW_TO_GET_A_TOKEN = (
    "`nearline token create --experiment NAME --scope read` on the service's machine makes one; "
    "give it as NEARLINE_TOKEN"
)

_ISSUER = "nearline"
# {"alg":"HS256","typ":"JWT"}
_HEADER = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9."
# A hundred experiments with names of ordinary length; a token travels in every first message.
_MAX_TOKEN_CHARS = 4096
_KEY_BYTES = 32
_ID_BYTES = 8


def service_folder(root: Path) -> Path:
    """Where a service keeps its own state: keys and tokens. No experiment can have this name."""
    return root / ".service"


class Issued(msgspec.Struct, frozen=True, tag="issued", tag_field="event"):
    """A token that was issued: all but the token itself. Times are UTC, s since 1970."""

    id: str
    subject: str
    experiments: tuple[str, ...]
    scope: Scope
    issued_at: int
    expires_at: int


class Revoked(msgspec.Struct, frozen=True, tag="revoked", tag_field="event"):
    """A token that counts no longer."""

    id: str
    at: int


_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=100)]


class _Claims(msgspec.Struct, frozen=True):
    """What is inside a token, by JWT's names."""

    iss: str
    sub: _Name
    jti: _Name
    experiments: tuple[_Name, ...]
    scope: Scope
    iat: int
    exp: int


class TokenLog:
    """The append-only log of tokens issued and revoked; one JSON object a line.

    A line is written by one call and synced before it counts. A crash can leave half a line at the
    end: nobody was told that it was written, so it is left out.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.issued: dict[str, Issued] = {}
        self.revoked: dict[str, Revoked] = {}
        self._seen: tuple[int, int, int] | None = None
        self._is_unreadable = False
        self._read(read_private(path))

    def append(self, entry: Issued | Revoked) -> None:
        """Write an entry; it counts from the return on."""
        line = msgspec.json.encode(entry) + b"\n"
        with open(self.path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            end = file.seek(0, os.SEEK_END)
            if end:
                file.seek(-1, os.SEEK_END)
                # Close off what a crash tore, so that it cannot swallow this line.
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._take(entry)

    def refresh(self) -> None:
        """Read the log again if another process has written it.

        A log that has become unreadable changes nothing: what was revoked stays so.
        """
        try:
            status = os.stat(self.path)
            seen = (status.st_ino, status.st_size, status.st_mtime_ns)
            if seen != self._seen:
                self._read(read_private(self.path))
                self._seen = seen
            self._is_unreadable = False
        except (OSError, CredentialsUnusable) as error:
            if not self._is_unreadable:
                log.error("cannot look for revoked tokens, those known stay revoked: %s", error)
            self._is_unreadable = True

    def _read(self, content: bytes) -> None:
        for number, line in enumerate(content.splitlines(), 1):
            if not line:
                continue
            try:
                self._take(msgspec.json.decode(line, type=Issued | Revoked))
            except msgspec.MsgspecError as error:
                log.warning("%s line %d is not an entry and is left out: %s", self.path, number, error)

    def _take(self, entry: Issued | Revoked) -> None:
        if isinstance(entry, Issued):
            self.issued[entry.id] = entry
        else:
            self.revoked.setdefault(entry.id, entry)


class TokenBook:
    """The tokens of one service: made, checked, listed and revoked.

    Parameters
    ----------
    folder : the service's state folder (`service_folder`); key and log are made at first use.
    clock : UTC, s since 1970.

    Raises
    ------
    CredentialsUnusable : the key is open to other users or damaged, or the log is gone.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._key = _signing_key(folder)
        self.log = TokenLog(folder / "tokens.log")

    def issue(self, subject: str, experiments: Sequence[str], scope: Scope, life_s: float) -> tuple[str, Issued]:
        """A new token, and what the log keeps of it.

        Parameters
        ----------
        subject : whom or what it is for.
        experiments : their names, or ``*`` for all there are and will be.
        life_s : seconds until it expires, at most 366 days.
        """
        if not 1 <= life_s <= LONGEST_LIFE_S:
            raise AccessDenied(f"a token cannot live {life_s:.0f} s; give it between a second and 366 days")
        now = int(self._clock())
        record = Issued(
            id=secrets.token_hex(_ID_BYTES),
            subject=check_name(subject, "name"),
            experiments=_checked_experiments(experiments),
            scope=scope,
            issued_at=now,
            expires_at=now + int(life_s),
        )
        token = _encode(record, self._key)
        if len(token) > _MAX_TOKEN_CHARS:
            raise AccessDenied(
                f"a token for {len(record.experiments)} experiments is too long; make several, or one for '*'"
            )
        self.log.append(record)
        return token, record

    def check(self, token: str) -> Issued:
        """What a token says, if this service issued it, and it has neither expired nor been revoked.

        Raises
        ------
        AccessDenied : in words that do not repeat the token.
        """
        record = _decode(token, self._key, self._clock())
        if record.id in self.log.revoked:
            raise AccessDenied(f"token {record.id} has been revoked; {HOW_TO_GET_A_TOKEN}")
        return record

    def revoke(self, token_id: str) -> Issued:
        """Make a token count no longer, named by its id or the beginning of it; it may be revoked twice."""
        self.log.refresh()
        found = [record for name, record in self.log.issued.items() if token_id and name.startswith(token_id)]
        if len(found) != 1:
            raise AccessDenied(
                f"{len(found) or 'no'} tokens have an id that begins with {token_id[:40]!r}; "
                "`nearline token list` shows them"
            )
        if found[0].id not in self.log.revoked:
            self.log.append(Revoked(found[0].id, int(self._clock())))
        return found[0]


def _signing_key(folder: Path) -> bytes:
    """The service's key, made at first use."""
    path, entries = folder / "token.key", folder / "tokens.log"
    if not path.exists():
        # The log first: a key without a log means that revocations were lost.
        create_private(entries, b"")
        create_private(path, secrets.token_bytes(_KEY_BYTES))
    if not entries.exists():
        raise CredentialsUnusable(
            f"{entries} is gone, and with it which tokens were revoked; bring it back from a backup, or remove {path}: "
            "then all tokens are void, and new ones can be made"
        )
    key = read_private(path)
    if len(key) != _KEY_BYTES:
        raise CredentialsUnusable(
            f"{path} has {len(key)} bytes, not {_KEY_BYTES}; bring it back from a backup, or remove it: "
            "then all tokens are void, and new ones can be made"
        )
    return key


def _checked_experiments(experiments: Sequence[str]) -> tuple[str, ...]:
    if EVERY_EXPERIMENT in experiments:
        return (EVERY_EXPERIMENT,)
    if not experiments:
        raise AccessDenied("a token for no experiment opens nothing; name one, or '*' for all")
    return tuple(sorted({check_name(name, "experiment") for name in experiments}))


def _encode(record: Issued, key: bytes) -> str:
    claims = _Claims(
        iss=_ISSUER,
        sub=record.subject,
        jti=record.id,
        experiments=record.experiments,
        scope=record.scope,
        iat=record.issued_at,
        exp=record.expires_at,
    )
    token: str = jwt.encode(msgspec.to_builtins(claims), key, algorithm="HS256", sort_headers=True)
    return token


def _decode(token: Any, key: bytes, now: float) -> Issued:
    if not isinstance(token, str) or len(token) > _MAX_TOKEN_CHARS:
        raise _refusal(f"it is no text of at most {_MAX_TOKEN_CHARS} characters")
    if not token.isascii() or not token.startswith(_HEADER):
        raise _refusal("it is not one that a Nearline service issues")
    try:
        # Times are compared below, with the clock that tests can set.
        content = jwt.decode(token, key, algorithms=["HS256"], options=_ONLY_THE_SIGNATURE)
        claims = msgspec.convert(content, _Claims)
    except (jwt.PyJWTError, msgspec.MsgspecError, RecursionError):
        raise _refusal("this service did not issue it, or it was cut or changed on the way") from None
    if claims.iss != _ISSUER:
        raise _refusal("it was issued for something else")
    if now >= claims.exp + CLOCK_SKEW_S:
        raise _refusal(f"it expired {now - claims.exp:.0f} s ago")
    if now < claims.iat - CLOCK_SKEW_S:
        raise _refusal(f"it begins {claims.iat - now:.0f} s from now; one of the clocks is wrong")
    return Issued(claims.jti, claims.sub, claims.experiments, claims.scope, claims.iat, claims.exp)


_ONLY_THE_SIGNATURE: Any = {
    "verify_signature": True,
    "verify_exp": False,
    "verify_iat": False,
    "verify_nbf": False,
    "verify_aud": False,
    "verify_iss": False,
}


def _refusal(why: str) -> AccessDenied:
    return AccessDenied(f"the token is refused: {why}; {HOW_TO_GET_A_TOKEN}")
