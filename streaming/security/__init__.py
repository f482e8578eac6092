"""Who may do what: tokens scoped to experiments, encryption of the wire, and where a service may listen."""

from streaming.security.authority import Authority, Grant
from streaming.security.bind import check_bind, is_loopback
from streaming.security.credentials import Credentials, credentials_file, find_credentials, save_credentials
from streaming.security.curve import CurveKeys, announce_key, secure_client, secure_server, server_keys
from streaming.security.tokens import SCOPES, Scope, TokenBook, service_folder

__all__ = [
    "SCOPES",
    "Authority",
    "Credentials",
    "CurveKeys",
    "Grant",
    "Scope",
    "TokenBook",
    "announce_key",
    "check_bind",
    "credentials_file",
    "find_credentials",
    "is_loopback",
    "save_credentials",
    "secure_client",
    "secure_server",
    "server_keys",
    "service_folder",
]
