"""Encryption of the native wire: CurveZMQ, with a key pair that the service makes at first use.

CURVE proves to the client that it talks to the service whose public key it was given, and hides
the rest from anyone between. It does not say who the client is: that is the token's part.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import zmq

from storage.errors import CredentialsUnusable
from storage.files import replace
from streaming.security.private_files import create_private, read_private

__all__ = ["CurveKeys", "announce_key", "announced_key", "check_key", "secure_client", "secure_server", "server_keys"]

# 32 bytes in ZeroMQ's Z85 alphabet.
_KEY = re.compile(rb"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")


@dataclass(frozen=True, slots=True)
class CurveKeys:
    """A key pair, each half as 40 characters of Z85."""

    public: bytes
    secret: bytes = field(repr=False)


def server_keys(folder: Path) -> CurveKeys:
    """The service's key pair, made at first use; the secret has mode 0600.

    Raises
    ------
    CredentialsUnusable : the secret is damaged, or open to other users.
    """
    path = folder / "curve.key"
    if not path.exists():
        create_private(path, zmq.curve_keypair()[1])
    secret = read_private(path)
    if not _KEY.fullmatch(secret):
        raise CredentialsUnusable(
            f"{path} does not hold a CURVE key; bring it back from a backup, or remove it: a new one is made, "
            "and every client needs its public half (`nearline token key`)"
        )
    return CurveKeys(zmq.curve_public(secret), secret)


def secure_server(socket: "zmq.Socket[bytes]", folder: Path) -> bytes:
    """Let a socket that is not bound yet speak CURVE only; the public key that clients need."""
    keys = server_keys(folder)
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
    return keys.public


def secure_client(socket: "zmq.Socket[bytes]", server_key: str | bytes) -> None:
    """Let a socket that is not connected yet speak only to the service with this public key."""
    public, secret = zmq.curve_keypair()
    socket.setsockopt(zmq.CURVE_SERVERKEY, check_key(server_key))
    socket.setsockopt(zmq.CURVE_PUBLICKEY, public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, secret)


def check_key(server_key: str | bytes) -> bytes:
    """A service's public key, if it is one."""
    text = server_key.encode(errors="replace") if isinstance(server_key, str) else server_key
    if not _KEY.fullmatch(text):
        raise CredentialsUnusable(
            f"{str(server_key)[:60]!r} is not the public key of a service; "
            "`nearline token key` on its machine prints the 40 characters"
        )
    return text


def announce_key(folder: Path, address: str, public: bytes | None) -> None:
    """Keep the public key of a service that listens now where clients on this machine find it.

    Parameters
    ----------
    public : None for a service that does not encrypt: nobody must try it with an older key.
    """
    path = folder / "announced.json"
    if public is None:
        path.unlink(missing_ok=True)
        return
    replace(path, json.dumps({"address": address, "server_key": public.decode()}).encode())
    path.chmod(0o644)


def announced_key(folder: Path, address: str) -> str | None:
    """The public key of the service at an address of this machine, if the service of this folder is that one."""
    try:
        announced = json.loads((folder / "announced.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    is_same_port = announced["address"].rpartition(":")[2] == address.rpartition(":")[2]
    return str(announced["server_key"]) if is_same_port else None
