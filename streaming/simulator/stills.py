"""Still diffraction frames of randomly oriented crystals, with the truth beside each.

Physics kept: Ewald-sphere partiality, Wilson fall-off, Poisson statistics, air scatter and the
water ring, solid angle, module gaps, dead and hot pixels; polarisation and parallax on request.
Left out: mosaic blocks of finite shape, thermal diffuse scatter, overlapping crystals, the
detector's dead time.

Every frame depends on (seed, frame index) alone, so frames may be made in any order and in
any number of threads. The pixel loops run in Numba without the GIL.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numba
import numpy as np
from scipy.special import erf, gammaln

from storage.errors import BadFrame, ShapeMismatch
from storage.geometry import Geometry
from storage.models import DetectorHeader
from storage.photons import wavelength_from_energy
from streaming.simulator.crystal import Reflections, SimulatedCrystal

__all__ = [
    "MASK_DEAD",
    "MASK_GAP",
    "MASK_NOISY",
    "SPOT_DTYPE",
    "FrameTruth",
    "StillPhysics",
    "StillSimulator",
    "default_detector",
    "module_mask",
    "polarisation_factor",
]

# Bits of the NXmx pixel_mask.
MASK_GAP, MASK_DEAD, MASK_NOISY = 1 << 0, 1 << 1, 1 << 4

# One row per reflection whose spot falls on the detector.
SPOT_DTYPE = np.dtype(
    [
        ("h", np.int16),
        ("k", np.int16),
        ("l", np.int16),
        ("x", np.float32),  # px, fast axis, 0 at the outer corner of the first pixel; where the spot appears
        ("y", np.float32),  # px, slow axis
        ("photons", np.float32),  # expected on this frame: intensity x partiality x scale x polarisation
        ("partiality", np.float32),  # 1 where the reciprocal point is on the Ewald sphere
        ("intensity", np.float32),  # true full intensity, photons at scale 1; 0 background
        ("masked", np.bool_),  # the pixel under the spot's centre is in the pixel mask
    ]
)

# A 4M frame stands here so that its edge is near 2 Å at 12 keV; other sizes scale from it.
_REFERENCE_SHAPE, _REFERENCE_DISTANCE = (2162, 2068), 0.13
_PATCH_RADIUS = 6  # px: 5 sigma of the broadest spot that is allowed
_PARTIALITY_CUT = 3.0  # sigma_e; partiality 0.011
_BACKGROUND_LEVELS = 1024
_NO_SAMPLE = np.uint16(0xFFFF)  # level of a masked pixel

_WATER_RING = 1 / 3.2  # 1/Å
_WATER_RING_WIDTH = 0.045
_AIR_WIDTH = 0.06


@dataclass(frozen=True, slots=True)
class StillPhysics:
    """What decides how a still looks; lengths of reciprocal space in 1/Å without 2π."""

    hit_fraction: float = 0.5
    spot_strength: float = 900.0  # photons of a mean full reflection at zero resolution
    background: float = 2.0  # photons per pixel on the crest of the water ring
    relp_radius: float = 2e-4  # r0, 1/Å
    mosaicity: float = 3e-4  # eta, rad
    bandwidth: float = 2e-4  # relative rms
    spot_sigma: float = 0.9  # px
    scale_sigma: float = 0.3  # of the logarithm of a crystal's volume and flux
    polarisation: float | None = None  # fraction that is horizontal, e.g. 0.99; None leaves it out
    parallax: bool = False
    gaps: bool = True
    bad_pixel_fraction: float = 1e-4  # masked as dead or noisy
    noisy_pixels: int = 0  # hot, and not in the mask

    def __post_init__(self) -> None:
        if not 0 <= self.hit_fraction <= 1:
            raise BadFrame(f"hit_fraction is {self.hit_fraction}; it must lie between 0 and 1")
        if not 0.3 <= self.spot_sigma <= 1.2:
            raise BadFrame(f"spot_sigma is {self.spot_sigma} px; the renderer draws 0.3 to 1.2 px")
        if self.background < 0 or self.spot_strength < 0:
            raise BadFrame(f"background {self.background} and spot_strength {self.spot_strength} cannot be negative")


@dataclass(frozen=True, slots=True)
class FrameTruth:
    """What was put into one frame.

    A : (3, 3), 1/Å without 2π, rows a*, b*, c* in the NeXus laboratory frame, so that
        q = hkl @ A and a position a* + 2 b* is A[0] + 2 A[1]; NaN when the frame is blank.
    quaternion : (w, x, y, z), the rotation from the crystal's PDB setting to the laboratory.
    scale : factor on all intensities of this crystal.
    spots : (spot,), SPOT_DTYPE; empty when the frame is blank.
    """

    index: int
    is_hit: bool
    A: np.ndarray
    quaternion: np.ndarray
    scale: float
    spots: np.ndarray


def default_detector(
    shape: tuple[int, int] = _REFERENCE_SHAPE,
    dtype: str = "uint16",
    *,
    energy: float = 12_000.0,
    frame_time: float = 0.0075,
    distance: float | None = None,
) -> DetectorHeader:
    """An EIGER2-like detector that sees about 2 Å at its edge (3.5 Å for a 512 x 512 one).

    shape : (slow, fast), px. energy : eV. frame_time : s. distance : m.
    """
    if distance is None:
        # by the square root: a small detector then keeps its spots apart, a large one its resolution
        distance = round(_REFERENCE_DISTANCE * (min(shape) / min(_REFERENCE_SHAPE)) ** 0.5, 4)
    counts = int(1e7 * frame_time)  # the counter follows up to about 1e7 photons/s/pixel
    return DetectorHeader(
        description=f"Nearline simulator {shape[0]} x {shape[1]}",
        serial_number="SIM-0001",
        sensor_material="Si",
        sensor_thickness=0.00045,
        pixel_size_x=75e-6,
        pixel_size_y=75e-6,
        # off the middle on purpose: an exchange of x and y must show
        beam_center_x=round(shape[1] * 0.507, 2),
        beam_center_y=round(shape[0] * 0.493, 2),
        detector_distance=distance,
        incident_energy=energy,
        incident_wavelength=wavelength_from_energy(energy),
        count_time=frame_time - 1e-7,
        frame_time=frame_time,
        saturation_value=min(int(np.iinfo(dtype).max) - 1, max(counts, 10_000)),
        threshold_energy=energy / 2,
        countrate_correction_enabled=True,
        flatfield_enabled=True,
        pixel_mask_enabled=True,
        virtual_pixel_interpolation_enabled=True,
    )


def module_mask(shape: tuple[int, int]) -> np.ndarray:
    """Gaps between EIGER2-like modules, (slow, fast), uint32, MASK_GAP where no sensor is.

    Modules of 512 x 1028 px with gaps of 38 and 12 px give the real 1M, 4M, 9M and 16M; smaller
    frames get two modules one above the other with a gap in proportion.
    """
    mask = np.zeros(shape, np.uint32)
    for axis, (module, gap, fewest) in enumerate([(512, 38, 2), (1028, 12, 1)]):
        n_modules = max(fewest, round((shape[axis] + gap) / (module + gap)))
        gap = min(gap, max(2, round(gap * shape[axis] / (2 * module + gap))))
        size = (shape[axis] - (n_modules - 1) * gap) / n_modules
        for i in range(1, n_modules):
            start = round(i * size + (i - 1) * gap)
            mask[(slice(None),) * axis + (slice(start, start + gap),)] = MASK_GAP
    return mask


def polarisation_factor(direction: np.ndarray, horizontal: float) -> np.ndarray:
    """Kahn et al. (1982): share of a reflection that a partly polarised beam leaves.

    direction : (…, 3), unit vectors of the diffracted rays in the laboratory frame.
    horizontal : fraction of the beam that is polarised along x.
    """
    return horizontal * (1 - direction[..., 0] ** 2) + (1 - horizontal) * (1 - direction[..., 1] ** 2)


@dataclass(frozen=True)
class StillSimulator:
    """Frames of one crystal form on one detector.

    detector : header of the detector; default_detector(shape) when left out.
    shape : (slow, fast), px. dtype : "uint16" or "uint32"; its maximum marks masked pixels.
    d_min : Å, how far reflections are predicted; the frame's corner when left out, at most 1.2 Å.
    """

    shape: tuple[int, int] = _REFERENCE_SHAPE
    dtype: str = "uint16"
    detector: DetectorHeader | None = None
    crystal: SimulatedCrystal = field(default_factory=SimulatedCrystal)
    physics: StillPhysics = StillPhysics()
    seed: int = 0
    d_min: float | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ("uint16", "uint32"):
            raise BadFrame(f"the simulator makes uint16 or uint32 frames, not {self.dtype!r}")
        if len(self.shape) != 2 or min(self.shape) < 32:
            raise ShapeMismatch(f"frame shape {self.shape} is too small; use at least 32 x 32 pixels")

    @cached_property
    def header(self) -> DetectorHeader:
        """Of the detector; without parallax its sensor has no depth, and says so."""
        header = self.detector or default_detector(self.shape, self.dtype)
        return header if self.physics.parallax else header.model_copy(update={"sensor_thickness": 0.0})

    @cached_property
    def geometry(self) -> Geometry:
        return Geometry.from_header(self.header, self.shape)

    @cached_property
    def pixel_mask(self) -> np.ndarray:
        """(slow, fast), uint32, bits as in NXmx; masked pixels hold the dtype's maximum in frames."""
        mask = module_mask(self.shape) if self.physics.gaps else np.zeros(self.shape, np.uint32)
        if self.header.panels:
            mask = np.full(self.shape, MASK_GAP, np.uint32)
            for panel in self.header.panels:
                mask[panel.origin[0] : panel.end[0], panel.origin[1] : panel.end[1]] = 0
        rng = np.random.default_rng([self.seed, 0x6D61736B])
        n_bad = round(self.physics.bad_pixel_fraction * mask.size)
        bad = rng.choice(mask.size, n_bad, replace=False)
        mask.reshape(-1)[bad] |= rng.choice(np.array([MASK_DEAD, MASK_NOISY], np.uint32), n_bad)
        return mask

    @cached_property
    def background(self) -> np.ndarray:
        """Expected photons of a blank frame, (slow, fast), float32; 0 where masked."""
        table = np.append(self._level_means, 0.0)
        return table[np.minimum(self._levels, len(table) - 1)].astype(np.float32)

    def frame(self, index: int) -> tuple[np.ndarray, FrameTruth]:
        """Frame ``index`` and what was put into it; the same for the same seed, always."""
        truth, rng = self._draw(index)
        array = np.empty(self.shape, self.dtype)
        seed = np.uint64(rng.integers(2**64, dtype=np.uint64))
        ceiling = np.iinfo(self.dtype).max
        _fill_background(self._levels.reshape(-1), *self._alias_tables, seed, ceiling, array.reshape(-1))
        self._add_spots(array, truth.spots, rng)
        if self.physics.noisy_pixels:
            hot = self._hot_pixels
            array.reshape(-1)[hot] += rng.poisson(self._hot_rates).astype(self.dtype)
        return array, truth

    def truth(self, index: int) -> FrameTruth:
        """What frame ``index`` holds, without drawing its pixels."""
        return self._draw(index)[0]

    # ---- one frame

    def _draw(self, index: int) -> tuple[FrameTruth, np.random.Generator]:
        rng = np.random.default_rng([self.seed, index])
        is_hit = bool(rng.random() < self.physics.hit_fraction)
        quaternion = rng.standard_normal(4)
        quaternion /= np.linalg.norm(quaternion)
        scale = float(np.exp(self.physics.scale_sigma * rng.standard_normal()))
        if not is_hit:
            nothing = np.full((3, 3), np.nan)
            return FrameTruth(index, False, nothing, np.full(4, np.nan), 0.0, np.empty(0, SPOT_DTYPE)), rng
        A = self.crystal.reciprocal_basis @ _rotation(quaternion).T
        return FrameTruth(index, True, A, quaternion, scale, self._predict(A, scale)), rng

    def _predict(self, A: np.ndarray, scale: float) -> np.ndarray:
        """The spots of one orientation that fall on the detector, (spot,), SPOT_DTYPE."""
        physics, wavelength = self.physics, self.geometry.wavelength
        rows, partiality = _near_ewald_sphere(
            self._reflections.hkl,
            A,
            wavelength,
            np.array([physics.relp_radius, physics.mosaicity, physics.bandwidth]),
            _PARTIALITY_CUT,
        )
        hkl = self._reflections.hkl[rows]
        q = hkl @ A
        direction = q + np.array([0.0, 0.0, 1 / wavelength])
        direction /= np.linalg.norm(direction, axis=1, keepdims=True)
        on, x, y, _ = self.geometry.place(q)
        photons = physics.spot_strength * self._reflections.intensity[rows] * partiality * scale
        if physics.polarisation is not None:
            photons *= polarisation_factor(direction, physics.polarisation)
        spots = np.empty(len(on), SPOT_DTYPE)
        spots["h"], spots["k"], spots["l"] = hkl[on].T
        spots["x"], spots["y"], spots["photons"], spots["partiality"] = x, y, photons[on], partiality[on]
        spots["intensity"] = physics.spot_strength * self._reflections.intensity[rows][on]
        # np.minimum: float32 may round a position just below the edge up onto it
        slow = np.minimum(spots["y"].astype(int), self.shape[0] - 1)
        fast = np.minimum(spots["x"].astype(int), self.shape[1] - 1)
        spots["masked"] = self.pixel_mask[slow, fast] != 0
        return spots

    def _add_spots(self, array: np.ndarray, spots: np.ndarray, rng: np.random.Generator) -> None:
        if not len(spots):
            return
        left, x_share = _pixel_shares(spots["x"], self.physics.spot_sigma)
        top, y_share = _pixel_shares(spots["y"], self.physics.spot_sigma)
        expected = spots["photons"].astype(float)[:, None, None] * y_share[:, :, None] * x_share[:, None, :]
        _add_patches(array, self._levels, left, top, rng.poisson(expected), np.iinfo(self.dtype).max - 1)

    # ---- made once per simulator

    @cached_property
    def _reflections(self) -> Reflections:
        d_min = self.d_min
        if d_min is None:
            d_min = max(1.2, 1 / self.geometry.q_at_corner)
        return self.crystal.reflections(d_min)

    @cached_property
    def _expected_background(self) -> np.ndarray:
        """Air scatter, water ring and a flat remainder, times solid angle; (slow, fast), photons."""
        lab_x, lab_y, lab_z = self._pixel_centres
        length = np.sqrt(lab_x**2 + lab_y**2 + lab_z**2)
        cosine = lab_z / length
        q = np.sqrt(2 * (1 - cosine)) / self.geometry.wavelength
        ring = np.exp(-0.5 * ((q - _WATER_RING) / _WATER_RING_WIDTH) ** 2)
        air = 2.0 / (1 + (q / _AIR_WIDTH) ** 2)
        photons = self.physics.background * (0.25 + 0.75 * ring + air) * cosine**3
        if self.physics.polarisation is not None:
            direction = np.stack([lab_x / length, lab_y / length], axis=-1)
            photons *= polarisation_factor(direction, self.physics.polarisation)
        return photons

    @property
    def _pixel_centres(self) -> tuple[Any, Any, Any]:
        """x, y, z of each pixel's centre, m; shapes that go together. Off every panel as if on the last."""
        y, x = np.ogrid[0 : self.shape[0], 0 : self.shape[1]]
        if not self.header.panels:
            p = self.geometry.panels[0]
            return p.corner[0] + (x + 0.5) * p.fast[0], p.corner[1] + (y + 0.5) * p.slow[1], p.corner[2]
        x, y = np.broadcast_arrays(x + 0.5, y + 0.5)
        panel = self.geometry.panel_at(x, y) % len(self.geometry.panels)
        lab_x, lab_y, lab_z = np.moveaxis(self.geometry.lab_at(x, y, panel), -1, 0)
        return lab_x, lab_y, lab_z

    @cached_property
    def _level_means(self) -> np.ndarray:
        """(level,), photons: the background is drawn in 0.4 % steps, each with its own table."""
        expected = self._expected_background
        low, high = float(expected.min()), float(expected.max())
        if high <= 0:
            return np.zeros(1)
        return np.geomspace(max(low, 1e-6 * high), high, _BACKGROUND_LEVELS)

    @cached_property
    def _levels(self) -> np.ndarray:
        """(slow, fast), uint16: which table each pixel draws from; _NO_SAMPLE where masked."""
        means = self._level_means
        levels = np.zeros(self.shape, np.uint16)
        if len(means) > 1 and means[-1] > means[0]:
            step = np.log(means[-1] / means[0]) / (len(means) - 1)
            position = np.log(np.maximum(self._expected_background, means[0]) / means[0]) / step
            levels[:] = np.rint(position)
        levels[self.pixel_mask != 0] = _NO_SAMPLE
        return levels

    @cached_property
    def _alias_tables(self) -> tuple[np.ndarray, np.ndarray]:
        return _poisson_alias_tables(self._level_means)

    @cached_property
    def _hot_pixels(self) -> np.ndarray:
        rng = np.random.default_rng([self.seed, 0x686F74])
        return rng.choice(np.flatnonzero(self.pixel_mask == 0), self.physics.noisy_pixels, replace=False)

    @cached_property
    def _hot_rates(self) -> np.ndarray:
        return np.random.default_rng([self.seed, 0x72617465]).uniform(20, 500, self.physics.noisy_pixels)


