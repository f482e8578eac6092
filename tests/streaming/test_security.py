"""Tokens, grants, encryption and addresses: what is let in, what is refused, and in which words."""

import base64
import json
import os
import subprocess
import sys
import threading
import time
import timeit
from pathlib import Path

import jwt
import pytest
import zmq

from storage.errors import AccessDenied, BadName, CredentialsUnusable, SourceBusy
from streaming.security import (
    Authority,
    TokenBook,
    announce_key,
    check_bind,
    credentials_file,
    find_credentials,
    save_credentials,
    secure_client,
    secure_server,
    server_keys,
    service_folder,
)
from streaming.security.tokens import CLOCK_SKEW_S

NOW = 1_800_000_000.0
LYSO = ["lyso-2026"]
HOUR = 3600


class Clock:
    """UTC that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def book(tmp_path, clock) -> TokenBook:
    return TokenBook(tmp_path, clock)


@pytest.fixture
def authority(book, tmp_path, clock) -> Authority:
    return Authority(tmp_path, is_required=True, clock=clock)


# ---- grants ---------------------------------------------------------------------------------------

REACH = [
    # scope of the token, its experiments, what is asked for, of which experiment, whether it is given
    ("read", LYSO, "read", "lyso-2026", True),
    ("read", LYSO, "write", "lyso-2026", False),
    ("read", LYSO, "admin", "lyso-2026", False),
    ("read", LYSO, "read", "other", False),
    ("read", LYSO, "read", None, True),
    ("read", LYSO, "write", None, False),
    ("write", LYSO, "read", "lyso-2026", True),
    ("write", LYSO, "write", "lyso-2026", True),
    ("write", LYSO, "write", "other", False),
    ("write", LYSO, "admin", "lyso-2026", False),
    ("admin", LYSO, "admin", "lyso-2026", True),
    ("admin", LYSO, "admin", "other", False),
    ("admin", LYSO, "admin", None, False),
    ("admin", ["*"], "admin", None, True),
    ("admin", ["*"], "admin", "anything", True),
    ("read", ["*"], "read", "anything", True),
    ("read", ["*"], "write", "anything", False),
    ("write", ["a", "b"], "write", "b", True),
]


@pytest.mark.parametrize(("scope", "experiments", "wanted", "experiment", "is_given"), REACH)
def test_a_grant_reaches_as_far_as_its_token(book, authority, scope, experiments, wanted, experiment, is_given):
    token, _ = book.issue("jane", experiments, scope, HOUR)
    grant = authority.admit(token)
    if is_given:
        grant.require(wanted, experiment)
        return
    with pytest.raises(AccessDenied) as refusal:
        grant.require(wanted, experiment)
    assert f"{wanted} access to" in str(refusal.value)
    assert (experiment or "service as a whole") in str(refusal.value)
    assert f"nearline token create --experiment {experiment or chr(39) + '*' + chr(39)} --scope {wanted}" in str(
        refusal.value
    )
    assert token not in str(refusal.value)


def test_lists_can_leave_out_what_a_grant_does_not_cover(book, authority):
    token, _ = book.issue("jane", ["a", "b"], "read", HOUR)
    assert [name for name in ("a", "c", "b", "*") if authority.admit(token).covers(name)] == ["a", "b"]


def test_nothing_is_asked_where_no_token_is_required(tmp_path):
    authority = Authority(tmp_path / "service", is_required=False)
    for token in (None, "", "nonsense"):
        authority.admit(token).require("admin", None)
        authority.admit(token).require("admin", "lyso-2026")
    assert not (tmp_path / "service").exists()


def test_a_required_token_that_is_not_there(authority):
    with pytest.raises(AccessDenied, match=r"wants a token; `nearline token create .* NEARLINE_TOKEN"):
        authority.admit(None)


def test_a_request_costs_less_than_two_microseconds(book, tmp_path):
    token, _ = TokenBook(tmp_path).issue("jane", LYSO, "write", HOUR)
    grant = Authority(tmp_path, is_required=True).admit(token)
    seconds = min(timeit.repeat(lambda: grant.require("read", "lyso-2026"), number=20_000, repeat=5)) / 20_000
    print(f"Grant.require: {1e9 * seconds:.0f} ns")
    assert seconds < 2e-6


# ---- time -----------------------------------------------------------------------------------------

TIMES = [
    (HOUR - 1, True),
    (HOUR + CLOCK_SKEW_S - 1, True),
    (HOUR + CLOCK_SKEW_S + 1, False),
    (-CLOCK_SKEW_S + 1, True),
    (-CLOCK_SKEW_S - 1, False),
]


@pytest.mark.parametrize(("later_s", "is_let_in"), TIMES)
def test_a_token_counts_from_its_issue_to_its_end(book, authority, clock, later_s, is_let_in):
    token, _ = book.issue("jane", LYSO, "read", HOUR)
    clock.now += later_s
    if is_let_in:
        authority.admit(token).require("read", "lyso-2026")
    else:
        with pytest.raises(AccessDenied, match=r"expired|begins .* clocks"):
            authority.admit(token)


def test_a_grant_ends_with_its_token(book, authority, clock):
    token, _ = book.issue("jane", LYSO, "read", HOUR)
    grant = authority.admit(token)
    clock.now += HOUR + CLOCK_SKEW_S
    with pytest.raises(AccessDenied, match="expired"):
        grant.require("read", "lyso-2026")


@pytest.mark.parametrize("life_s", [0, -1, 0.5, 367 * 86400, float("inf"), float("nan")])
def test_no_token_without_a_sensible_end(book, life_s):
    with pytest.raises(AccessDenied, match="between a second and 366 days"):
        book.issue("jane", LYSO, "read", life_s)


@pytest.mark.parametrize(
    ("subject", "experiments", "error"),
    [
        ("jane", [], AccessDenied),
        ("jane", ["../etc"], BadName),
        ("jane doe", LYSO, BadName),
        ("jane", [f"{n:0100d}" for n in range(60)], AccessDenied),
    ],
)
def test_no_token_for_nothing_nor_for_what_has_no_name(book, subject, experiments, error):
    with pytest.raises(error):
        book.issue(subject, experiments, "read", HOUR)
    assert book.log.issued == {}


# ---- revocation -----------------------------------------------------------------------------------


def test_revoked_in_this_process_counts_at_once(book, authority):
    token, record = book.issue("jane", LYSO, "read", HOUR)
    grant = authority.admit(token)
    assert authority.revoke(record.id[:6]) == record
    with pytest.raises(AccessDenied, match=f"token {record.id} .*revoked"):
        grant.require("read", "lyso-2026")
    with pytest.raises(AccessDenied, match="revoked"):
        authority.admit(token)


def test_revoked_by_another_process_counts_within_a_second(book, authority, clock):
    token, record = book.issue("jane", LYSO, "read", HOUR)
    other, _ = book.issue("joe", LYSO, "read", HOUR)
    grant, untouched = authority.admit(token), authority.admit(other)
    book.revoke(record.id)
    clock.now += 0.5
    grant.require("read", "lyso-2026")  # the file is not looked at more often
    clock.now += 0.5
    with pytest.raises(AccessDenied, match="revoked"):
        grant.require("read", "lyso-2026")
    untouched.require("read", "lyso-2026")


def test_a_clock_set_back_does_not_put_off_revocation(book, authority, clock):
    token, record = book.issue("jane", LYSO, "read", HOUR)
    grant = authority.admit(token)
    book.revoke(record.id)
    clock.now -= 5
    with pytest.raises(AccessDenied, match="revoked"):
        grant.require("read", "lyso-2026")


def test_revocation_survives_a_restart(book, tmp_path, clock):
    token, record = book.issue("jane", LYSO, "read", HOUR)
    book.revoke(record.id)
    book.revoke(record.id)
    assert (tmp_path / "tokens.log").read_text().count("revoked") == 1
    with pytest.raises(AccessDenied, match="revoked"):
        Authority(tmp_path, is_required=True, clock=clock).admit(token)


def test_a_revocation_counts_however_long_the_log(book, tmp_path, clock):
    token, record = book.issue("jane", LYSO, "read", HOUR)
    path = tmp_path / "tokens.log"
    others = b"".join(path.read_bytes().replace(record.id.encode(), b"%016x" % n) for n in range(20_000))
    path.write_bytes(path.read_bytes() + others)
    book.revoke(record.id)
    with pytest.raises(AccessDenied, match="revoked"):
        Authority(tmp_path, is_required=True, clock=clock).admit(token)


@pytest.mark.parametrize("prefix", ["", "zz"])
def test_an_unknown_id_revokes_nothing(book, prefix):
    book.issue("jane", LYSO, "read", HOUR)
    with pytest.raises(AccessDenied, match="nearline token list"):
        book.revoke(prefix)
    assert book.log.revoked == {}


def test_an_ambiguous_id_revokes_nothing(book):
    # Seventeen ids with sixteen possible first characters.
    ids = [book.issue("jane", LYSO, "read", HOUR)[1].id for _ in range(17)]
    first = next(a for a in "0123456789abcdef" if sum(i.startswith(a) for i in ids) > 1)
    with pytest.raises(AccessDenied, match="tokens have an id that begins"):
        book.revoke(first)
    assert book.log.revoked == {}


@pytest.mark.parametrize("n_torn", [1, 10, 40])
def test_a_line_torn_by_a_crash_costs_only_itself(book, tmp_path, clock, n_torn, caplog):
    """Cut the log as a crash would, then go on."""
    _, first = book.issue("jane", LYSO, "read", HOUR)
    _, second = book.issue("joe", LYSO, "read", HOUR)
    book.revoke(first.id)
    path = tmp_path / "tokens.log"
    path.write_bytes(path.read_bytes()[:-n_torn])
    again = TokenBook(tmp_path, clock)
    # The newline alone is no part of the entry.
    assert set(again.log.revoked) == ({first.id} if n_torn == 1 else set())
    again.revoke(second.id)
    assert second.id in TokenBook(tmp_path, clock).log.revoked
    assert set(TokenBook(tmp_path, clock).log.issued) == {first.id, second.id}


def test_what_is_revoked_stays_so_when_the_log_goes_away(book, authority, clock, tmp_path, caplog):
    token, record = book.issue("jane", LYSO, "read", HOUR)
    authority.admit(token)
    book.revoke(record.id)
    clock.now += 2
    with pytest.raises(AccessDenied):
        authority.admit(token)
    (tmp_path / "tokens.log").unlink()
    clock.now += 2
    with pytest.raises(AccessDenied, match="revoked"):
        authority.admit(token)
    assert "cannot look for revoked tokens" in caplog.text


def test_a_key_without_its_log_lets_nobody_in(book, tmp_path):
    (tmp_path / "tokens.log").unlink()
    with pytest.raises(CredentialsUnusable, match=r"which tokens were revoked.*remove"):
        Authority(tmp_path, is_required=True)


def test_many_processes_write_one_log(tmp_path):
    script = (
        "import sys; from pathlib import Path; from streaming.security import TokenBook\n"
        "book = TokenBook(Path(sys.argv[1]))\n"
        "for n in range(20): book.issue(f'p{n}', ['lyso'], 'read', 60)"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path)]) for _ in range(4)]
    assert [p.wait(60) for p in running] == [0] * 4
    assert len(TokenBook(tmp_path).log.issued) == 80


# ---- forged tokens --------------------------------------------------------------------------------


def _segment(content: object) -> str:
    return base64.urlsafe_b64encode(json.dumps(content).encode()).rstrip(b"=").decode()


def _claims(**changes: object) -> dict[str, object]:
    claims = {
        "iss": "nearline",
        "sub": "mallory",
        "jti": "00",
        "experiments": ["*"],
        "scope": "admin",
        "iat": int(NOW),
        "exp": int(NOW) + HOUR,
    }
    return {name: value for name, value in (claims | changes).items() if value is not None}


def _without_signature(token: str, key: bytes) -> str:
    return _segment({"alg": "none", "typ": "JWT"}) + "." + _segment(_claims()) + "."


def _none_in_words(token: str, key: bytes) -> str:
    return _segment({"alg": "nOnE", "typ": "JWT"}) + "." + _segment(_claims()) + "."


def _signed(algorithm: str = "HS256", headers: dict | None = None, **changes: object):
    return lambda token, key: jwt.encode(_claims(**changes), key * 2, algorithm=algorithm, headers=headers)


def _with_right_key(**changes: object):
    return lambda token, key: jwt.encode(_claims(**changes), key, algorithm="HS256", sort_headers=True)


def _other_payload(token: str, key: bytes) -> str:
    header, _, signature = token.split(".")
    return ".".join([header, _segment(_claims()), signature])


FORGERIES = {
    "no signature": _without_signature,
    "no algorithm, oddly written": _none_in_words,
    "another algorithm, right key": lambda token, key: jwt.encode(_claims(), key * 2, algorithm="HS512"),
    "foreign key": _signed(),
    "key chosen in the header": _signed(headers={"kid": "../../dev/null", "jku": "http://evil"}),
    "another payload under the signature": _other_payload,
    "cut by one": lambda token, key: token[:-1],
    "cut in half": lambda token, key: token[: len(token) // 2],
    "header only": lambda token, key: token.split(".")[0] + ".",
    "one character changed": lambda token, key: token[:60] + ("A" if token[60] != "A" else "B") + token[61:],
    "a part more": lambda token, key: token + ".AAAA",
    "huge": lambda token, key: token + "A" * 10_000_000,
    "deeply nested header": lambda token, key: base64.urlsafe_b64encode(b"[" * 3000).decode() + ".e30.AAAA",
    "deeply nested payload": lambda token, key: (
        token.split(".")[0] + "." + base64.urlsafe_b64encode(b"[" * 2900).decode() + ".AAAA"
    ),
    "not ASCII": lambda token, key: token[:50] + "ä" + token[51:],
    "line break": lambda token, key: token + "\n",
    "empty claims": lambda token, key: jwt.encode({}, key, algorithm="HS256", sort_headers=True),
    "no expiry": _with_right_key(exp=None),
    "expiry in words": _with_right_key(exp="never"),
    "no experiments": _with_right_key(experiments=None),
    "experiments in one text": _with_right_key(experiments="*"),
    "unknown scope": _with_right_key(scope="root"),
    "other issuer": _with_right_key(iss="elsewhere"),
    "a number": lambda token, key: 7,
    "bytes": lambda token, key: token.encode(),
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES)
def test_forged_tokens_are_refused(book, authority, tmp_path, forge):
    token, _ = book.issue("jane", LYSO, "read", HOUR)
    forged = forge(token, (tmp_path / "token.key").read_bytes())
    with pytest.raises(AccessDenied) as refusal:
        authority.admit(forged)
    assert str(forged)[:200] not in str(refusal.value)
    assert len(str(refusal.value)) < 400
    authority.admit(token).require("read", "lyso-2026")


def test_a_huge_token_is_refused_before_it_is_looked_at(authority):
    token = "A" * 100_000_000
    began = time.monotonic()
    with pytest.raises(AccessDenied, match="4096"):
        authority.admit(token)
    assert time.monotonic() - began < 0.01


def test_the_same_forgery_maker_can_make_a_token_that_is_good(authority, tmp_path):
    """Or the tests above would prove nothing."""
    key = (tmp_path / "token.key").read_bytes()
    authority.admit(_with_right_key()(None, key)).require("admin", None)


# ---- files ----------------------------------------------------------------------------------------


def test_secrets_are_open_to_their_owner_only(book, tmp_path):
    server_keys(tmp_path)
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.iterdir()}
    assert modes == {"token.key": 0o600, "tokens.log": 0o600, "curve.key": 0o600}


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
@pytest.mark.parametrize("name", ["token.key", "tokens.log", "curve.key"])
def test_a_secret_open_to_others_is_not_used(book, tmp_path, name, mode):
    server_keys(tmp_path)
    (tmp_path / name).chmod(mode)
    use = server_keys if name == "curve.key" else TokenBook
    with pytest.raises(CredentialsUnusable, match=f"mode {mode:04o}.*chmod 600"):
        use(tmp_path)


def test_a_damaged_key_is_named(book, tmp_path):
    (tmp_path / "token.key").write_bytes(b"short")
    with pytest.raises(CredentialsUnusable, match="5 bytes, not 32"):
        TokenBook(tmp_path)


def test_one_key_however_many_begin_at_once(tmp_path):
    books: list[TokenBook] = []
    threads = [threading.Thread(target=lambda: books.append(TokenBook(tmp_path / "service"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    token, record = books[0].issue("jane", LYSO, "read", HOUR)
    assert [b.check(token) for b in books] == [record] * 8


# ---- encryption -----------------------------------------------------------------------------------


@pytest.fixture
def curve_server(tmp_path):
    """A ROUTER that speaks CURVE: (address, its public key, socket)."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as server:
        server.setsockopt(zmq.LINGER, 0)
        public = secure_server(server, tmp_path)
        server.bind("tcp://127.0.0.1:*")
        yield server.getsockopt_string(zmq.LAST_ENDPOINT), public, server


