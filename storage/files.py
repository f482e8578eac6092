"""Files that appear whole or not at all, and never twice.

`publish` creates without replacing (write aside, sync, link); `replace` swaps a derived file
by rename. Both sync the file and its folder.
"""

import os
from pathlib import Path

__all__ = ["publish", "publish_file", "replace", "sync_folder"]


def publish(path: Path, content: bytes) -> bool:
    """Create ``path`` with this content; False, changing nothing, when it exists already."""
    aside = _write_aside(path, content)
    try:
        return publish_file(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def publish_file(source: Path, path: Path) -> bool:
    """Give a synced file its final name as well; False when that name is taken by another file."""
    try:
        os.link(source, path)
    except FileExistsError:
        return path.samefile(source)
    sync_folder(path.parent)
    return True


def replace(path: Path, content: bytes) -> None:
    """Swap a derived file for a new version in one step."""
    aside = _write_aside(path, content)
    try:
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write_aside(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        with open(aside, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        # On a full disk the half-written file would take the room that the next attempt needs.
        aside.unlink(missing_ok=True)
        raise
    return aside
