"""Figures for people and for programs: one table, and a JSON file per benchmark."""

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from benchmarks.measure import Figure, Target
from benchmarks.program import find_program

__all__ = ["machine", "program_version", "table", "versions", "write_json"]

_PACKAGES = (
    "nearline", "numpy", "numba", "bitshuffle", "zarr", "pyzmq", "blake3", "xxhash", "google-crc32c", "awscrt",
    "pyarrow", "redis", "nats-py",
)  # fmt: skip
_PROGRAMS = ("redis-server", "nats-server")
_SIGNS = {"of limit": "≥ {} of it", "at least": "≥ {}", "at most": "≤ {}"}


def machine() -> dict[str, Any]:
    """What it ran on: no names, but all that explains a number."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return {
        "cpu": cpu.group(1) if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory.group(1)) / 2**20, 1) if memory else None,
        "kernel": f"{platform.system()} {platform.release().partition('-')[0]}",
        # What others were doing: above the number of cores, every figure here suffers.
        "load_average_1min": round(os.getloadavg()[0], 2),
    }


def versions() -> dict[str, str]:
    """Python, the packages that decide speed, and the programs measured beside them."""
    packages = {name: version(name) for name in _PACKAGES}
    return {"python": platform.python_version()} | packages | {name: program_version(name) for name in _PROGRAMS}


def program_version(name: str) -> str:
    """What a server says of itself, or "not installed"."""
    path = find_program(name)
    if path is None:
        return "not installed"
    said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    found = re.search(r"\d+\.\d+\.\d+", said)
    return found.group() if found else said.strip()


def write_json(folder: Path, name: str, figures: Sequence[Figure], command: str, before: Mapping[str, Any]) -> Path:
    """All figures of one benchmark, with everything needed to judge them; ``before`` is `machine` at the start."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    content = {
        "benchmark": name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        "machine": dict(before) | {"load_average_1min_after": machine()["load_average_1min"]},
        "versions": versions(),
        "figures": [asdict(figure) for figure in figures],
    }
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return path


def table(results: Mapping[str, Sequence[Figure]]) -> Table:
    """One table of everything; ``of limit`` is 1 at the limit and above 1 when faster."""
    found = Table(title="Nearline beside its limits (medians; low to high over the rounds)")
    for heading in ("benchmark", "figure"):
        found.add_column(heading)
    for heading in ("value", "low to high"):
        found.add_column(heading, justify="right")
    found.add_column("limit or peer")
    for heading in ("its value", "of limit", "target"):
        found.add_column(heading, justify="right")
    found.add_column("")
    for name, figures in results.items():
        for number, one in enumerate(figures):
            found.add_row(
                name if number == 0 else "",
                escape(one.name),
                f"{_short(one.value)} {one.unit}",
                f"{_short(one.low)} to {_short(one.high)}" if one.n_rounds > 1 else "",
                escape(one.limit_name or ""),
                f"{_short(one.limit_value)} {one.unit}" if one.limit_value is not None else "",
                f"{one.ratio:.2f}" if one.ratio is not None else "",
                _target(one.target),
                "" if one.is_met is None else "ok" if one.is_met else "short",
            )
        found.add_section()
    return found


def _target(target: Target | None) -> str:
    return _SIGNS[target.kind].format(_short(target.number)) if target else ""


def _short(value: float) -> str:
    """Three figures that count, no exponents."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