CLIENTS = [("right key", True), ("another key", False), ("in plain", False)]


@pytest.mark.parametrize(("how", "gets_through"), CLIENTS, ids=[how for how, _ in CLIENTS])
def test_only_who_has_the_servers_key_gets_through(curve_server, how, gets_through):
    address, public, server = curve_server
    with zmq.Context() as context, context.socket(zmq.DEALER) as client:
        client.setsockopt(zmq.LINGER, 0)
        if how != "in plain":
            secure_client(client, public if how == "right key" else zmq.curve_keypair()[0].decode())
        client.connect(address)
        client.send(b"hello")
        assert bool(server.poll(3000 if gets_through else 300)) == gets_through


def test_the_key_pair_is_kept(tmp_path):
    keys = server_keys(tmp_path)
    assert server_keys(tmp_path) == keys
    assert zmq.curve_public(keys.secret) == keys.public
    assert keys.secret.decode() not in repr(keys)


def test_a_damaged_curve_key_is_named(tmp_path):
    server_keys(tmp_path)
    (tmp_path / "curve.key").write_bytes(b"x")
    with pytest.raises(CredentialsUnusable, match="does not hold a CURVE key"):
        server_keys(tmp_path)


@pytest.mark.parametrize("key", ["", "short", "x" * 41, "ä" * 40, b"\0" * 40], ids=repr)
def test_what_is_no_public_key(key):
    with zmq.Context() as context, context.socket(zmq.DEALER) as client, pytest.raises(CredentialsUnusable):
        secure_client(client, key)


