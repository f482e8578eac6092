"""Flat rectangles of pixels, where they stand in the laboratory, and what a geometry file says of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from storage.errors import BadFrame

__all__ = ["DetectorGeometry", "Panel", "overlapping", "rectangles_of"]


@dataclass(frozen=True, slots=True)
class Panel:
    """A flat rectangle of pixels.

    corner : (x, y, z) of the outer corner of pixel (0, 0), m.
    fast, slow : vectors of one pixel step along each array axis, m.
    shape : (slow, fast) pixels.
    origin : (slow, fast) of the panel's first pixel in the frame's array.
    """

    name: str
    corner: tuple[float, float, float]
    fast: tuple[float, float, float]
    slow: tuple[float, float, float]
    shape: tuple[int, int]
    origin: tuple[int, int] = (0, 0)

    @property
    def end(self) -> tuple[int, int]:
        """(slow, fast) behind the panel's last pixel in the frame's array."""
        return self.origin[0] + self.shape[0], self.origin[1] + self.shape[1]

    def moved(self, by: Sequence[float]) -> "Panel":
        """The panel displaced by (x, y, z), m."""
        x, y, z = (float(a + b) for a, b in zip(self.corner, by, strict=True))
        return Panel(self.name, (x, y, z), self.fast, self.slow, self.shape, self.origin)


class DetectorGeometry(BaseModel):
    """What a geometry file says: panels, and whatever else of the beam and the sensor stands in it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    file: str = Field("", description="name of the file, for people")
    digest: str = Field("", description="blake3 of the file's bytes, hex; empty when there is none")
    panels: tuple[Panel, ...] = Field(min_length=1)
    wavelength: float | None = Field(None, gt=0, description="Å; None where the file leaves it open")
    distance: float | None = Field(
        None,
        description="m, 0 or more, as the file states it; None where the panels' z has yet to be added to a distance",
    )
    sensor_thickness: float | None = Field(None, ge=0, description="m")
    sensor_material: str | None = None
    bad: tuple[tuple[int, int, int, int], ...] = Field(
        (), description="rectangles that must not be used: first and last slow (excluded), first and last fast"
    )
    groups: dict[str, tuple[str, ...]] = Field(default_factory=dict, description="rigid groups: names of panels")
    notes: tuple[str, ...] = Field((), description="what a reader should know, in words")

    @field_validator("distance")
    @classmethod
    def _ahead(cls, distance: float | None) -> float | None:
        if distance is not None and distance < 0:
            raise ValueError(
                f"the beam meets the plane of the detector {-distance:g} m behind the sample; check its rotations and "
                "distance"
            )
        return distance

    @field_validator("panels")
    @classmethod
    def _apart(cls, panels: tuple[Panel, ...]) -> tuple[Panel, ...]:
        if (pair := overlapping(panels)) is not None:
            a, b = pair
            raise ValueError(
                f"panels {a.name!r} at {a.origin} and {b.name!r} at {b.origin} (slow, fast) share pixels of the "
                "frame's array; give each its own place in one 2-D array"
            )
        return panels

    @property
    def shape(self) -> tuple[int, int]:
        """(slow, fast) of the smallest frame that holds all panels."""
        return max(p.end[0] for p in self.panels), max(p.end[1] for p in self.panels)

    def mask(self, shape: tuple[int, int]) -> np.ndarray:
        """(slow, fast) uint8, nonzero off every panel and in the file's bad regions.

        Raises
        ------
        BadFrame : a panel ends outside the shape.
        """
        check_panels(self.panels, shape)
        mask = np.ones(shape, np.uint8)
        for panel in self.panels:
            mask[panel.origin[0] : panel.end[0], panel.origin[1] : panel.end[1]] = 0
        for y0, y1, x0, x1 in self.bad:
            mask[y0:y1, x0:x1] = 1
        return mask


def check_panels(panels: Sequence[Panel], shape: tuple[int, int]) -> None:
    """BadFrame if a panel ends outside a frame of this shape."""
    for panel in panels:
        if min(panel.origin) < 0 or panel.end[0] > shape[0] or panel.end[1] > shape[1]:
            raise BadFrame(
                f"panel {panel.name!r} spans {panel.origin} to {panel.end} (slow, fast), but frames are "
                f"{tuple(shape)}; use the geometry file of this detector and read-out mode"
            )


def overlapping(panels: Sequence[Panel]) -> tuple[Panel, Panel] | None:
    """Two panels that share pixels of the frame's array; None if there are none."""
    order = sorted(panels, key=lambda p: p.origin)
    for i, a in enumerate(order):
        for b in order[i + 1 :]:
            if b.origin[0] >= a.end[0]:
                break  # sorted by their first row
            if b.origin[1] < a.end[1] and a.origin[1] < b.end[1]:
                return a, b
    return None


def rectangles_of(marked: np.ndarray) -> tuple[tuple[int, int, int, int], ...]:
    """Rectangles (y0, y1, x0, x1) that make up the marked pixels; equal rows above each other are one."""
    open_: dict[tuple[int, int], int] = {}
    found: list[tuple[int, int, int, int]] = []
    for y in range(marked.shape[0] + 1):
        row = _runs(marked[y]) if y < marked.shape[0] else set()
        for run in [run for run in open_ if run not in row]:
            found.append((open_.pop(run), y, *run))
        for run in row:
            open_.setdefault(run, y)
    return tuple(sorted(found))


def _runs(row: np.ndarray) -> set[tuple[int, int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], (row != 0).astype(np.int8), [0]])))
    return {(int(a), int(b)) for a, b in edges.reshape(-1, 2)}
