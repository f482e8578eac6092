"""DIALS's stills indexer on our peaks, in DIALS's own Python, one process for the frames of a chunk.

No pixel goes there: `dials_driver` makes a reflection table of the peaks and an experiment of our geometry, and asks
`dials.algorithms.indexing` frame by frame. DIALS's laboratory (imgCIF) has x and z the other way round.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from storage.errors import BadRecipe, EngineFailed, EngineMissing
from storage.geometry import Panel
from tasks.engines import dials_driver
from tasks.engines.engine import Answer, Child, EngineJob, EngineStopped, Lattice, answers_of, environment

__all__ = ["DRIVER", "DialsParams", "dials_python", "index", "read_answer", "version", "write_job"]

PYTHON = "NEARLINE_DIALS_PYTHON"
DRIVER = Path(dials_driver.__file__)
_VERSION = "from dials.util.version import dials_version; print(dials_version())"
# Importing DIALS takes 3 s, and many times that from a cold network disk.
_START_S = 180.0
# Laboratory (NeXus) to imgCIF and back: half a turn about y.
_TO_IMGCIF = np.array([-1.0, 1.0, -1.0])


@dataclass(frozen=True)
class DialsParams:
    """How DIALS is to index.

    method : ``indexing.method`` of DIALS.
    max_lattices : lattices to look for in one frame.
    phil : further parameters of ``dials.stills_process`` in its own words, each ``name=value``.
    frame_seconds : a frame that takes longer counts as not indexed.
    """

    method: str = "real_space_grid_search"
    max_lattices: int = 1
    phil: tuple[str, ...] = ()
    frame_seconds: float = 120.0

    def __post_init__(self) -> None:
        if self.max_lattices < 1 or not 0 < self.frame_seconds < float("inf"):
            raise BadRecipe(
                f"max_lattices {self.max_lattices} (at least 1) or frame_seconds {self.frame_seconds} (above 0) "
                "is out of bounds; see DialsParams"
            )
        if wrong := [text for text in self.phil if "=" not in text or "\n" in text]:
            raise BadRecipe(f"phil {wrong[0]!r} is no parameter of DIALS; write name=value")


def dials_python() -> str:
    """The interpreter that has DIALS; EngineMissing if none is found."""
    if given := os.environ.get(PYTHON):
        return given
    if own := shutil.which("dials.python"):
        return own
    program = shutil.which("dials.stills_process")
    interpreter = _interpreter_of(Path(program)) if program else ""
    if "python" not in interpreter.rpartition("/")[2]:
        raise EngineMissing(
            "DIALS is not on PATH; install it (Debian: apt install dials; elsewhere: conda install -c conda-forge "
            f"dials), or name the Python that has it in {PYTHON}"
        )
    return interpreter


def _interpreter_of(program: Path) -> str:
    """What its first line says it is run with."""
    with program.open("rb") as file:
        return file.readline().decode(errors="replace").removeprefix("#!").strip()


def version() -> str:
    """Such as ``DIALS 3.12``."""
    return _version_at(dials_python())


@cache
def _version_at(python: str) -> str:
    try:
        done = subprocess.run(
            [python, "-c", _VERSION], env=environment(), capture_output=True, text=True, timeout=_START_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineMissing(f"{python} cannot be asked for DIALS: {error}; correct {PYTHON}") from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EngineMissing(f"{python} has no DIALS that works ({said}); install it, or correct {PYTHON}")
    return done.stdout.strip()


def index(job: EngineJob, params: DialsParams) -> list[Answer]:
    """An answer for each frame. EngineFailed if DIALS does not start, or refuses the parameters."""
    with tempfile.TemporaryDirectory(prefix="nearline-dials-") as name:
        folder = Path(name)
        write_job(folder, job, params)

        def ask(positions: Sequence[int]) -> Iterator[tuple[int, Answer]]:
            command = [dials_python(), str(DRIVER), name, str(positions[0])]
            with Child("DIALS", command, folder) as child:
                _started(child)
                for _ in positions:
                    said = json.loads(child.line(params.frame_seconds))
                    yield said["position"], read_answer(said)

        return answers_of("DIALS", len(job.frames), ask)


def _started(child: Child) -> None:
    try:
        said = json.loads(child.line(_START_S))
    except (EngineStopped, ValueError) as error:
        raise EngineFailed(f"{error}; try dials.stills_process by hand") from None
    if said.get("refused"):
        raise EngineFailed(f"DIALS knows no parameter {said['refused']}; correct phil in the recipe")
    if said["ready"] != version():
        raise EngineFailed(
            f"DIALS was {version()} when this process began and is {said['ready']} now; start the process again"
        )


def read_answer(said: dict[str, Any]) -> Answer:
    """What the driver said of one frame, in our laboratory frame."""
    lattices = [
        Lattice(_TO_IMGCIF[:, None] * np.array(found["A"], float).reshape(3, 3), found["n_indexed"])
        for found in said["lattices"]
    ]
    return Answer(tuple(lattices), said["why"])


def write_job(folder: Path, job: EngineJob, params: DialsParams) -> None:
    """The two files that the driver reads; positions are counted from each panel's own corner."""
    content = {
        "wavelength": job.geometry.wavelength,
        "panels": [_panel(panel) for panel in job.geometry.panels],
        "cell": job.cell.parameters,
        "space_group": job.cell.space_group,
        "max_lattices": params.max_lattices,
        "phil": [f"indexing.method={params.method}", *params.phil],
    }
    (folder / "job.json").write_text(json.dumps(content))
    corners = np.array([panel.origin for panel in job.geometry.panels])
    at = [corners[spots.panel] for spots in job.frames]
    np.savez(
        folder / "spots.npz",
        offset=np.cumsum([0, *map(len, job.frames)]),
        x=_joined([spots.x - corner[:, 1] for spots, corner in zip(job.frames, at, strict=True)]),
        y=_joined([spots.y - corner[:, 0] for spots, corner in zip(job.frames, at, strict=True)]),
        intensity=_joined([spots.intensity for spots in job.frames]),
        panel=_joined([spots.panel for spots in job.frames]).astype(np.int64),
    )


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.empty(0)


def _panel(panel: Panel) -> dict[str, Any]:
    """A panel in mm in DIALS's laboratory."""
    fast, slow = np.array(panel.fast), np.array(panel.slow)
    sizes = [float(np.linalg.norm(fast)), float(np.linalg.norm(slow))]
    return {
        "name": panel.name,
        "fast": (_TO_IMGCIF * fast / sizes[0]).tolist(),
        "slow": (_TO_IMGCIF * slow / sizes[1]).tolist(),
        "origin": (1e3 * _TO_IMGCIF * np.array(panel.corner)).tolist(),
        "pixel_size": [1e3 * size for size in sizes],
        "shape": panel.shape,
    }