# ---- credentials of clients -----------------------------------------------------------------------

ADDRESS = "tcp://beamline-7:5600"
KEY, OTHER_KEY = (zmq.curve_keypair()[0].decode() for _ in range(2))


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    return {"XDG_CONFIG_HOME": str(tmp_path / "config")}


def test_credentials_are_kept_by_address(environment):
    save_credentials(ADDRESS, token="eyJ.a.b", environment=environment)
    save_credentials(ADDRESS, server_key=KEY, environment=environment)
    save_credentials("tcp://[::1]:1", token='od"d\\', environment=environment)
    found = find_credentials(ADDRESS, environment)
    assert (found.token, found.server_key) == ("eyJ.a.b", KEY)
    assert find_credentials("tcp://[::1]:1", environment).token == 'od"d\\'
    assert find_credentials("tcp://elsewhere:5600", environment).token is None
    assert "eyJ" not in repr(found)
    assert credentials_file(environment).stat().st_mode & 0o777 == 0o600
    assert credentials_file(environment).parent.stat().st_mode & 0o777 == 0o700


def test_the_environment_comes_first(environment):
    save_credentials(ADDRESS, token="kept", server_key=KEY, environment=environment)
    shown = environment | {"NEARLINE_TOKEN": "given", "NEARLINE_SERVER_KEY": OTHER_KEY}
    assert find_credentials(ADDRESS, shown).token == "given"
    assert find_credentials(ADDRESS, shown).server_key == OTHER_KEY
    assert find_credentials(ADDRESS, shown | {"NEARLINE_TOKEN": ""}).token is None


