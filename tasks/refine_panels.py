"""How far each panel of a detector stands from where it was taken to be, from the crystals of many frames.

One linear least squares over all crystals: the places of spots on the assumed panels depend on the nine numbers of
each crystal's lattice, and on two of each panel, which all crystals share. Each crystal's nine are projected out, so
that what a wrong panel did to its orientation and cell does no harm. How far a spot is from the Ewald sphere is a third
equation beside its two coordinates: it tells a crystal that is turned from a detector that is displaced.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from storage.errors import BadRecipe
from storage.geometry import Geometry
from storage.panels import Panel
from tasks.index_frame import Crystal

__all__ = ["CrystalSpots", "PanelShift", "displaced", "refine_panels"]

_TOLERANCE = 0.25
# Of one crystal: below, its nine numbers leave nothing for the panels. Of one panel: below, two numbers are luck.
_FEWEST_OF_CRYSTAL, _FEWEST_OF_PANEL = 12, 40
_FEWEST_CRYSTALS = 10
# Spots farther from the fit than so many standard deviations are other lattices' or badly placed.
_OUTLIER, _ROUNDS = 3.5, 6
_MAD = 1.4826


@dataclass(frozen=True)
class CrystalSpots:
    """One indexed crystal, and the spots of its frame.

    x, y : (n,) px from the frame's corner.
    """

    crystal: Crystal
    x: np.ndarray
    y: np.ndarray


@dataclass(frozen=True)
class PanelShift:
    """Where a panel stands against where it was taken to be, along its own axes.

    number : in the geometry. fast, slow : px; None with too few spots. sigma_fast, sigma_slow : their standard
        deviations, px.
    """

    number: int
    name: str
    n_spots: int
    fast: float | None = None
    slow: float | None = None
    sigma_fast: float | None = None
    sigma_slow: float | None = None

    @property
    def is_clear(self) -> bool:
        """Whether it is more than three standard deviations and 0.05 px away."""
        pairs = ((self.fast, self.sigma_fast), (self.slow, self.sigma_slow))
        return any(v is not None and s is not None and abs(v) > max(3 * s, 0.05) for v, s in pairs)


@dataclass
class _Equations:
    """Of one crystal, its spots one by one.

    panel : (n,). place : (n, 2) px, observed less predicted. error : (n,) 1/Å, excitation error of the prediction.
    by_place : (n, 2, 9) px per 1/Å, and by_error : (n, 9): what the elements of A do to both, row by row.
    """

    panel: np.ndarray
    place: np.ndarray
    error: np.ndarray
    by_place: np.ndarray
    by_error: np.ndarray


def refine_panels(found: Iterable[CrystalSpots], geometry: Geometry) -> tuple[PanelShift, ...]:
    """Shift of each panel along its axes, with its standard deviation; those with few spots have none.

    Parameters
    ----------
    found : as they were indexed on this geometry.

    Raises
    ------
    BadRecipe : fewer than ten crystals with spots enough.
    """
    equations = [one for one in (_equations(spots, geometry) for spots in found) if one is not None]
    if len(equations) < _FEWEST_CRYSTALS:
        raise BadRecipe(f"{len(equations)} crystals are too few to place panels by; take frames for {_FEWEST_CRYSTALS}")
    n_spots = np.zeros(len(geometry.panels), int)
    for one in equations:
        n_spots += np.bincount(one.panel, minlength=len(n_spots))
    fitted = np.flatnonzero(n_spots >= _FEWEST_OF_PANEL)
    column = np.full(len(n_spots), -1)
    column[fitted] = np.arange(len(fitted))
    equations = [kept for one in equations if len((kept := _only(one, column[one.panel] >= 0)).panel)]
    shifts, sigma, used = _solve(equations, column, len(fitted))
    return tuple(
        PanelShift(i, panel.name, int(n_spots[i]))
        if column[i] < 0
        else PanelShift(i, panel.name, int(used[column[i]]), *shifts[column[i]].tolist(), *sigma[column[i]].tolist())
        for i, panel in enumerate(geometry.panels)
    )


def displaced(panels: Sequence[Panel], shifts: Iterable[PanelShift], others: Sequence[float]) -> tuple[Panel, ...]:
    """The panels where they were found to be.

    others : (x, y, z) m, how far those are displaced of which nothing was found; z is that of all.
    """
    moved = []
    for panel, shift in zip(panels, shifts, strict=True):
        if shift.fast is None or shift.slow is None:
            moved.append(panel.moved(others))
        else:
            by = shift.fast * np.array(panel.fast) + shift.slow * np.array(panel.slow) + [0.0, 0.0, others[2]]
            moved.append(panel.moved(by.tolist()))
    return tuple(moved)


def _equations(spots: CrystalSpots, geometry: Geometry) -> _Equations | None:
    panel = geometry.panel_at(spots.x, spots.y)
    on = panel >= 0
    x, y, panel = spots.x[on], spots.y[on], panel[on]
    hkl, off = spots.crystal.hkl(geometry.q_at(x, y, panel), geometry.wavelength)
    fits = off <= _TOLERANCE
    if fits.sum() < _FEWEST_OF_CRYSTAL:
        return None
    x, y, panel, hkl = x[fits], y[fits], panel[fits], hkl[fits].astype(float)
    q = hkl @ spots.crystal.A.T
    ray = q + np.array([0.0, 0.0, 1 / geometry.wavelength])
    length = np.linalg.norm(ray, axis=1)
    predicted = np.column_stack(geometry.project_at(q, panel))
    # Parallax changes too slowly to matter in a derivative.
    gradient = geometry.px_per_ray(q, panel)
    return _Equations(
        panel=panel,
        place=np.column_stack([x, y]) - predicted,
        error=1 / geometry.wavelength - length,
        by_place=(gradient[:, :, :, None] * hkl[:, None, None, :]).reshape(len(hkl), 2, 9),
        by_error=(-(ray / length[:, None])[:, :, None] * hkl[:, None, :]).reshape(len(hkl), 9),
    )


def _only(one: _Equations, keep: np.ndarray) -> _Equations:
    return replace(
        one,
        panel=one.panel[keep],
        place=one.place[keep],
        error=one.error[keep],
        by_place=one.by_place[keep],
        by_error=one.by_error[keep],
    )


def _solve(
    equations: Sequence[_Equations], column: np.ndarray, n_panels: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shifts (panel, 2) px, their standard deviations, and the spots used of each panel (panel,).

    Standard deviations of a coordinate and of an excitation error are those of what is left over.
    """
    shifts: np.ndarray = np.zeros((n_panels, 2))
    keep = [np.ones(len(one.panel), bool) for one in equations]
    spread = np.array([1.0, _MAD * float(np.median(np.abs(np.concatenate([one.error for one in equations])))) or 1e-4])
    covariance: np.ndarray = np.eye(2 * n_panels)
    for _ in range(_ROUNDS):
        normal, right = np.zeros((2 * n_panels, 2 * n_panels)), np.zeros(2 * n_panels)
        for one, kept in zip(equations, keep, strict=True):
            _add(normal, right, one, kept, column, spread)
        # A panel whose spots some crystals' own numbers explain away altogether has no equation left.
        covariance = np.linalg.pinv(normal, rcond=1e-10, hermitian=True)
        shifts = (covariance @ right).reshape(n_panels, 2)
        left = [
            _left_over(one, kept, shifts[column[one.panel]], spread) for one, kept in zip(equations, keep, strict=True)
        ]
        flat = np.concatenate([values[kept] for values, kept in zip(left, keep, strict=True)])
        scale = _MAD * np.median(np.abs(flat), axis=0)
        place, error = float(np.hypot(*scale[:2]) / np.sqrt(2)), float(scale[2])
        keep = [
            (np.abs(values[:, :2]).max(axis=1) <= _OUTLIER * place) & (np.abs(values[:, 2]) <= _OUTLIER * error)
            for values in left
        ]
        keep = [k if k.sum() >= _FEWEST_OF_CRYSTAL else np.zeros(len(k), bool) for k in keep]
        spread = spread * np.array([place, error])
    used = sum(np.bincount(column[one.panel[k]], minlength=n_panels) for one, k in zip(equations, keep, strict=True))
    return shifts, np.sqrt(np.diag(covariance)).reshape(n_panels, 2), np.asarray(used)


