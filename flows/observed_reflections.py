"""Reflections out of a processing's tables, ready to be merged."""

import numpy as np
import pyarrow as pa

from storage.geometry import Geometry
from tasks.correct_polarisation import polarisation_of_spots
from tasks.merge_crystals import REFLECTION_COLUMNS

__all__ = ["POLARISATION", "observed_reflections"]

# Horizontal fraction of a synchrotron's or FEL's beam, unless somebody knows better.
POLARISATION = 0.99
_POSITIONS = ("x", "y", "panel")


def observed_reflections(
    table: pa.Table, geometry: Geometry | None, polarisation: float | None = POLARISATION
) -> tuple[dict[str, np.ndarray], str | None]:
    """Columns of a table of reflections as `tasks.observations.gather_observations` takes them, corrected.

    Parameters
    ----------
    geometry : of the detector they were measured with; None if it is unknown.
    polarisation : horizontal fraction of the beam, 0 to 1; None for no correction.

    Returns
    -------
    columns : each (n,); intensity and sigma in counts.
    why_not : why polarisation was not corrected although it was asked for, or None.
    """
    known = [name for name in ("excitation",) if name in table.column_names]
    columns = {name: table[name].to_numpy() for name in (*REFLECTION_COLUMNS, *known)}
    if polarisation is None:
        return columns, None
    if missing := [name for name in _POSITIONS if name not in table.column_names]:
        return columns, f"its reflections have no {', '.join(missing)}"
    if geometry is None:
        return columns, "where its detector stood is unknown"
    x, y, panel = (table[name].to_numpy() for name in _POSITIONS)
    left = polarisation_of_spots(geometry, x, y, panel, polarisation)
    return columns | {name: columns[name] / left for name in ("intensity", "sigma")}, None
