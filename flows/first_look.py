"""What the mask and the first frames say at once: frames that no analysis can do anything with."""

from collections.abc import Sequence

import numpy as np

__all__ = ["words_of_frames", "words_of_mask"]

# A share of the pixels from which on something is wrong.
_MOST = 0.5


def words_of_mask(mask: np.ndarray) -> str:
    """What is odd about a mask, (slow, fast), nonzero = do not use; empty if nothing is."""
    left = float(np.count_nonzero(mask == 0)) / max(mask.size, 1)
    if left > 1 - _MOST:
        return ""
    return f"The mask leaves {100 * left:.1f} % of the pixels: nonzero means do not use; is it the other way round?"


def words_of_frames(images: Sequence[np.ndarray], mask: np.ndarray, saturation: float | None) -> str:
    """What is odd about the first frames of a run, (slow, fast) each; empty unless it is so on all of them.

    saturation : largest trustworthy count; None where it is not known, then the largest of the dtype is none.
    """
    said = [_words(image[mask == 0], saturation) for image in images]
    return said[0] if said and all(said) else ""


def _words(values: np.ndarray, saturation: float | None) -> str:
    if not values.size:
        return ""
    if values.dtype.kind == "f" and (lost := float(np.mean(np.isnan(values)))) > _MOST:
        return f"{100 * lost:.0f} % of the pixels of the first frames are not numbers: look at what writes them."
    limit = _largest(values.dtype) if saturation is None else saturation
    if (full := float(np.mean(values >= limit))) > _MOST:
        return (
            f"{100 * full:.0f} % of the pixels of the first frames are saturated, {limit:.15g} or more: attenuate the "
            "beam, or give saturation_value in the recipe's detector."
        )
    if values.min() == values.max():
        return f"The first frames hold {values[0]:.15g} on every pixel: look at beam, shutter and detector."
    return ""


def _largest(dtype: np.dtype) -> float:
    """What detectors mark pixels with that they have no count of."""
    return float(np.iinfo(dtype).max) if dtype.kind in "ui" else float("inf")
