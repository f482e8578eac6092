"""A step of one's own: mean intensity in a ring around the beam, and pixels above the detector's range.

A step is a function of one chunk and its parameters that returns one array per column, one value per
frame. ``examples/own_step.yaml`` puts it into a recipe:

    PYTHONPATH=examples nearline process lyso-2026/17 --recipe examples/own_step.yaml
"""

import numpy as np

from tasks.chunk_frames import ChunkFrames


def ring_statistics(chunk: ChunkFrames, inner: float = 100.0, outer: float = 150.0) -> dict[str, np.ndarray]:
    """Intensity in a ring, and how many pixels are saturated, for each frame.

    Parameters
    ----------
    inner, outer : radius of the ring around the beam, px of the frames as this step sees them;
        ``inner <= radius < outer``.

    Returns
    -------
    ring_mean : (n,) counts per usable pixel of the ring; NaN where it has none.
    n_saturated_pixels : (n,) usable pixels above the detector's saturation_value.
    """
    radius = chunk.geometry.radius_px()
    valid = chunk.mask == 0
    ring = valid & (radius >= inner) & (radius < outer)
    # Masked pixels hold the dtype's maximum: without the mask they would all count as saturated.
    limit = np.inf if chunk.saturation_value is None else chunk.saturation_value

    def measure(position: int) -> tuple[float, int]:
        frame = chunk.data(position)
        mean = float(frame[ring].mean()) if ring.any() else float("nan")
        return mean, int(np.count_nonzero(frame[valid] > limit))

    values = chunk.map(measure)
    return {
        "ring_mean": np.array([mean for mean, _ in values], float),
        "n_saturated_pixels": np.array([count for _, count in values], np.int64),
    }
