"""What a client shows to a service: a token and the service's public key, from the environment or a file.

The file is ``~/.config/nearline/credentials.toml``, mode 0600, with a table for each service:

    ["tcp://beamline-7:5600"]
    token = "eyJ…"
    server_key = "…"
"""

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from storage.errors import CredentialsUnusable, SourceBusy
from streaming.security.bind import is_loopback
from streaming.security.curve import announced_key, check_key
from streaming.security.private_files import read_private, replace_private
from streaming.security.tokens import service_folder

__all__ = ["Credentials", "credentials_file", "find_credentials", "save_credentials"]

_FIELDS = ("token", "server_key")


@dataclass(frozen=True, slots=True)
class Credentials:
    """What to show to one service; None where it asks for nothing."""

    token: str | None = field(default=None, repr=False)
    server_key: str | None = None


def credentials_file(environment: Mapping[str, str] = os.environ) -> Path:
    """Where a user's credentials are."""
    config = environment.get("XDG_CONFIG_HOME") or str(Path.home() / ".config")
    return Path(config) / "nearline" / "credentials.toml"


def find_credentials(address: str, environment: Mapping[str, str] = os.environ) -> Credentials:
    """What to show to the service at an address.

    Each part comes from ``NEARLINE_TOKEN`` or ``NEARLINE_SERVER_KEY``, else from the file's table for
    this address. An empty variable means: show nothing. The public key of the service on this machine whose
    data folder ``NEARLINE_ROOT`` names is found there.

    Raises
    ------
    CredentialsUnusable : the file is damaged or open to other users, or the key is none.
    """
    kept = _read(credentials_file(environment)).get(address, {})
    found = {name: environment.get(f"NEARLINE_{name.upper()}", kept.get(name)) for name in _FIELDS}
    server_key = found["server_key"]
    root = environment.get("NEARLINE_ROOT")
    if server_key is None and root and _is_on_this_machine(address):
        server_key = announced_key(service_folder(Path(root)), address)
    if server_key:
        check_key(server_key)
    return Credentials(found["token"] or None, server_key or None)


def save_credentials(
    address: str,
    *,
    token: str | None = None,
    server_key: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> Path:
    """Keep a token or a public key for an address in the user's file; the file's path."""
    path = credentials_file(environment)
    tables = _read(path)
    given = {"token": token, "server_key": server_key}
    tables.setdefault(address, {}).update({name: value for name, value in given.items() if value is not None})
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    replace_private(path, _as_toml(tables).encode())
    return path


def _read(path: Path) -> dict[str, dict[str, str]]:
    """The file's tables; empty when there is no file."""
    try:
        content = tomllib.loads(read_private(path).decode())
    except FileNotFoundError:
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        # The position, never the line: it may be the one with the token.
        where = str(error).rpartition("(")[2].rstrip(")")
        raise CredentialsUnusable(f"{path} is not TOML ({where}); correct it, or remove it and save again") from None
    for address, table in content.items():
        if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()):
            raise CredentialsUnusable(
                f'{path}: {address!r} is not a table of texts; write ["tcp://HOST:PORT"], and below it token = "…"'
            )
    return content


def _as_toml(tables: Mapping[str, Mapping[str, str]]) -> str:
    # JSON's strings of ASCII are TOML's basic strings.
    blocks = [
        "\n".join([f"[{json.dumps(address)}]", *(f"{name} = {json.dumps(value)}" for name, value in table.items())])
        for address, table in tables.items()
    ]
    return "\n\n".join(blocks) + "\n"


def _is_on_this_machine(address: str) -> bool:
    try:
        return is_loopback(address)
    except SourceBusy:
        return False
