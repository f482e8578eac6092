"""Charts of what users' steps made: each scalar over the run, and the mean of each array over its frames.

What is kept does not grow with the run: a few means of each chunk, and one sum for each array.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from flows.charts import as_image, lines, mean_of_known

__all__ = ["Array", "Scalar", "StepColumns"]

# Points of a chart that one chunk adds at most, and that a column keeps: beyond, neighbours are made one.
_POINTS_PER_CHUNK, _MOST_POINTS = 10, 2_000
# A page with more is read by nobody; the others are named below.
_MOST_CHARTS = 12


@dataclass
class Scalar:
    """Means of neighbouring frames: where they are, and what they are."""

    at: list[float] = field(default_factory=list)
    means: list[float] = field(default_factory=list)

    def take_in(self, frame_index: np.ndarray, values: np.ndarray) -> None:
        for part in np.array_split(np.arange(len(values)), min(len(values), _POINTS_PER_CHUNK)):
            self.at.append(float(frame_index[part].mean()))
            self.means.append(mean_of_known(values[part]))
        if len(self.at) > _MOST_POINTS:
            self.at, self.means = ([mean_of_known(np.array(pair)) for pair in _pairs(v)] for v in (self.at, self.means))

    def chart(self, name: str) -> str:
        known = [value for value in self.means if np.isfinite(value)]
        title = f"{name}, newest {known[-1]:.4g}" if known else f"{name}: none yet"
        drawn = lines(self.at, {"mean": self.means}, title=title, x_label="frame", lowest=None)
        return as_image(drawn, f"{name} over frames")


@dataclass
class Array:
    """Sum and number of the values at each place, over all frames so far."""

    sums: np.ndarray
    counts: np.ndarray
    n_frames: int = 0

    def take_in(self, values: np.ndarray) -> None:
        known = np.isfinite(values)
        self.sums += np.where(known, values, 0).sum(axis=0)
        self.counts += known.sum(axis=0)
        self.n_frames += len(values)

    @property
    def mean(self) -> np.ndarray:
        """(element,); NaN where no frame has a value."""
        mean = np.full(len(self.sums), np.nan)
        np.divide(self.sums, self.counts, out=mean, where=self.counts > 0)
        return mean

    def chart(self, name: str) -> str:
        mean = self.mean
        lowest = min(0.0, float(np.nanmin(mean))) if np.isfinite(mean).any() else 0.0
        title = f"{name}, mean of {self.n_frames} frames"
        drawn = lines(range(len(mean)), {"mean": mean.tolist()}, title=title, x_label="element", lowest=lowest)
        return as_image(drawn, f"mean of {name}")


class StepColumns:
    """The columns of users' steps as they come, chunk by chunk; text is left out."""

    def __init__(self) -> None:
        self.scalars: dict[str, Scalar] = {}
        self.arrays: dict[str, Array] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.scalars

    def take_in(self, frames: pa.Table, offset: int = 0) -> None:
        """The ``frames`` table of one step on one chunk, with ``frame_index``; ``offset`` is added to that."""
        index = frames["frame_index"].to_numpy() + offset
        if not len(index):
            return
        for name in frames.column_names:
            column = frames[name]
            if name == "frame_index":
                continue
            if pa.types.is_fixed_size_list(column.type):
                values = _numbers(column.combine_chunks().flatten()).reshape(len(index), -1)
                self._array(name, values.shape[1]).take_in(values)
            elif _is_number(column.type):
                self.scalars.setdefault(name, Scalar()).take_in(index, _numbers(column))

    def _array(self, name: str, length: int) -> Array:
        if name in self.arrays and len(self.arrays[name].sums) != length:
            name = f"{name} of {length}"  # in another run of the sample
        return self.arrays.setdefault(name, Array(np.zeros(length), np.zeros(length, np.int64)))

    def charts(self) -> str:
        """All of them as Markdown images; empty if there are none."""
        kept: dict[str, Scalar | Array] = {**self.arrays, **self.scalars}
        text = "\n".join(kept[name].chart(name) for name in list(kept)[:_MOST_CHARTS])
        left_out = list(kept)[_MOST_CHARTS:]
        return f"{text}\n\nand {', '.join(left_out)}, in the tables" if left_out else text


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _numbers(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """(n,) float64, NaN where there is no value."""
    values: np.ndarray = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return values


def _pairs(values: list[float]) -> Iterator[list[float]]:
    for start in range(0, len(values), 2):
        yield values[start : start + 2]
