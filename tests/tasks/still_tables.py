"""Tables of reflections as `integrate` makes them, of simulated stills, without drawing a pixel."""

from dataclasses import dataclass

import numpy as np

from streaming.simulator.crystal import SimulatedCrystal
from streaming.simulator.stills import StillPhysics, StillSimulator


@dataclass(frozen=True)
class StillTables:
    """Crystals in random orientations, with the partiality of each spot as the simulator has it.

    scale_spread : of ln G. b_spread : Å². background : photons under a spot, which are subtracted.
    excitation_error : 1/Å, of the column excitation; None for no such column.
    """

    crystal: SimulatedCrystal
    n_crystals: int
    d_min: float
    scale_spread: float = 0.0
    b_spread: float = 0.0
    background: float = 20.0
    strength: float = 900.0
    seed: int = 0
    polarisation: float | None = None
    excitation_error: float | None = None

    @property
    def simulator(self) -> StillSimulator:
        physics = StillPhysics(
            hit_fraction=1.0, scale_sigma=0.0, spot_strength=self.strength, polarisation=self.polarisation, gaps=False,
            bad_pixel_fraction=0.0,
        )  # fmt: skip
        return StillSimulator((1082, 1034), crystal=self.crystal, seed=self.seed, physics=physics, d_min=self.d_min)

    def log_scale_and_b(self, index: int) -> tuple[float, float]:
        """ln G and B (Å²) of a crystal."""
        first, second = np.random.default_rng([self.seed, 5, index]).standard_normal(2)
        return float(self.scale_spread * first), float(self.b_spread * second)

    def table(self) -> dict[str, np.ndarray]:
        """Columns frame_index, crystal, h, k, l, intensity, sigma, x, y, panel."""
        parts, simulator = [], self.simulator
        for index in range(self.n_crystals):
            spots = simulator.truth(index).spots
            rng = np.random.default_rng([self.seed, 7, index])
            log_scale, b = self.log_scale_and_b(index)
            hkl = np.stack([spots["h"], spots["k"], spots["l"]], axis=1).astype(np.int64)
            s2 = 0.5 * ((hkl @ self.crystal.reciprocal_basis) ** 2).sum(axis=1)
            counts = rng.poisson(spots["photons"] * np.exp(log_scale - b * s2) + self.background)
            intensity = counts - self.background
            # As the integration has it: from the counts.
            sigma = np.sqrt(np.maximum(np.abs(intensity), 1) + 1.2 * self.background)
            columns = {"frame_index": np.full(len(hkl), index), "crystal": np.zeros(len(hkl), int)}
            columns |= {name: hkl[:, axis] for axis, name in enumerate("hkl")}
            columns |= {"intensity": intensity.astype("f4"), "sigma": sigma.astype("f4")}
            columns |= {"x": spots["x"], "y": spots["y"], "panel": np.zeros(len(hkl), int)}
            if self.excitation_error is not None:
                # The simulator's own width, backwards from the partiality; the side of the sphere does not matter.
                width = np.hypot(StillPhysics().relp_radius, StillPhysics().mosaicity * np.sqrt(2 * s2))
                exact = width * np.sqrt(-2 * np.log(spots["partiality"]))
                columns |= {"excitation": exact + self.excitation_error * rng.standard_normal(len(hkl))}
            parts.append(columns)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def shuffled(table: dict[str, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """The same rows in another order."""
    order = np.random.default_rng(seed).permutation(len(table["h"]))
    return {name: column[order] for name, column in table.items()}
