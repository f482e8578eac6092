"""`nearline doctor`: whether this machine can run Nearline, check by check, each with its remedy.

Each check is a function that says what it found. Nothing of ours is imported before it has been looked
where it would come from, and nothing is changed but a small file that is written and removed.
"""

import ctypes
import importlib.util
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from nearline.prefect_server import is_healthy
from storage.errors import NearlineError

__all__ = ["CHECKS", "Check", "Place", "examine", "show_checks"]

PACKAGES = ("nearline", "flows", "tasks", "streaming", "storage")

# One detector of 4M at 100 frames/s makes 130 MB/s.
_SLOW_DISK_MB_S = 150.0
# A producer that asks for durable frames waits for one of these.
_SLOW_SYNC_S = 0.05
_LEAST_ROOM = 20 << 30
_LEAST_MEMORY = 3 << 29
_TIME_ERROR = 5
_PORTS = {5600: "clients of the service", 31001: "the simulator", 8600: "HTTP", 4200: "Prefect"}

# Command lines that may well have these ports.
_OURS = re.compile(r"nearline(\.cli)? (serve|web|demo|simulate|replay)\b|\bprefect\b")

State = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Check:
    """What one check found; the remedy is empty where none is needed."""

    name: str
    state: State
    found: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """What is examined: a data folder, and a service's address if one is meant."""

    root: Path
    service: str | None = None


def examine(place: Place) -> Iterator[Check]:
    """Every check, in order. One that fails with an error of its own is a failed check."""
    for name, check in CHECKS.items():
        try:
            yield from check(place)
        except (NearlineError, OSError, ImportError, ValueError, subprocess.SubprocessError) as error:
            yield Check(
                name, "fail", f"{type(error).__name__}: {error}", "this should work; the message says what did not"
            )


def show_checks(console: Console, checks: Iterator[Check]) -> bool:
    """Show each check as it is done; whether none failed."""
    done = []
    with console.status("looking …"):
        for check in checks:
            done.append(check)
            mark, style = _MARKS[check.state]
            row = Table.grid(padding=(0, 1))
            row.add_column(width=4)
            row.add_column(width=12)
            row.add_column(overflow="fold")
            row.add_row(Text(mark, style=style), check.name, Text(check.found))
            if check.remedy:
                row.add_row("", "", Text(f"→ {check.remedy}", style=style))
            console.print(row)
    failed = [check.name for check in done if check.state == "fail"]
    worrying = [check.name for check in done if check.state == "warn"]
    console.print(
        f"{len(done) - len(failed) - len(worrying)} ok, {len(worrying)} to look at, {len(failed)} failed", style="bold"
    )
    return not failed


_MARKS: dict[State, tuple[str, str]] = {"ok": ("ok", "green"), "warn": ("warn", "yellow"), "fail": ("FAIL", "bold red")}


# ---- what is installed ----------------------------------------------------------------------------


def check_python(_: Place) -> Iterator[Check]:
    version = ".".join(map(str, sys.version_info[:3]))
    is_new_enough = sys.version_info >= (3, 11)
    remedy = "" if is_new_enough else "install Python 3.11 or newer, and make the environment anew"
    yield Check("python", "ok" if is_new_enough else "fail", f"{version} at {sys.executable}", remedy)


def check_imports(_: Place) -> Iterator[Check]:
    """Our five packages must come from one folder; `streaming` is also the name of a well-known library."""
    home = Path(__file__).resolve().parents[1]
    origins = {name: _origin(name) for name in PACKAGES}
    foreign = {name: origin for name, origin in origins.items() if origin != home / name}
    if not foreign:
        yield Check("imports", "ok", f"{', '.join(PACKAGES)} from {home}")
        return
    for name, origin in foreign.items():
        where = f"{name} comes from {origin}" if origin else f"there is no package {name}"
        remedy = f"uninstall the other package of that name, or put {home} first in PYTHONPATH"
        yield Check("imports", "fail", f"{where}, not from {home}", remedy)


def _origin(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).resolve().parent if spec and spec.origin else None


