"""Files with secrets: made with mode 0600 from their first moment, and refused when others can open them."""

import os
import stat
from pathlib import Path

from storage.errors import CredentialsUnusable
from storage.files import publish_file, sync_folder

__all__ = ["create_private", "read_private", "replace_private"]

_OPEN_TO_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def create_private(path: Path, content: bytes) -> bool:
    """Create a file that only its owner can open; False, changing nothing, when it exists already."""
    aside = _write_aside(path, content)
    try:
        return publish_file(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def replace_private(path: Path, content: bytes) -> None:
    """Swap a file that only its owner can open for a new version in one step."""
    aside = _write_aside(path, content)
    try:
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)


def read_private(path: Path) -> bytes:
    """The content of such a file.

    Raises
    ------
    FileNotFoundError : there is none.
    CredentialsUnusable : it belongs to somebody else, or others can open it too.
    """
    try:
        with open(path, "rb") as file:
            # Of the file that is open, not of whatever has its name by now.
            _require_private(path, os.fstat(file.fileno()))
            return file.read()
    except PermissionError:
        raise CredentialsUnusable(
            f"{path} cannot be read by this user (id {os.geteuid()}); use the account that runs the service"
        ) from None


def _require_private(path: Path, status: os.stat_result) -> None:
    if status.st_uid not in (os.geteuid(), 0):
        raise CredentialsUnusable(
            f"{path} belongs to user id {status.st_uid}, who could change it; make it yours with chown, or remove it"
        )
    if status.st_mode & _OPEN_TO_OTHERS:
        mode = stat.S_IMODE(status.st_mode)
        raise CredentialsUnusable(
            f"{path} holds a secret and has mode {mode:04o}, so that others can open it; chmod 600 {path}, "
            "and replace the secret if somebody may have read it"
        )


def _write_aside(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        aside.unlink(missing_ok=True)
        raise
    return aside