ANNOUNCED = [
    ("tcp://127.0.0.1:5600", True),
    ("tcp://localhost:5600", True),
    ("tcp://127.0.0.1:5601", False),
    ("tcp://beamline-7:5600", False),
    ("nonsense", False),
]


@pytest.mark.parametrize(("address", "is_found"), ANNOUNCED)
def test_the_key_of_a_service_on_this_machine_is_found(tmp_path, environment, address, is_found):
    announce_key(service_folder(tmp_path), "tcp://0.0.0.0:5600", KEY.encode())
    environment["NEARLINE_ROOT"] = str(tmp_path)
    assert find_credentials(address, environment).server_key == (KEY if is_found else None)
    announce_key(service_folder(tmp_path), "tcp://127.0.0.1:5600", None)
    assert find_credentials(address, environment).server_key is None


BAD_FILES = [
    ("token = ", 0o600, "is not TOML"),
    ('["tcp://x:1"]\ntoken = "secret"\nserver_key = 7', 0o600, "table of texts"),
    ('token = "secret"', 0o600, "table of texts"),
    ('["tcp://x:1"]\ntoken = "secret', 0o600, "is not TOML"),
    ("", 0o644, "chmod 600"),
    (f'["{ADDRESS}"]\nserver_key = "short"', 0o600, "is not the public key"),
]