def check_packages(_: Place) -> Iterator[Check]:
    """Installed versions against the pins of the checkout."""
    pins_file = Path(__file__).resolve().parents[1] / "requirements" / "run.txt"
    if not pins_file.exists():
        yield Check("packages", "ok", "not a checkout: there are no pins to compare with")
        return
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", pins_file.read_text(), re.MULTILINE))
    installed = {name: _version(name) for name in pins}
    missing = [name for name, found in installed.items() if found is None]
    others = [
        f"{name} {found} (pinned {pins[name]})" for name, found in installed.items() if found not in (None, pins[name])
    ]
    if missing:
        yield Check("packages", "fail", f"missing: {_some(missing)}", f"pip install -r {pins_file}")
    if others:
        yield Check("packages", "warn", f"other versions: {_some(others)}", f"pip install -r {pins_file}")
    if not missing and not others:
        yield Check("packages", "ok", f"{len(pins)} as pinned")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_codecs(_: Place) -> Iterator[Check]:
    """Plain Zarr finds our codec by its entry point; HDF5 finds bitshuffle in hdf5plugin."""
    names = {point.name for point in metadata.entry_points(group="zarr.codecs")}
    if "nearline.bslz4" in names:
        yield Check("zarr codec", "ok", "nearline.bslz4 is found by any Zarr in this environment")
    else:
        remedy = "pip install --no-deps -e . in the checkout; or import storage.zarr_codec before zarr.open"
        yield Check("zarr codec", "warn", "nearline.bslz4 is not registered: plain Zarr cannot read frames", remedy)
    import h5py
    import hdf5plugin
    import numpy as np

    pixels = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    with h5py.File("doctor", "w", driver="core", backing_store=False) as file:
        written = file.create_dataset("data", data=pixels, chunks=(64, 64), **hdf5plugin.Bitshuffle(cname="lz4"))
        is_same = np.array_equal(written[()], pixels)
    state: State = "ok" if is_same else "fail"
    yield Check(
        "hdf5 plugin", state, f"bitshuffle by hdf5plugin {hdf5plugin.version}, HDF5 {h5py.version.hdf5_version}"
    )


# ---- the machine ----------------------------------------------------------------------------------


def check_disk(place: Place) -> Iterator[Check]:
    """Room, and how fast 64 MiB are written and synced: enough to tell a disk from a slow share."""
    folder = _existing(place.root)
    usage = shutil.disk_usage(folder)
    room = f"{usage.free / 2**30:.0f} of {usage.total / 2**30:.0f} GiB free in {folder}"
    is_roomy = usage.free >= _LEAST_ROOM
    remedy = "" if is_roomy else "free some space, or name another data folder with --root"
    yield Check("disk space", "ok" if is_roomy else "warn" if usage.free > 1 << 30 else "fail", room, remedy)
    if not os.access(folder, os.W_OK):
        yield Check("disk speed", "fail", f"{folder} cannot be written", "give this account the right to write there")
        return
    rate, sync_s = _write_speed(folder)
    found = f"{rate:.0f} MB/s written and synced, {1e3 * sync_s:.1f} ms a small sync"
    is_fast = rate >= _SLOW_DISK_MB_S and sync_s <= _SLOW_SYNC_S
    remedy = "" if is_fast else "a detector of 4M at 100 frames/s needs 130 MB/s; use a local disk, or mind the rate"
    yield Check("disk speed", "ok" if is_fast else "warn", found, remedy)


def _write_speed(folder: Path) -> tuple[float, float]:
    """(MB/s with the final sync, s for a sync of 4 KiB) in an unnamed file."""
    block = os.urandom(4 << 20)
    with tempfile.TemporaryFile(dir=folder, prefix=".nearline-doctor-", buffering=0) as file:
        began = time.perf_counter()
        for _ in range(16):
            file.write(block)
        os.fsync(file.fileno())
        rate = 16 * len(block) / (time.perf_counter() - began) / 1e6
        times = []
        for _ in range(8):
            began = time.perf_counter()
            file.write(block[:4096])
            os.fsync(file.fileno())
            times.append(time.perf_counter() - began)
    return rate, statistics.median(times)


def check_memory(_: Place) -> Iterator[Check]:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        yield Check("memory", "warn", "this system does not tell", "512 MiB for the buffer and 1 GiB beside are needed")
        return
    found = dict(re.findall(r"^(\w+):\s+(\d+) kB", meminfo.read_text(), re.MULTILINE))
    free, total = (int(found[name]) * 1024 for name in ("MemAvailable", "MemTotal"))
    is_enough = free >= _LEAST_MEMORY
    remedy = "" if is_enough else "the buffer takes 512 MiB unless `nearline serve --buffer` says otherwise"
    text = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB available"
    yield Check("memory", "ok" if is_enough else "warn", text, remedy)


