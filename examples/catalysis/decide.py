"""Which temperature next: the catalyst is to be reduced at a constant rate, and the run to stop when it is.

Sample-controlled reduction: heating at a constant rate would let the reaction run away in its middle, so the furnace
follows the reaction instead. Each decision rests on the fits of the last shots, and goes back to the instrument in
the row that holds the fit.

    PYTHONPATH=examples/catalysis python examples/catalysis/decide.py catalysis/1
"""

import argparse
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np

import nearline

HERE = Path(__file__).parent
_COOLEST_K, _HOTTEST_K = 423.0, 673.0
_START_K = 453.0


class ConstantRate:
    """Decides after each shot; remembers the last fits only.

    Parameters
    ----------
    rate : fraction reduced per shot that is wanted.
    enough : fraction reduced at which to stop, once the newest fits are above it by two standard deviations.
    window : shots over which the rate is fitted.
    gain_k : K by which the setpoint changes at most with one shot.
    """

    def __init__(self, rate: float, enough: float = 0.95, window: int = 20, gain_k: float = 0.8) -> None:
        self.rate, self.enough, self.gain_k = rate, enough, gain_k
        self._fits: deque[tuple[int, float, float]] = deque(maxlen=window)
        self._setpoint_k = _START_K

    def __call__(self, frame: nearline.Frame, columns: dict[str, Any]) -> dict[str, Any]:
        """The next setpoint, and why to stop, if so; columns of the same row as the fit."""
        return self.after(frame.frame_index, columns["fraction_reduced"], columns["fraction_sigma"])

    def after(self, shot: int, fraction: float, sigma: float) -> dict[str, Any]:
        """As if called with that shot's fit."""
        self._fits.append((shot, fraction, sigma))
        rate = self.fitted_rate()
        if rate is not None:
            change = self.gain_k * float(np.clip((self.rate - rate) / self.rate, -1, 1))
            self._setpoint_k = float(np.clip(self._setpoint_k + change, _COOLEST_K, _HOTTEST_K))
        decision = {"next_setpoint_k": self._setpoint_k, "fitted_rate": rate}
        if self.is_enough():
            decision["stop_reason"] = f"more than {self.enough:.0%} reduced"
        return decision

    def fitted_rate(self) -> float | None:
        """Slope of the window's fractions over shots, each with the weight of its σ; None for a window not full."""
        if len(self._fits) < (self._fits.maxlen or 0):
            return None
        shots, fractions, sigmas = np.array(self._fits).T
        # A fit that could not tell its σ says nothing.
        good = np.isfinite(sigmas) & (sigmas > 0)
        return float(np.polyfit(shots[good], fractions[good], 1, w=1 / sigmas[good])[0]) if good.sum() > 1 else None

    def is_enough(self) -> bool:
        newest = list(self._fits)[-5:]
        mean = np.mean([fraction for _, fraction, _ in newest])
        sigma = np.sqrt(np.sum([sigma**2 for _, _, sigma in newest])) / len(newest)
        return len(newest) == 5 and bool(mean - 2 * sigma > self.enough)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", help="experiment/number of the run to decide on")
    parser.add_argument("--reaction-rate", type=float, default=1 / 600, help="wanted, fraction reduced per shot")
    parser.add_argument("--gain", type=float, default=0.8, help="K per shot")
    arguments = parser.parse_args()
    decide = ConstantRate(arguments.reaction_rate, gain_k=arguments.gain)
    done = nearline.process_live(arguments.run, HERE / "recipe.yaml", data_source="xas", decide=decide)
    print(f"{done['frames']} decisions, {done['failed']} shots without a fit", flush=True)


if __name__ == "__main__":
    main()
