"""What a polarised beam takes from a reflection, by where its spot lies.

Stills need no Lorentz factor: nothing is rotated through the sphere, and how much of a reflection is caught is a
question of partiality, which merging averages over.
"""

import numpy as np

from storage.geometry import Geometry
from tasks.merge_crystals import BadMerge

__all__ = ["polarisation_of_spots"]


def polarisation_of_spots(
    geometry: Geometry, x: np.ndarray, y: np.ndarray, panel: np.ndarray, horizontal: float
) -> np.ndarray:
    """The share of each reflection that is left; divide intensities and sigmas by it.

    Parameters
    ----------
    x, y : (n,), px along fast and slow of the frame. panel : (n,), number in the geometry.
    horizontal : fraction of the beam that is polarised horizontally; the rest is vertical. 0.5 is no polarisation,
        and a synchrotron's undulator gives about 0.99.

    Returns
    -------
    (n,), 1 in the direct beam. With the scattering angle 2θ and the azimuth φ from the horizontal,

        P = ½ (1 + cos² 2θ) − ½ (2 f − 1) cos 2φ sin² 2θ

    Source: Kahn et al. 1982, J. Appl. Cryst. 15, 330, with f = (1 + ξ') / 2.
    """
    if not 0.0 <= horizontal <= 1.0:
        raise BadMerge(f"a horizontal fraction of {horizontal} is not between 0 and 1; a synchrotron has about 0.99")
    at = geometry.lab_at(x, y, panel)
    across = at[:, 0] ** 2 + at[:, 1] ** 2
    cosine2 = at[:, 2] ** 2 / (across + at[:, 2] ** 2)
    with np.errstate(invalid="ignore", divide="ignore"):
        cos_2phi = np.where(across > 0, (at[:, 0] ** 2 - at[:, 1] ** 2) / across, 0.0)
    return np.asarray(0.5 * (1 + cosine2) - 0.5 * (2 * horizontal - 1) * cos_2phi * (1 - cosine2))