def check_clock(_: Place) -> Iterator[Check]:
    """Frames carry this clock's time; tokens expire by it."""
    wall, steady = time.time(), time.monotonic()
    time.sleep(0.2)
    apart_ms = 1e3 * ((time.time() - wall) - (time.monotonic() - steady))
    if abs(apart_ms) > 5:
        remedy = "something sets the clock by leaps; let NTP slew it"
        yield Check("clock", "warn", f"wall and monotonic clock went {apart_ms:.1f} ms apart in 0.2 s", remedy)
        return
    is_synced = _is_clock_synced()
    found = {True: "kept by NTP", False: "not kept by NTP", None: "steady; whether NTP keeps it is not known"}[
        is_synced
    ]
    remedy = "" if is_synced is not False else "start chronyd or systemd-timesyncd: frames carry this clock's time"
    yield Check("clock", "warn" if is_synced is False else "ok", found, remedy)


def _is_clock_synced() -> bool | None:
    """What the kernel says; None where it cannot be asked."""
    if sys.platform != "linux":
        return None
    # struct timex with modes = 0: a question, for which no right is needed.
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))
    return None if state < 0 else state != _TIME_ERROR


def check_ports(place: Place) -> Iterator[Check]:
    """Who has the ports that Nearline takes unless told otherwise."""
    ports = dict(_PORTS)
    if place.service and (match := re.fullmatch(r"tcp://.+:(\d+)", place.service)):
        ports = {int(match[1]): "clients of the service"} | ports
    for port, purpose in ports.items():
        if not _is_taken(port):
            yield Check(f"port {port}", "ok", f"free, for {purpose}")
            continue
        owner = _owner(port)
        is_expected = _OURS.search(owner or "") is not None
        found = f"in use by {(owner or 'a process of another user')[:150]}"
        remedy = "" if is_expected else f"it is meant for {purpose}: stop that process, or choose another port"
        yield Check(f"port {port}", "ok" if is_expected else "warn", found, remedy)


def _is_taken(port: int) -> bool:
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _owner(port: int) -> str | None:
    """The process that listens on a port, as ``pid 12 (command line)``; None where that cannot be seen."""
    inodes = set()
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        rows = [line.split() for line in table.read_text().splitlines()[1:]] if table.exists() else []
        inodes |= {row[9] for row in rows if int(row[1].rpartition(":")[2], 16) == port and row[3] == "0A"}
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(fd) in wanted for fd in (process / "fd").iterdir()):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                return f"pid {process.name} ({command})"
        except OSError:
            continue  # gone meanwhile, or somebody else's
    return None


# ---- around it ------------------------------------------------------------------------------------


def check_prefect(_: Place) -> Iterator[Check]:
    api = os.environ.get("PREFECT_API_URL")
    if not api:
        yield Check("prefect", "ok", "PREFECT_API_URL is not set: runs are processed without a server")
    elif is_healthy(api):
        yield Check("prefect", "ok", f"{api} answers")
    else:
        remedy = "start the server, or correct or unset PREFECT_API_URL"
        yield Check("prefect", "warn", f"{api} does not answer", remedy)


def check_keys(place: Place) -> Iterator[Check]:
    """Secrets must be open to their owner alone, and be what they are taken for."""
    from streaming.security import TokenBook, credentials_file, find_credentials, server_keys, service_folder

    folder, address = service_folder(place.root), place.service or "tcp://127.0.0.1:5600"
    trials: dict[Path, Callable[[], object]] = {
        folder / "token.key": lambda: TokenBook(folder),
        folder / "curve.key": lambda: server_keys(folder),
        credentials_file(): lambda: find_credentials(address),
    }
    found = [path for path in trials if path.exists()]
    for path in found:
        try:
            trials[path]()
        except NearlineError as error:
            what, _, remedy = str(error).partition("; ")
            yield Check("keys", "fail", what, remedy)
        else:
            yield Check("keys", "ok", f"{path} is in order")
    if not found:
        yield Check("keys", "ok", "none yet; `nearline token create` makes them, loopback needs none")


def check_loopback(_: Place) -> Iterator[Check]:
    """Send frames to a throw-away service, read them back, compare."""
    # What the environment says of a real service is not for this one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NEARLINE_")}
    done = subprocess.run(
        [sys.executable, "-m", "nearline.round_trip"],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        yield Check("round trip", "fail", last, "run `python -m nearline.round_trip` to see all of it")
        return
    result = json.loads(done.stdout)
    rate = result["n_frames"] / result["seconds"]
    yield Check("round trip", "ok", f"{result['n_frames']} frames there and back, compared; {rate:.0f} frames/s")


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder


CHECKS: dict[str, Callable[[Place], Iterator[Check]]] = {
    "python": check_python,
    "imports": check_imports,
    "packages": check_packages,
    "codecs": check_codecs,
    "disk": check_disk,
    "memory": check_memory,
    "clock": check_clock,
    "ports": check_ports,
    "prefect": check_prefect,
    "keys": check_keys,
    "round trip": check_loopback,
}