def _basis(one: _Equations, kept: np.ndarray, spread: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Right-hand sides (n, 3) in standard deviations, and an orthonormal basis (3 n, 9) of what A may do to them."""
    values = np.column_stack([one.place[kept] / spread[0], one.error[kept] / -spread[1]])
    by = np.concatenate([one.by_place[kept] / spread[0], one.by_error[kept][:, None] / spread[1]], axis=1)
    q, r = np.linalg.qr(by.reshape(-1, 9))
    return values, q[:, np.abs(np.diag(r)) > 1e-9 * np.abs(np.diag(r)).max()]


def _add(
    normal: np.ndarray,
    right: np.ndarray,
    one: _Equations,
    kept: np.ndarray,
    column: np.ndarray,
    spread: np.ndarray,
) -> None:
    """Add a crystal's share to the normal equations of the panels, its own numbers projected out."""
    if not kept.any():
        return
    values, basis = _basis(one, kept, spread)
    at = column[one.panel[kept]]
    # A panel farther along an axis sees the same spot at a smaller coordinate.
    weight = -1.0 / spread[0]
    within = np.zeros((basis.shape[1], len(right)))
    rows = basis.reshape(-1, 3, basis.shape[1])
    residual = values - (basis @ (basis.T @ values.ravel())).reshape(-1, 3)
    for axis in (0, 1):
        np.add.at(within.T, 2 * at + axis, weight * rows[:, axis])
        np.add.at(right, 2 * at + axis, weight * residual[:, axis])
        np.add.at(normal, (2 * at + axis, 2 * at + axis), weight * weight)
    normal -= within.T @ within


def _left_over(one: _Equations, kept: np.ndarray, shift: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """(n, 3): what the fit leaves of each spot, of those not kept too, in standard deviations."""
    place = one.place + shift
    values = np.column_stack([place / spread[0], one.error / -spread[1]])
    if not kept.any():
        return np.full_like(values, np.inf)
    by = np.concatenate([one.by_place / spread[0], one.by_error[:, None] / spread[1]], axis=1)
    best = np.linalg.lstsq(by[kept].reshape(-1, 9), values[kept].ravel(), rcond=None)[0]
    return np.asarray(values - (by.reshape(-1, 9) @ best).reshape(-1, 3))
