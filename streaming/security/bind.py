"""Where a service may listen: beyond loopback only with tokens and encryption, unless told so explicitly."""

import ipaddress
import re

from storage.errors import SourceBusy

__all__ = ["check_bind", "is_loopback"]

_TCP = re.compile(r"tcp://(?P<host>.+):(?P<port>[0-9]{1,5}|\*)")


def check_bind(bind: str, has_tokens: bool, has_curve: bool, is_insecure_allowed: bool = False) -> None:
    """Return if a service so guarded may listen there.

    ``ipc://`` and ``inproc://`` do not leave the machine and count as loopback. A name other than
    ``localhost`` is not looked up: what it stands for can change, so it counts as beyond loopback.

    Raises
    ------
    SourceBusy : it may not, or this is no address; the message says what would be needed.
    """
    if is_loopback(bind) or (has_tokens and has_curve) or is_insecure_allowed:
        return
    wanted = {"tokens": has_tokens, "encryption": has_curve}
    missing = " and ".join(name for name, is_there in wanted.items() if not is_there)
    raise SourceBusy(
        f"refusing to listen on {bind} without {missing}: with less than tokens and encryption only loopback is safe; "
        "turn both on, use tcp://127.0.0.1:PORT and an ssh tunnel, or allow an insecure address explicitly"
    )


def is_loopback(bind: str) -> bool:
    """Whether only programs on this machine can reach an address.

    Raises
    ------
    SourceBusy : not an address that a service can listen on.
    """
    if re.fullmatch(r"(ipc|inproc)://.+", bind):
        return True
    match = _TCP.fullmatch(bind)
    if match is None or (match["port"] != "*" and int(match["port"]) > 65535):
        raise SourceBusy(f"cannot listen on {bind[:200]!r}; write tcp://HOST:PORT, such as tcp://127.0.0.1:5600")
    return _is_loopback_host(match["host"])


def _is_loopback_host(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