def _rotation(quaternion: np.ndarray) -> np.ndarray:
    """Rotation matrix of a unit quaternion (w, x, y, z); turns column vectors."""
    w, x, y, z = quaternion
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
            [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
            [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
        ]
    )


def _pixel_shares(position: np.ndarray, sigma: float) -> tuple[np.ndarray, np.ndarray]:
    """First pixel of each spot's window and the share of its photons in each pixel of the window."""
    first = np.floor(position).astype(np.int64) - _PATCH_RADIUS
    edges = first[:, None] + np.arange(2 * _PATCH_RADIUS + 2) - position.astype(float)[:, None]
    return first, np.diff(0.5 * erf(edges / (sigma * np.sqrt(2))), axis=1)


def _poisson_alias_tables(means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Walker's alias tables, (level, outcome): keep-threshold as uint32, and the alias.

    A draw is then one multiplication and one comparison whatever the mean; probabilities are
    exact to 2^-32 per outcome.
    """
    largest = float(means.max())
    n_outcomes = int(largest + 9 * np.sqrt(largest) + 16)
    k = np.arange(n_outcomes)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_p = np.where(means[:, None] > 0, k * np.log(means)[:, None] - means[:, None] - gammaln(k + 1), -np.inf)
    p = np.exp(log_p)
    p[means <= 0, 0] = 1.0
    p /= p.sum(axis=1, keepdims=True)
    return _alias_tables(p)


@numba.njit(cache=True, nogil=True)
def _alias_tables(p):  # pragma: no cover - compiled
    n_levels, n = p.shape
    threshold = np.empty((n_levels, n), np.uint32)
    alias = np.empty((n_levels, n), np.uint16)
    for level in range(n_levels):
        scaled = p[level] * n
        small = [i for i in range(n) if scaled[i] < 1.0]
        large = [i for i in range(n) if scaled[i] >= 1.0]
        for i in range(n):
            threshold[level, i], alias[level, i] = np.uint32(0xFFFFFFFF), i
        while len(small) and len(large):
            i, j = small.pop(), large[-1]
            threshold[level, i] = np.uint32(min(scaled[i] * 4294967296.0, 4294967295.0))
            alias[level, i] = j
            scaled[j] -= 1.0 - scaled[i]
            if scaled[j] < 1.0:
                small.append(large.pop())
    return threshold, alias


@numba.njit(cache=True, nogil=True)
def _fill_background(levels, threshold, alias, seed, masked_value, out):  # pragma: no cover - compiled
    """A Poisson deviate in every pixel; 64 hashed bits of (seed, pair) serve two pixels."""
    n_outcomes = np.uint64(threshold.shape[1])
    low = np.uint64(0xFFFFFFFF)
    for first in range(0, len(levels), 2):
        z = seed + np.uint64(first + 1) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
        for i in range(first, min(first + 2, len(levels))):
            level = levels[i]
            if level == 0xFFFF:
                out[i] = masked_value
            else:
                scaled = (z & low) * n_outcomes
                outcome = scaled >> np.uint64(32)
                keep = (scaled & low) <= threshold[level, outcome]
                out[i] = outcome if keep else np.uint64(alias[level, outcome])
            z = z >> np.uint64(32)


@numba.njit(cache=True, nogil=True)
def _add_patches(out, levels, left, top, patches, ceiling):  # pragma: no cover - compiled
    n_slow, n_fast = out.shape
    for spot in range(len(patches)):
        for j in range(patches.shape[1]):
            y = top[spot] + j
            if y < 0 or y >= n_slow:
                continue
            for i in range(patches.shape[2]):
                x = left[spot] + i
                if 0 <= x < n_fast and levels[y, x] != 0xFFFF:
                    out[y, x] = min(np.int64(out[y, x]) + patches[spot, j, i], ceiling)


@numba.njit(cache=True, nogil=True)
def _near_ewald_sphere(hkl, A, wavelength, widths, cut):  # pragma: no cover - compiled
    """Rows of hkl within ``cut`` sigma of the Ewald sphere, and their Gaussian partiality."""
    rows = np.empty(len(hkl), np.int64)
    partiality = np.empty(len(hkl), np.float64)
    n = 0
    radius = 1.0 / wavelength
    for i in range(len(hkl)):
        h, k, l = hkl[i, 0], hkl[i, 1], hkl[i, 2]  # noqa: E741
        qx = h * A[0, 0] + k * A[1, 0] + l * A[2, 0]
        qy = h * A[0, 1] + k * A[1, 1] + l * A[2, 1]
        qz = h * A[0, 2] + k * A[1, 2] + l * A[2, 2]
        q2 = qx * qx + qy * qy + qz * qz
        excitation = radius - np.sqrt(qx * qx + qy * qy + (qz + radius) ** 2)
        spread = widths[2] * q2 * wavelength * 0.5
        variance = widths[0] ** 2 + widths[1] ** 2 * q2 + spread * spread
        if excitation * excitation < cut * cut * variance:
            rows[n] = i
            partiality[n] = np.exp(-0.5 * excitation * excitation / variance)
            n += 1
    return rows[:n].copy(), partiality[:n].copy()
