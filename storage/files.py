"""Files that appear whole or not at all, and never twice; on a disk or on any fsspec file system.

`publish` creates without replacing (write aside, sync, link; on an object store a conditional
put); `replace` swaps a derived file for a new one. On a disk both sync the file and its folder.

A place is a `pathlib.Path`, or for a URL a `UPath`, which has the same methods: annotations say
`Path` for both. Only what needs a kernel (locks, `pread`, links) asks `is_local`.
"""

import io
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from storage.errors import PlaceUnavailable

if TYPE_CHECKING:
    from upath import UPath

__all__ = [
    "append_line",
    "file_sizes",
    "is_local",
    "make_folder",
    "publish",
    "publish_copy",
    "publish_file",
    "read_many",
    "readable",
    "remote_errors",
    "remove",
    "replace",
    "replace_copy",
    "storage_options",
    "sync_folder",
    "to_path",
]

# A file is sent in parts, several at once: 64 MiB in memory. The client's own default takes 500.
_PUT_OPTIONS: dict[str, dict[str, Any]] = {"s3": {"chunksize": 16 << 20, "max_concurrency": 4}}
_COPY_BYTES = 4 << 20


def to_path(place: "str | os.PathLike[str] | UPath") -> Path:
    """A place on disk, or behind a URL such as ``s3://bucket/prefix``.

    Address and credentials of an object store come from its own environment (``AWS_…``) or from
    fsspec's (``FSSPEC_S3_ENDPOINT_URL`` …, ``~/.config/fsspec``). A `UPath` keeps its own options.
    """
    if not isinstance(place, str | os.PathLike):
        return cast(Path, place)
    text = os.fspath(place)
    if "://" not in text:
        return Path(text)
    # It brings fsspec, a tenth of a second to import: only those who go far pay.
    from upath import UPath

    # Somebody else adds files while we look: a listing must not be an old one.
    path = UPath(text, use_listings_cache=False)
    return Path(path.path) if path.protocol in ("file", "local") else cast(Path, path)


def is_local(path: Any) -> bool:
    """Whether the kernel knows this path, so that it can be locked, linked and `pread`."""
    return isinstance(path, os.PathLike)


def storage_options(path: Path) -> dict[str, Any] | None:
    """What a library that opens the URL itself (Zarr) must be told besides; None for a path on disk."""
    return None if is_local(path) else dict(cast(Any, path).storage_options)


def readable(path: Path) -> Any:
    """What Parquet and HDF5 readers take: the path, or where there is none the file's content."""
    return path if is_local(path) else io.BytesIO(path.read_bytes())


def read_many(paths: Sequence[Path]) -> list[bytes]:
    """The content of some files of one folder; behind a URL many at a time. FileNotFoundError if one is gone."""
    if not paths or is_local(paths[0]):
        return [path.read_bytes() for path in paths]
    fs, keys = _file_system(paths[0])[0], [_file_system(path)[1] for path in paths]
    with remote_errors(paths[0]):
        found = fs.cat(keys)
    return [found[key] for key in keys]


def publish(path: Path, content: bytes) -> bool:
    """Create ``path`` with this content; False, changing nothing, when it exists already."""
    if not is_local(path):
        return _create_object(path, lambda fs, key: fs.pipe_file(key, content, mode="create"))
    aside = _write_aside(path, io.BytesIO(content))
    try:
        return publish_file(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def publish_copy(source: Path, path: Path) -> bool:
    """Create ``path`` as a copy of a local file; False, changing nothing, when it exists already."""
    if not is_local(path):
        return _create_object(path, lambda fs, key: fs.put_file(str(source), key, mode="create", **_put_options(path)))
    with open(source, "rb") as file:
        aside = _write_aside(path, file)
    try:
        return publish_file(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def replace_copy(source: Path, path: Path) -> bool:
    """Make ``path`` a copy of a local file in one step, whatever was there; True."""
    if not is_local(path):
        fs, key = _file_system(path)
        with remote_errors(path):
            fs.put_file(str(source), key, **_put_options(path))
        return True
    with open(source, "rb") as file:
        aside = _write_aside(path, file)
    _rename(aside, path)
    return True


def publish_file(source: Path, path: Path) -> bool:
    """Give a synced local file its final name as well; False when that name is taken by another file."""
    try:
        os.link(source, path)
    except FileExistsError:
        if not path.samefile(source):
            return False
    sync_folder(path.parent)
    return True


def replace(path: Path, content: bytes, *, is_synced: bool = True) -> None:
    """Swap a derived file for a new version in one step; unsynced, a power loss may leave it empty."""
    if not is_local(path):
        with remote_errors(path):
            path.write_bytes(content)
        return
    _rename(_write_aside(path, io.BytesIO(content), is_synced=is_synced), path, is_synced=is_synced)


def append_line(path: Path, line: str) -> None:
    """Add a line to a local file, synced; after a crash it is there whole, or torn at the end."""
    with open(path, "ab") as file:
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def make_folder(folder: Path) -> None:
    """A folder and those above it, their names durable."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def remove(path: Path) -> None:
    """Take away a file or a folder with all that is in it; it may be gone, or half gone, already."""
    if not is_local(path):
        fs, key = _file_system(path)
        with remote_errors(path):
            if fs.exists(key):
                fs.rm(key, recursive=True)
    elif path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def file_sizes(folder: Path) -> dict[str, int]:
    """Size in bytes of every file below a folder, by its path relative to it; of a file, its own under ""."""
    if is_local(folder):
        if folder.is_file():
            return {"": folder.stat().st_size}
        return {str(p.relative_to(folder)): p.stat().st_size for p in folder.rglob("*") if p.is_file()}
    fs, key = _file_system(folder)
    fs.invalidate_cache(key)
    with remote_errors(folder):
        found = fs.find(key, detail=True)
    return {name.removeprefix(key).lstrip("/"): entry["size"] for name, entry in found.items()}


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def remote_errors(place: Path) -> Iterator[None]:
    """Turn what a store's client raises when its server does not answer into an error of ours, an OSError."""
    try:
        yield
    except _client_errors() as error:
        raise PlaceUnavailable(
            f"{place} cannot be reached: {error}; check the network, the store's address and the credentials"
        ) from error


def _client_errors() -> tuple[type[Exception], ...]:
    """Base of the errors of S3's client that are no OSError; nothing while that client is not loaded."""
    botocore = sys.modules.get("botocore.exceptions")
    return (botocore.BotoCoreError,) if botocore else ()


def _create_object(path: Path, create: Any) -> bool:
    fs, key = _file_system(path)
    try:
        with remote_errors(path):
            create(fs, key)
    except FileExistsError:
        return False
    return True


def _put_options(path: Path) -> dict[str, Any]:
    return _PUT_OPTIONS.get(cast(Any, path).protocol, {})


def _file_system(path: Path) -> tuple[Any, str]:
    """The fsspec file system of a remote path, and its name there."""
    remote = cast(Any, path)
    return remote.fs, remote.path


def _rename(aside: Path, path: Path, *, is_synced: bool = True) -> None:
    try:
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    if is_synced:
        sync_folder(path.parent)


def _write_aside(path: Path, content: IO[bytes], *, is_synced: bool = True) -> Path:
    make_folder(path.parent)
    aside = path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(4).hex()}")
    try:
        with open(aside, "wb") as file:
            shutil.copyfileobj(content, file, _COPY_BYTES)
            if is_synced:
                file.flush()
                os.fsync(file.fileno())
    except OSError:
        # On a full disk the half-written file would take the room that the next attempt needs.
        aside.unlink(missing_ok=True)
        raise
    return aside