@pytest.mark.parametrize(("content", "mode", "words"), BAD_FILES)
def test_a_bad_credentials_file_is_named_without_its_secrets(environment, content, mode, words):
    path = credentials_file(environment)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    path.chmod(mode)
    with pytest.raises(CredentialsUnusable, match=words) as refusal:
        find_credentials(ADDRESS, environment)
    assert "secret" not in str(refusal.value).replace("holds a secret", "").replace("the secret", "")


# ---- addresses ------------------------------------------------------------------------------------

LOOPBACK = [
    "tcp://127.0.0.1:5600",
    "tcp://127.0.0.1:*",
    "tcp://127.8.9.10:1",
    "tcp://localhost:5600",
    "tcp://[::1]:5600",
    "tcp://::1:5600",
    "tcp://[::ffff:127.0.0.1]:5600",
    "ipc:///run/nearline.sock",
    "ipc://@nearline",
    "inproc://nearline",
]
BEYOND = [
    "tcp://*:5600",
    "tcp://0.0.0.0:5600",
    "tcp://192.168.1.2:5600",
    "tcp://[::]:5600",
    "tcp://:::5600",
    "tcp://[fe80::1%eth0]:5600",
    "tcp://[::ffff:10.0.0.1]:5600",
    "tcp://eth0:5600",
    "tcp://beamline-7:5600",
    "tcp://localhost.evil.example:5600",
    "tcp://127.0.0.1.evil.example:5600",
    "tcp://127.1:5600",
    "tcp://2130706433:5600",
    "tcp://127.0.0.1@evil:5600",
]
NO_ADDRESS = ["", "127.0.0.1:5600", "tcp://127.0.0.1", "tcp://127.0.0.1:port", "tcp://127.0.0.1:99999", "tcp://:5600"]
NO_ADDRESS += ["udp://127.0.0.1:5600", "ws://127.0.0.1:5600", "ipc://", "tcp://127.0.0.1:5600\n", "http://localhost:80"]


