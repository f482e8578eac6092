"""CrystFEL's indexamajig on our peaks, one process for the frames of a chunk.

It gets a CXI file with the peaks of each frame and no pixels (``--no-image-data``), a geometry, a cell and a list of
frames, and leaves a stream, which is read back. Parallax, which CrystFEL does not know, is off the peaks already.

Source: indexamajig(1), crystfel_geometry(5), crystfel_unitcell(5) of CrystFEL 0.11.
"""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import h5py
import numpy as np

from storage.crystfel import StreamCrystal, geometry_file, read_stream
from storage.errors import BadFrame, BadRecipe, EngineMissing
from tasks.engines.engine import Answer, Child, EngineJob, EngineStopped, Lattice, answers_of, environment
from tasks.unit_cell import cell_file_text

__all__ = ["PROGRAM", "IndexamajigParams", "command_line", "index", "read_answers", "version", "write_job"]

PROGRAM = "indexamajig"
_DATA, _PEAKS = "/entry_1/data_1/data", "/entry_1/result_1"
_FRAMES, _LIST, _GEOMETRY, _CELL, _STREAM = "frames.cxi", "frames.lst", "detector.geom", "target.cell", "out.stream"
_START_S = 60.0
# What we give ourselves; another value would lead the results astray.
_OURS = ("-i", "--input", "-o", "--output", "-g", "--geometry", "-p", "--pdb", "-j", "--peaks", "--indexing")
# CXI, like an index into the array, has the middle of the first pixel at 0.
_HALF_PIXEL = 0.5


@dataclass(frozen=True)
class IndexamajigParams:
    """How indexamajig is to index.

    indexing : its methods, separated by commas, such as ``xgandalf,asdf``; asdf is in every CrystFEL.
    multi : whether to look for further lattices in what the first leaves over.
    arguments : further options of the program, each as one word: ``--tolerance=5,5,5,2,2,2``.
    frame_seconds : times the number of frames, the time after which the program is ended.
    """

    indexing: str = "asdf"
    multi: bool = False
    arguments: tuple[str, ...] = ()
    frame_seconds: float = 60.0

    def __post_init__(self) -> None:
        if not self.indexing or not 0 < self.frame_seconds < float("inf"):
            raise BadRecipe(f"indexing {self.indexing!r} or frame_seconds {self.frame_seconds} says nothing; see docs")
        for word in self.arguments:
            if not word.startswith("-") or word.partition("=")[0] in _OURS or word[:2] in _OURS:
                raise BadRecipe(f"argument {word!r} is no option, or one that Nearline gives itself; leave it out")


def version() -> str:
    """The first line of ``indexamajig --version``, such as ``CrystFEL: 0.11.1``."""
    program = shutil.which(PROGRAM)
    if program is None:
        raise EngineMissing(
            "indexamajig is not on PATH; install CrystFEL 0.10 or newer (https://www.desy.de/~twhite/crystfel/)"
        )
    return _version_of(program)


@cache
def _version_of(program: str) -> str:
    try:
        done = subprocess.run(
            [program, "--version"], env=environment(), capture_output=True, text=True, timeout=_START_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineMissing(f"{program} cannot be asked for its version: {error}; install CrystFEL again") from None
    said = (done.stdout or done.stderr).strip().splitlines()
    if done.returncode or not said:
        raise EngineMissing(f"{program} --version ended with code {done.returncode}; install CrystFEL again")
    return said[0]


def index(job: EngineJob, params: IndexamajigParams) -> list[Answer]:
    """An answer for each frame. EngineFailed if the program ends or hangs whatever it is given."""
    version()  # there is one
    with tempfile.TemporaryDirectory(prefix="nearline-indexamajig-") as name:
        folder = Path(name)
        write_job(folder, job)

        def ask(positions: Sequence[int]) -> Iterator[tuple[int, Answer]]:
            (folder / _LIST).write_text("".join(f"{folder / _FRAMES} //{position}\n" for position in positions))
            stopped: EngineStopped | None = None
            with Child(PROGRAM, command_line(params), folder) as child:
                try:
                    child.wait(params.frame_seconds * len(positions))
                except EngineStopped as error:
                    stopped = error
            yield from read_answers(folder, job)
            if stopped is not None:
                raise stopped

        return answers_of(PROGRAM, len(job.frames), ask)


def command_line(params: IndexamajigParams) -> list[str]:
    """The program and its arguments, to be run in the folder of a job."""
    multi = ["--multi"] if params.multi else []
    return [
        PROGRAM, f"--input={_LIST}", f"--output={_STREAM}", f"--geometry={_GEOMETRY}", "-p", _CELL,
        f"--indexing={params.indexing}", "--peaks=cxi", "--no-revalidate", "--no-image-data", "--cell-parameters-only",
        "--no-refls-in-stream", "--temp-dir=.", "-j", "1", "--max-indexer-threads=1", *multi, *params.arguments,
    ]  # fmt: skip


def write_job(folder: Path, job: EngineJob) -> None:
    """Geometry, cell and peaks; the list of frames changes when the program is started again."""
    text = geometry_file(job.header, geometry=job.geometry, data_path=_DATA)
    (folder / _GEOMETRY).write_text(f"peak_list = {_PEAKS}\npeak_list_type = cxi\n{text}")
    (folder / _CELL).write_text(cell_file_text(job.cell))
    n, most = len(job.frames), max(map(len, job.frames), default=0)
    columns = {name: np.zeros((n, max(most, 1)), np.float32) for name in ("x", "y", "intensity")}
    for row, spots in enumerate(job.frames):
        columns["x"][row, : len(spots)] = spots.x - _HALF_PIXEL
        columns["y"][row, : len(spots)] = spots.y - _HALF_PIXEL
        columns["intensity"][row, : len(spots)] = spots.intensity
    with h5py.File(folder / _FRAMES, "w") as file:
        # Frames without a pixel written, so that whoever asks for their number and shape is told.
        slow, fast = job.header.image_shape
        file.create_dataset(_DATA, (n, slow, fast), np.uint16, chunks=(1, slow, fast))
        peaks = file.create_group(_PEAKS)
        peaks["nPeaks"] = np.array([len(spots) for spots in job.frames], np.int32)
        peaks["peakXPosRaw"], peaks["peakYPosRaw"] = columns["x"], columns["y"]
        peaks["peakTotalIntensity"] = columns["intensity"]


def read_answers(folder: Path, job: EngineJob) -> Iterator[tuple[int, Answer]]:
    """Position and answer of each frame that stands whole in the stream."""
    path = folder / _STREAM
    if not path.exists():
        return
    distance_mm = 1e3 * job.geometry.panels[0].corner[2]
    try:
        for frame in read_stream(path):
            lattices = tuple(_lattice(crystal, distance_mm) for crystal in frame.crystals if _is_right_handed(crystal))
            left_handed = len(lattices) < len(frame.crystals)
            why = "" if lattices else "left-handed axes" if left_handed else "no lattice found"
            yield int(frame.event.rpartition("/")[2]), Answer(lattices, why)
    except (BadFrame, ValueError) as error:
        raise EngineStopped(f"the stream of {PROGRAM} cannot be read: {error}") from None


def _is_right_handed(crystal: StreamCrystal) -> bool:
    return float(np.linalg.det(crystal.A)) > 0


def _lattice(crystal: StreamCrystal, distance_mm: float) -> Lattice:
    x, y = crystal.det_shift_mm
    return Lattice(crystal.A.T.copy(), None, (x / distance_mm, y / distance_mm))
