"""What an indexing program of others is given, what it gives back, and what happens when it dies.

A frame on which a program ends or hangs counts as one without a lattice, with the reason beside it, and the program is
started anew for those after it: one frame in a thousand must not hold up a run. A program that does so several times
in a row, or never starts, is itself at fault: that is an error, and nothing is kept.
"""

import contextlib
import logging
import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from storage.errors import EngineFailed
from storage.geometry import Geometry
from storage.models import StreamHeader
from storage.sensor import Sensor
from tasks.unit_cell import UnitCell

__all__ = [
    "Answer",
    "Child",
    "Engine",
    "EngineJob",
    "EngineStopped",
    "Lattice",
    "Spots",
    "answers_of",
    "environment",
    "flat_geometry",
    "spots_where_rays_enter",
]

log = logging.getLogger("nearline.engines")

# Frames lost one after the other before the program, not the frames, is at fault.
_LOST_IN_A_ROW = 3


class EngineStopped(Exception):
    """The program ended or was ended before all frames were answered; the message says how."""


@dataclass(frozen=True)
class Spots:
    """Spots of one frame, each (n,).

    x, y : px in the frame's array from the outer corner of the first pixel, where the ray enters the sensor.
    intensity : counts. panel : number of the panel.
    """

    x: np.ndarray
    y: np.ndarray
    intensity: np.ndarray
    panel: np.ndarray

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class EngineJob:
    """Frames to index: where the detector stands (without parallax), the cell, and the spots of each frame."""

    header: StreamHeader
    geometry: Geometry
    cell: UnitCell
    frames: tuple[Spots, ...]


@dataclass(frozen=True)
class Lattice:
    """A lattice that a program found.

    A : (3, 3), 1/Å, columns a*, b*, c* in our laboratory frame. shift : as of `tasks.index_frame.Crystal`, rad.
    n_indexed : spots that the program itself counts; None if it does not say.
    """

    A: np.ndarray
    n_indexed: int | None = None
    shift: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class Answer:
    """What a program said of one frame; ``why`` there is no lattice, in its own words."""

    lattices: tuple[Lattice, ...] = ()
    why: str = ""


@dataclass(frozen=True)
class Engine:
    """A program that indexes.

    params : the step's parameters.
    version : of the program on this machine; EngineMissing if there is none.
    index : one answer for each frame of a job, in order.
    """

    name: str
    params: type
    version: Callable[[], str]
    index: Callable[[EngineJob, Any], list[Answer]]


# ---- what a program is given ------------------------------------------------------------------------


def flat_geometry(geometry: Geometry) -> Geometry:
    """The same detector without a sensor to travel into: programs differ in how they see that, or do not at all."""
    return replace(geometry, sensor=Sensor())


def spots_where_rays_enter(geometry: Geometry, q: np.ndarray, panel: np.ndarray, intensity: np.ndarray) -> Spots:
    """Spots with parallax taken off: their rays (n, 3) in 1/Å projected on the panels' planes."""
    flat = flat_geometry(geometry)
    x, y = np.empty(len(q)), np.empty(len(q))
    for number, where in enumerate(flat.panels):
        mine = panel == number
        on_x, on_y = flat.project(q[mine], number)
        x[mine], y[mine] = on_x + where.origin[1], on_y + where.origin[0]
    return Spots(x, y, np.asarray(intensity, float), np.asarray(panel, int))


def environment() -> dict[str, str]:
    """Ours without what would lead another Python astray, and one thread for whoever asks."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return ours | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


# ---- frames that end a program ----------------------------------------------------------------------

Ask = Callable[[Sequence[int]], Iterator[tuple[int, Answer]]]


def answers_of(name: str, n_frames: int, ask: Ask) -> list[Answer]:
    """The answers for all frames; ``ask`` starts the program on some positions, and may raise EngineStopped."""
    answers: dict[int, Answer] = {}
    n_lost = 0
    while left := [position for position in range(n_frames) if position not in answers]:
        reason = f"{name} said nothing of this frame"
        try:
            for position, answer in ask(left):
                answers[position], n_lost = answer, 0
        except EngineStopped as error:
            reason = str(error)
        lost = next((position for position in left if position not in answers), None)
        if lost is None:
            continue
        n_lost += 1
        log.warning("frame %d of %d to index is left without a lattice: %s", lost + 1, n_frames, reason)
        if n_lost >= _LOST_IN_A_ROW:
            raise EngineFailed(
                f"{reason}, {n_lost} frames in a row; try {name} by hand, or index with the step 'index'"
            )
        answers[lost] = Answer(why=reason)
    return [answers[position] for position in range(n_frames)]


class Child:
    """A program under way, in a process group of its own; its lines can be waited for, and it is gone afterwards."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, env: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._errors = folder / "stderr"
        with self._errors.open("ab") as errors:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env=dict(env) if env is not None else environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()

    def line(self, seconds: float) -> bytes:
        """The next line on its standard output; EngineStopped if it ends or says nothing for so long."""
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            raise EngineStopped(f"{self.name} did not answer within {seconds:g} s and was ended") from None
        if line is None:
            raise EngineStopped(f"{self.name} {self._how_it_ended()}")
        return line

    def wait(self, seconds: float) -> None:
        """Until it has ended well; EngineStopped if it fails, or lasts longer."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise EngineStopped(f"{self.name} was not done within {seconds:g} s and was ended") from None
        if code:
            raise EngineStopped(f"{self.name} {self._how_it_ended()}")

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as out:
            for line in out:
                self._lines.put(line)
        self._lines.put(None)

    def _how_it_ended(self) -> str:
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        said = self._errors.read_text(errors="replace").strip().splitlines()
        return f"{how}: {said[-1][:300]}" if said else how