@pytest.mark.parametrize("bind", LOOPBACK)
def test_loopback_needs_nothing(bind):
    check_bind(bind, False, False, False)


GUARDS = [
    (False, False, False, "tokens and encryption"),
    (True, False, False, "without encryption"),
    (False, True, False, "without tokens"),
    (True, True, False, None),
    (False, False, True, None),
]


@pytest.mark.parametrize(("has_tokens", "has_curve", "is_insecure_allowed", "missing"), GUARDS)
@pytest.mark.parametrize("bind", BEYOND)
def test_beyond_loopback_needs_both(bind, has_tokens, has_curve, is_insecure_allowed, missing):
    if missing is None:
        check_bind(bind, has_tokens, has_curve, is_insecure_allowed)
        return
    with pytest.raises(SourceBusy, match=missing):
        check_bind(bind, has_tokens, has_curve, is_insecure_allowed)


@pytest.mark.parametrize("bind", NO_ADDRESS)
def test_what_is_no_address_is_refused_whatever_is_allowed(bind):
    with pytest.raises(SourceBusy, match="write tcp://HOST:PORT"):
        check_bind(bind, True, True, True)


# ---- the command ----------------------------------------------------------------------------------


def _nearline(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "nearline.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | environment)


def test_make_list_and_revoke_by_command(tmp_path, environment):
    (tmp_path / "data").mkdir()
    root = ("--root", str(tmp_path / "data"))
    made = _nearline("token", "create", "--experiment", "lyso-2026", "--scope", "write", "--for", "2d", *root)
    token = made.stdout.strip()
    grant = Authority(service_folder(tmp_path / "data"), is_required=True).admit(token)
    grant.require("write", "lyso-2026")
    assert grant.id in made.stderr
    assert token not in made.stderr

    save = ("--name", "jane", "--save", ADDRESS, "--json")
    second = _nearline("token", "create", "--experiment", "*", *save, *root, **environment)
    assert json.loads(second.stdout)["token"] == find_credentials(ADDRESS, environment).token

    revoked = json.loads(_nearline("token", "revoke", grant.id, "--json", *root).stdout)
    assert (revoked["id"], revoked["state"]) == (grant.id, "revoked")
    rows = json.loads(_nearline("token", "list", "--json", *root).stdout)
    assert [(r["name"], r["scope"], r["state"]) for r in rows[1:]] == [("jane", "read", "valid")]
    assert rows[0]["expires_at"] - rows[0]["issued_at"] == 2 * 86400
    time.sleep(1.1)
    with pytest.raises(AccessDenied, match="revoked"):
        grant.require("write", "lyso-2026")

    key = _nearline("token", "key", *root).stdout.strip()
    assert key.encode() == server_keys(service_folder(tmp_path / "data")).public


REFUSALS = [
    (["token", "create", "--experiment", "a b"], "not usable as a name"),
    (["token", "create", "--experiment", "a", "--for", "soon"], "not a time such as 30d"),
    (["token", "create", "--experiment", "a", "--for", "800d"], "366 days"),
    (["token", "create", "--experiment", "a", "--scope", "root"], "read"),
    (["token", "revoke", "nope"], "nearline token list"),
    (["token", "list", "--root", "/nonexistent"], "no data folder"),
]


@pytest.mark.parametrize(("arguments", "words"), REFUSALS, ids=[" ".join(a[1:]) for a, _ in REFUSALS])
def test_refusals_are_one_sentence(arguments, words, tmp_path: Path):
    done = _nearline(*arguments, NEARLINE_ROOT=str(tmp_path), COLUMNS="300")
    assert done.returncode != 0
    assert words in done.stderr
    assert "Traceback" not in done.stderr
