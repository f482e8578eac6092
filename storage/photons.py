"""Photons by energy or by wavelength."""

__all__ = ["HC_EV_ANGSTROM", "energy_from_wavelength", "wavelength_from_energy"]

# h c / e in eV Å, CODATA 2018 (exact by definition of the SI).
HC_EV_ANGSTROM = 12398.419843320026


def wavelength_from_energy(energy_ev: float) -> float:
    """Wavelength in Å of photons of an energy in eV."""
    return HC_EV_ANGSTROM / energy_ev


def energy_from_wavelength(wavelength_angstrom: float) -> float:
    """Energy in eV of photons of a wavelength in Å."""
    return HC_EV_ANGSTROM / wavelength_angstrom
