"""How much of the copper is reduced: a linear combination of two reference spectra, fitted to each shot.

A step of one's own. The recipe names it `steps:linear_combination`; Nearline calls it with some shots at once (with
one, where decisions are made) and keeps a column for each array it returns.
"""

import numpy as np

from tasks.chunk_frames import ChunkFrames


def linear_combination(chunk: ChunkFrames, low_ev: float = 8960.0, high_ev: float = 9080.0) -> dict[str, np.ndarray]:
    """Weighted least squares of oxidised + reduced + constant against each absorption spectrum.

    Energies and references are those in the header of the stream: they travel with the data.

    Parameters
    ----------
    low_ev, high_ev : eV, both inclusive; the part of the spectrum that is fitted.

    Returns
    -------
    fraction_reduced, fraction_sigma : (n,) reduced part of the copper, and its standard deviation.
    edge_step : (n,) of oxidised and reduced together; 1 for a sample as thick as the references.
    chi2_red : (n,) χ² per degree of freedom; near 1 while the two references are all there is.
    """
    known = chunk.header.user_data
    energy = np.array(known["energy_ev"])
    used = (energy >= low_ev) & (energy <= high_ev)
    references = [np.array(known["references"][name])[used] for name in ("oxidised", "reduced")]
    model = np.column_stack([*references, np.ones(used.sum())])

    def fit(position: int) -> tuple[float, float, float, float]:
        spectrum = chunk.data(position)[used].astype(float)
        return fit_one(model, spectrum, photon_sigma(spectrum, chunk.meta[position]["i0"]))

    fitted = np.array(chunk.map(fit)).reshape(-1, 4)
    names = ("fraction_reduced", "fraction_sigma", "edge_step", "chi2_red")
    return dict(zip(names, fitted.T, strict=True))


def photon_sigma(spectrum: np.ndarray, i0: float) -> np.ndarray:
    """Standard deviation of ln(I0/I) where I0 photons were counted before and I behind the sample.

    spectrum : (energy,), ln(I0/I). i0 : photons at each energy.
    """
    return np.sqrt((1 + np.exp(spectrum)) / i0)


def fit_one(model: np.ndarray, spectrum: np.ndarray, sigma: np.ndarray) -> tuple[float, float, float, float]:
    """Fraction reduced, its σ, edge step and reduced χ² of one spectrum.

    Parameters
    ----------
    model : (energy, 3), oxidised, reduced, constant. spectrum, sigma : (energy,).
    """
    weighted = model / sigma[:, None]
    covariance = np.linalg.inv(weighted.T @ weighted)
    amounts = covariance @ (weighted.T @ (spectrum / sigma))
    step = amounts[0] + amounts[1]
    fraction = amounts[1] / step
    # d fraction / d (oxidised, reduced): the two amounts are correlated, so both matter.
    slope = np.array([-fraction, 1 - fraction]) / step
    variance = slope @ covariance[:2, :2] @ slope
    residual = (spectrum - model @ amounts) / sigma
    return float(fraction), float(np.sqrt(variance)), float(step), float(residual @ residual / (len(spectrum) - 3))
