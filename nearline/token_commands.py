"""`nearline token`: make, list and revoke tokens, and show the key that clients encrypt to."""

import getpass
import json
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from nearline.options import AsJson, Root

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    help="Tokens: who may do what with which experiments. Run these with the account that runs the service.",
)
console = Console()
errors = Console(stderr=True)

Save = Annotated[
    str | None, typer.Option(help="Also keep it for this service address in your ~/.config/nearline/credentials.toml.")
]
_DEFAULT_ROOT = Path("nearline-data")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def read_duration(text: str) -> int:
    """Seconds from ``30d``, ``12h``, ``90m``, ``45s`` or ``2w``."""
    match = re.fullmatch(r"([1-9][0-9]{0,7})([smhdw])", text.strip())
    if not match:
        raise typer.BadParameter(f"{text!r} is not a time such as 30d, 12h, 90m or 2w")
    return int(match[1]) * _SECONDS[match[2]]


@app.command()
def create(
    experiment: Annotated[
        list[str], typer.Option(help="What it is for; may be given several times, '*' for every experiment.")
    ],
    scope: Annotated[
        Literal["read", "write", "admin"], typer.Option(help="What it allows; each includes those before it.")
    ] = "read",
    life: Annotated[str, typer.Option("--for", help="How long, e.g. 12h, 30d, 8w; at most 366d.")] = "30d",
    name: Annotated[str | None, typer.Option(help="Whom or what it is for; by default your account's name.")] = None,
    save: Save = None,
    root: Root = _DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Make a token and print it: the only time it is shown. Give it to a client as NEARLINE_TOKEN."""
    book = _book(root)
    token, record = book.issue(name or getpass.getuser(), experiment, scope, read_duration(life))
    if save:
        _keep(save, token=token)
    if as_json:
        print(json.dumps({"token": token} | _row(record, book)))
        return
    print(token)
    errors.print(
        f"id {record.id}: {scope} for {', '.join(record.experiments)}, until {_when(record.expires_at)}; "
        f"revoke it with `nearline token revoke {record.id}`",
        highlight=False,
    )


@app.command("list")
def show_tokens(root: Root = _DEFAULT_ROOT, as_json: AsJson = False) -> None:
    """List the tokens issued, newest last; the tokens themselves are kept nowhere."""
    book = _book(root)
    rows = [_row(record, book) for record in book.log.issued.values()]
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("id", "name", "scope", "experiments", "expires", "state")
    for row in rows:
        table.add_row(
            row["id"], row["name"], row["scope"], ", ".join(row["experiments"]), _when(row["expires_at"]), row["state"]
        )
    console.print(table if rows else "no tokens yet; `nearline token create --experiment NAME` makes one")


@app.command()
def revoke(
    token: Annotated[str, typer.Argument(metavar="ID", help="Its id, or the beginning of it.")],
    root: Root = _DEFAULT_ROOT,
    as_json: AsJson = False,
) -> None:
    """Make a token count no longer, within a second, for connections that are open as well."""
    book = _book(root)
    record = book.revoke(token)
    if as_json:
        print(json.dumps(_row(record, book)))
    else:
        console.print(f"revoked {record.id} of {record.subject}", highlight=False)


@app.command()
def key(save: Save = None, root: Root = _DEFAULT_ROOT, as_json: AsJson = False) -> None:
    """Print the public key of an encrypting service. Give it to a client as NEARLINE_SERVER_KEY; it is no secret."""
    from streaming.security import server_keys, service_folder

    public = server_keys(service_folder(_existing(root))).public.decode()
    if save:
        _keep(save, server_key=public)
    print(json.dumps({"server_key": public}) if as_json else public)


def _book(root: Path) -> Any:
    from streaming.security import TokenBook, service_folder

    return TokenBook(service_folder(_existing(root)))


def _keep(address: str, *, token: str | None = None, server_key: str | None = None) -> None:
    from streaming.security import save_credentials

    save_credentials(address, token=token, server_key=server_key)


def _existing(root: Path) -> Path:
    if not root.is_dir():
        raise typer.BadParameter(f"no data folder {root}; name the service's own with --root")
    return root


def _row(record: Any, book: Any) -> dict[str, Any]:
    state = "expired" if record.expires_at <= time.time() else "valid"
    return {
        "id": record.id,
        "name": record.subject,
        "scope": record.scope,
        "experiments": list(record.experiments),
        "issued_at": record.issued_at,
        "expires_at": record.expires_at,
        "state": "revoked" if record.id in book.log.revoked else state,
    }


def _when(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
