"""Results of a processing against what the simulator really put on the frames."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from storage.step_store import Processing
from tasks.step_tables import crystal_matrix
from tasks.unit_cell import UnitCell, same_orientation

__all__ = ["Comparison", "compare_with_truth"]

MAX_ANGLE_DEG = 0.3
MAX_CELL_ERROR = 0.01


@dataclass(frozen=True)
class Comparison:
    """Counts of frames. A lattice is correct within 0.3° (up to the lattice's symmetry) and 1 % of each cell edge."""

    n_frames: int
    true_hits: int
    found_hits: int
    false_hits: int
    correct: int
    wrong: int

    @property
    def problems(self) -> list[str]:
        """What falls short of the promise, in words."""
        limits = [
            (
                self.found_hits >= 0.95 * self.true_hits,
                f"{self.found_hits} of {self.true_hits} hits found, 95 % wanted",
            ),
            (
                self.false_hits <= 0.02 * max(self.n_frames - self.true_hits, 1),
                f"{self.false_hits} blank frames called hits, 2 % allowed",
            ),
            (
                self.correct >= 0.9 * (self.found_hits + self.false_hits),
                f"{self.correct} of {self.found_hits + self.false_hits} hits indexed correctly, 90 % wanted",
            ),
            (self.wrong <= 0.01 * self.n_frames, f"{self.wrong} frames with a wrong lattice, 1 % allowed"),
        ]
        return [text for is_good, text in limits if not is_good]


def compare_with_truth(processing: Processing, truth_file: Path, cell: UnitCell) -> Comparison:
    """Hold hits and lattices of a processing against the simulator's truth file."""
    from streaming.simulator import read_truth

    truth = read_truth(truth_file)
    frames = processing.frames.select(["frame_index", "hit"]).to_pylist()
    lattices: dict[int, list[bool]] = {}
    for row in processing.crystals.to_pylist():
        index = row["frame_index"]
        lattices.setdefault(index, []).append(_is_correct(row, truth[index], cell))
    is_true = {row["frame_index"]: bool(truth[row["frame_index"]].is_hit) for row in frames}
    found = {row["frame_index"] for row in frames if row["hit"]}
    return Comparison(
        n_frames=len(frames),
        true_hits=sum(is_true.values()),
        found_hits=sum(is_true[index] for index in found),
        false_hits=sum(not is_true[index] for index in found),
        correct=sum(all(answers) for answers in lattices.values()),
        wrong=sum(not all(answers) for answers in lattices.values()),
    )


def _is_correct(row: Mapping[str, Any], truth: Any, cell: UnitCell) -> bool:
    if not truth.is_hit:
        return False
    is_same, _ = same_orientation(crystal_matrix(row), truth.A.T, cell, tolerance_deg=MAX_ANGLE_DEG)
    edges = np.array([row["a"], row["b"], row["c"]]) / np.array(cell.parameters[:3])
    return bool(is_same and np.abs(edges - 1).max() <= MAX_CELL_ERROR)
