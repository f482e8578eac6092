"""Azimuthal integration with pyFAI: a diffraction pattern of each detector frame.

A step of one's own. The recipe names it `azimuthal:integrate`; its pattern becomes a column of arrays, the numbers made
from it columns of scalars.
"""

import functools
import threading

import numpy as np
from pyFAI.detectors import Detector
from pyFAI.integrator.azimuthal import AzimuthalIntegrator

from tasks.chunk_frames import ChunkFrames

_KEEP_INTEGRATORS = 2
_METRES_PER_ANGSTROM = 1e-10
# An integrator works in buffers of its own: two threads that use it at once mix their frames up.
_one_at_a_time = threading.Lock()


def integrate(
    chunk: ChunkFrames,
    q_min: float = 0.5,
    q_max: float = 5.0,
    n_bins: int = 500,
    split: str = "bbox",
    polarization: float | None = 0.99,
    rot1: float = 0.0,
    rot2: float = 0.0,
    rot3: float = 0.0,
) -> dict[str, np.ndarray]:
    """The intensity of each frame over q, without the pixels that must not be used.

    Distance, beam centre, pixel sizes and wavelength are those of the stream's header, or what the recipe says under
    ``detector:``; with a tilted detector, distance and beam centre mean pyFAI's distance and PONI.

    Parameters
    ----------
    q_min, q_max : 1/Å, q = 4π sin θ / λ; the edges of the pattern. n_bins : of equal width between them.
    split : how a pixel is shared among bins: no, bbox, or full (exact, and slower).
    polarization : of the beam, 1 for wholly horizontal, 0 for none; None leaves intensities uncorrected.
    rot1, rot2, rot3 : rad, tilt of the detector as in a PONI file.

    Returns
    -------
    intensity : (n, n_bins) counts per pixel, corrected for solid angle and polarisation; NaN in a bin without pixels.
    mean_intensity : (n,) over the bins.
    strongest_q : (n,) 1/Å, middle of the bin with the most.

    Raises
    ------
    ValueError : a frame has no usable pixel in the whole range.
    """
    ai = _integrator(_geometry_of(chunk, (rot1, rot2, rot3)), chunk.mask.shape, chunk.mask.tobytes())
    # One after the other: pyFAI spreads each frame over threads itself.
    patterns = [
        _pattern(ai, usable_counts(chunk, position), (q_min, q_max), n_bins, split, polarization)
        for position in range(len(chunk))
    ]
    intensity = np.array(patterns).reshape(-1, n_bins)
    if np.isnan(intensity).all(axis=1).any():
        raise ValueError(
            f"no usable pixel from {q_min} to {q_max} 1/Å; look at the mask, the geometry and q_min, q_max"
        )
    return {
        "intensity": intensity,
        "mean_intensity": np.nanmean(intensity, axis=1),
        "strongest_q": q_axis(q_min, q_max, n_bins)[np.nanargmax(intensity, axis=1)],
    }


def q_axis(q_min: float, q_max: float, n_bins: int) -> np.ndarray:
    """The middles of the bins of `integrate`, (n_bins,), 1/Å; the same for all frames, so no frame carries them."""
    return q_min + (np.arange(n_bins) + 0.5) * (q_max - q_min) / n_bins


def usable_counts(chunk: ChunkFrames, position: int) -> np.ndarray:
    """The frame at a position, (slow, fast) float32, NaN where it is saturated: pyFAI leaves out what is not finite."""
    frame = chunk.data(position)
    counts = frame.astype(np.float32)
    if chunk.saturation_value is not None:
        counts[frame > chunk.saturation_value] = np.nan
    return counts


def _pattern(
    ai: AzimuthalIntegrator,
    counts: np.ndarray,
    q_range: tuple[float, float],
    n_bins: int,
    split: str,
    polarization: float | None,
) -> np.ndarray:
    """(n_bins,), NaN in a bin that no usable pixel fell into; without that, pyFAI would say 0."""
    with _one_at_a_time:
        result = ai.integrate1d_ng(
            counts, n_bins, radial_range=q_range, unit="q_A^-1", method=(split, "csr", "cython"),
            polarization_factor=polarization, correctSolidAngle=True, dummy=np.nan,
        )  # fmt: skip
    return np.where(result.count > 0, result.intensity, np.nan)


def _geometry_of(chunk: ChunkFrames, tilt: tuple[float, float, float]) -> tuple[float, ...]:
    """What identifies a geometry: pixel sizes, distance, beam centre and wavelength, all in m, and the tilt in rad.

    Both measure the beam centre from the outer corner of the first pixel, so nothing is added here.
    """
    d, wavelength = chunk.detector, chunk.geometry.wavelength * _METRES_PER_ANGSTROM
    centre = d.beam_center_y * d.pixel_size_y, d.beam_center_x * d.pixel_size_x
    return (d.pixel_size_y, d.pixel_size_x, d.detector_distance, *centre, wavelength, *tilt)


@functools.lru_cache(_KEEP_INTEGRATORS)
def _integrator(geometry: tuple[float, ...], shape: tuple[int, int], mask: bytes) -> AzimuthalIntegrator:
    """pyFAI's integrator with its mask, kept in each process: preparing one takes as long as ten frames.

    Everything that its lookup table depends on is in the key, so what is kept cannot change a result.
    """
    pixel1, pixel2, distance, poni1, poni2, wavelength, rot1, rot2, rot3 = geometry
    detector = Detector(pixel1=pixel1, pixel2=pixel2, max_shape=shape)
    # A copy: pyFAI refuses an array that is read-only.
    detector.mask = np.frombuffer(mask, np.uint8).reshape(shape).copy()
    return AzimuthalIntegrator(distance, poni1, poni2, rot1, rot2, rot3, detector=detector, wavelength=wavelength)
