import numpy as np
import pytest

from storage.errors import BadFrame, BadRecipe, ShapeMismatch
from storage.geometry import Geometry
from storage.models import DetectorHeader
from streaming.simulator.crystal import SimulatedCrystal
from streaming.simulator.stills import StillPhysics, StillSimulator
from tasks.find_peaks import PeakFinder
from tasks.index_frame import Crystal, Indexer
from tasks.integrate_spots import IntegrationParams, integrate_spots
from tasks.predict_spots import (
    PREDICTION_DTYPE,
    crystal_resolution,
    predict_spots,
    profile_radius,
    resolution_limit,
)
from tasks.unit_cell import UnitCell, lattice_rotations

SHAPE = (100, 110)
HEADER = DetectorHeader(
    beam_center_x=55, beam_center_y=50, detector_distance=0.1, incident_energy=12000, sensor_thickness=0
)
GEOMETRY = Geometry.from_header(HEADER, SHAPE)
CLEAR = np.zeros(SHAPE, np.uint8)
N_DISC = 29  # whole pixels within 3 px of a pixel
LYSOZYME = UnitCell(79.1, 79.1, 37.9, 90, 90, 90, "P 43 21 2")


def predicted(*positions):
    table = np.zeros(len(positions), PREDICTION_DTYPE)
    table["h"] = np.arange(len(positions))
    table["x"], table["y"] = np.array(positions, float).T
    return table


def integrate(frame, *positions, mask=CLEAR, **params):
    return integrate_spots(frame, mask, predicted(*positions), GEOMETRY, IntegrationParams(**params))


def crystal_of(A, cell, shift=(0.0, 0.0)):
    return Crystal(A, cell, 0, 0, 0.0, 0.0, shift, 0.0)


def test_sum_and_sigma_by_hand():
    frame = np.random.default_rng(0).poisson(4.0, SHAPE).astype(np.uint16)
    frame[40:42, 60:62] += 100
    (r,) = integrate(frame, (60.9, 40.2)).reflections
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    distance = np.hypot(y - 40, x - 60)
    peak, ring = frame[distance <= 3].astype(float), frame[(distance > 4) & (distance <= 6)].astype(float)
    intensity = peak.sum() - len(peak) * ring.mean()
    variance = ring.var(ddof=1)
    assert len(peak) == N_DISC
    assert r["intensity"] == pytest.approx(intensity, rel=1e-5)
    assert r["background"] == pytest.approx(ring.mean(), rel=1e-6)
    assert r["peak"] == peak.max()
    assert r["sigma"] == pytest.approx(
        np.sqrt(intensity + N_DISC * variance + N_DISC**2 * variance / len(ring)), rel=1e-5
    )


def test_empty_spots_scatter_about_zero_as_sigma_says():
    frame = np.random.default_rng(1).poisson(0.3, (2000, 2000)).astype(np.uint16)
    geometry = Geometry.from_header(HEADER, frame.shape)
    grid = [(x, y) for x in range(20, 1980, 14) for y in range(20, 1980, 14)]
    r = integrate_spots(frame, np.zeros(frame.shape), predicted(*grid), geometry).reflections
    pull = r["intensity"] / r["sigma"]
    assert abs(r["intensity"].mean()) < 4 * r["intensity"].std() / np.sqrt(len(r))
    assert 0.8 < pull.std() < 1.1


def test_neighbours_are_kept_out_of_the_background():
    frame = np.full(SHAPE, 3, np.uint16)
    frame[50, 50] = 103
    frame[50, 56] = 1003
    alone = integrate(frame, (50.5, 50.5)).reflections[0]
    pair = integrate(frame, (50.5, 50.5), (56.5, 50.5)).reflections[0]
    assert alone["background"] > 3.1
    assert (pair["background"], pair["intensity"]) == (3, 100)
    other = integrate_spots(frame, CLEAR, predicted((50.5, 50.5)), GEOMETRY, None, predicted((56.5, 50.5)))
    assert other.reflections["intensity"].tolist() == [100]


def test_left_out_and_counted():
    frame = np.full(SHAPE, 3, np.int32)
    mask = CLEAR.copy()
    frame[20, 20] = 5000
    mask[20, 60] = 1
    frame[60:63, 57:64] = 0  # a dip that no photon statistics explains
    frame[60, 60] = -3000
    result = integrate(
        frame, (20.5, 20.5), (60.5, 20.5), (60.5, 60.5), (1.5, 50.5), (90.5, 80.5), mask=mask, saturation=4000
    )
    assert result.reflections["h"].tolist() == [4]
    assert (result.n_saturated, result.n_masked, result.n_implausible) == (1, 2, 1)


def test_masked_and_bright_pixels_leave_the_background():
    frame = np.full(SHAPE, 3, np.uint16)
    mask = CLEAR.copy()
    mask[50, 55], frame[50, 55] = 1, 900
    frame[55, 50] = 65535
    (r,) = integrate(frame, (50.5, 50.5), mask=mask).reflections
    assert (r["background"], r["intensity"]) == (3, 0)


def test_bad_input_is_refused():
    with pytest.raises(ShapeMismatch, match="mask"):
        integrate_spots(np.zeros((5, 5), np.uint8), CLEAR, predicted((1, 1)), GEOMETRY)
    with pytest.raises(BadFrame, match="complex"):
        integrate_spots(np.zeros(SHAPE, complex), CLEAR, predicted((1, 1)), GEOMETRY)
    with pytest.raises(BadRecipe, match="must rise"):
        IntegrationParams(inner=5, middle=4)


def test_rings_follow_binning():
    binned = IntegrationParams(inner=3, middle=4, outer=7).for_binning(2)
    assert (binned.inner, binned.middle, binned.outer) == (1.5, 2, 3.5)
    assert IntegrationParams(saturation=9).for_binning(4).saturation == 9


def test_no_predictions_give_an_empty_table():
    result = integrate_spots(np.zeros(SHAPE, np.uint16), CLEAR, np.empty(0, PREDICTION_DTYPE), GEOMETRY)
    assert len(result.reflections) == 0


def test_predictions_lie_on_the_sphere_and_on_the_detector():
    A = LYSOZYME.B[[2, 0, 1]]
    hkl = LYSOZYME.hkl_within(1 / 3.0)
    wide = Geometry.from_header(HEADER.model_copy(update={"pixel_size_x": 1e-3, "pixel_size_y": 1e-3}), SHAPE)
    table = predict_spots(crystal_of(A, LYSOZYME), wide, 8e-4, hkl)
    found = {tuple(row) for row in np.column_stack([table[n] for n in "hkl"]).tolist()}
    expected = set()
    for h in hkl:
        q = A @ h
        error = 1 / wide.wavelength - np.sqrt(q[0] ** 2 + q[1] ** 2 + (q[2] + 1 / wide.wavelength) ** 2)
        x, y = wide.project(q)
        if abs(error) <= 8e-4 and 0 <= x < SHAPE[1] and 0 <= y < SHAPE[0]:
            expected.add(tuple(int(v) for v in h))
    assert len(expected) > 50
    assert found == expected
    np.testing.assert_array_equal(table, np.sort(table, order=["h", "k", "l"]))


def test_predictions_follow_the_detector_shift():
    hkl = LYSOZYME.hkl_within(1 / 3.0)
    wide = Geometry.from_header(HEADER.model_copy(update={"pixel_size_x": 1e-3, "pixel_size_y": 1e-3}), SHAPE)
    still = predict_spots(crystal_of(LYSOZYME.B, LYSOZYME), wide, 1e-3, hkl)
    moved = predict_spots(crystal_of(LYSOZYME.B, LYSOZYME, (0.01, -0.02)), wide, 1e-3, hkl)
    same = {tuple(r)[:3]: r for r in still}
    pairs = [(same[tuple(r)[:3]], r) for r in moved if tuple(r)[:3] in same]
    # 0.01 of 0.1 m is one 1 mm pixel: a detector at +x sees its spots at smaller x, which is larger fast
    np.testing.assert_allclose([b["x"] - a["x"] for a, b in pairs], 1.0, atol=1e-9)
    np.testing.assert_allclose([b["y"] - a["y"] for a, b in pairs], -2.0, atol=1e-9)


def excitation_error(q: np.ndarray, wavelength: float) -> np.ndarray:
    """1/λ - |q + z/λ| of reciprocal points q (n, 3), 1/Å: positive inside the Ewald sphere."""
    return 1 / wavelength - np.linalg.norm(q + np.array([0.0, 0.0, 1 / wavelength]), axis=-1)


def test_profile_radius_is_the_spread_of_excitation_errors():
    rng = np.random.default_rng(4)
    hkl = LYSOZYME.hkl_within(1 / 2.5)
    error = excitation_error(hkl @ LYSOZYME.B.T, 1.0)
    q = hkl[np.abs(error) < np.abs(rng.normal(0, 6e-4, len(error)))] @ LYSOZYME.B.T
    onto = q + np.array([0, 0, 1.0])
    q = onto / np.linalg.norm(onto, axis=1, keepdims=True) - [0, 0, 1.0]
    assert 6e-4 < profile_radius(crystal_of(LYSOZYME.B, LYSOZYME), q, 1.0) < 2.2e-3
    assert profile_radius(crystal_of(LYSOZYME.B, LYSOZYME), q[:2], 1.0) == 1e-3


def test_resolution_drops_the_farthest_spots():
    assert resolution_limit(np.array([0.1, 0.2, 0.25, 0.4, 0.5])) == pytest.approx(4.0)
    assert resolution_limit(np.linspace(0, 1, 201)[1:]) == pytest.approx(1 / 0.98)
    assert np.isnan(resolution_limit(np.zeros((2, 3))))
    hkl = LYSOZYME.hkl_within(1 / 4.0)
    assert crystal_resolution(crystal_of(LYSOZYME.B, LYSOZYME), hkl @ LYSOZYME.B.T, 1.0) == pytest.approx(4.0, abs=0.1)


# ---- against the simulator's truth, with Bijvoet differences

PHYSICS = StillPhysics(hit_fraction=1.0, noisy_pixels=0)
SIMULATOR = StillSimulator(shape=(1062, 1028), crystal=SimulatedCrystal(bijvoet=0.7), physics=PHYSICS, seed=3)


def integrated(simulator, index, is_mirrored=False):
    """(found reflections, the truth's spots, refined crystal) of a frame, mirrored left to right if asked."""
    frame, truth = simulator.frame(index)
    mask, spots, header = simulator.pixel_mask, truth.spots.copy(), simulator.header
    if is_mirrored:
        width = frame.shape[1]
        frame, mask, spots["x"] = frame[:, ::-1], mask[:, ::-1], width - spots["x"]
        header = header.model_copy(update={"beam_center_x": width - header.beam_center_x})
    geometry = Geometry.from_header(header, frame.shape)
    peaks = PeakFinder(geometry, mask)(frame)
    q = geometry.scattering_vector(peaks["x"], peaks["y"])
    (crystal,) = Indexer(LYSOZYME, geometry.wavelength)(q, peaks["snr"])
    radius = profile_radius(crystal, q, geometry.wavelength)
    spots_predicted = predict_spots(crystal, geometry, radius, LYSOZYME.hkl_within(1 / 2.5))
    return integrate_spots(frame, mask, spots_predicted, geometry).reflections, spots, crystal, truth


def hand_score(simulator, n_frames, is_mirrored):
    """Correlation of measured with true Bijvoet sense: how much better I(hkl) fits than I(-h -k -l)."""
    measured, plus, minus = [], [], []
    for i in range(n_frames):
        table, spots, _, truth = integrated(simulator, i, is_mirrored)
        distance = np.hypot(table["x"][:, None] - spots["x"], table["y"][:, None] - spots["y"])
        nearest = distance.argmin(axis=1)
        near = (distance.min(axis=1) < 1.0) & (spots["photons"][nearest] > 30)
        hkl = np.column_stack([table[n] for n in "hkl"])[near]
        exposure = simulator.physics.spot_strength * spots["partiality"][nearest[near]] * truth.scale
        measured.append(table["intensity"][near] / exposure)
        plus.append(simulator.crystal.intensity(hkl))
        minus.append(simulator.crystal.intensity(-hkl))
    m, p, n = (np.concatenate(v) for v in (measured, plus, minus))
    usable = p + n > 0
    return np.corrcoef((m - (p + n) / 2)[usable], ((p - n) / 2)[usable])[0, 1], int(usable.sum())


def test_bijvoet_sense_is_the_truths_and_a_mirrored_frame_gives_the_wrong_hand():
    right, n = hand_score(SIMULATOR, 4, is_mirrored=False)
    wrong, _ = hand_score(SIMULATOR, 4, is_mirrored=True)
    assert n > 200
    assert right > 0.8
    assert wrong < -0.8


def test_integrated_intensities_against_truth():
    table, spots, crystal, truth = integrated(SIMULATOR, 1)
    ops = lattice_rotations(LYSOZYME)
    op = min(ops, key=lambda g: np.linalg.norm(np.linalg.inv(truth.A.T) @ crystal.A - g))
    hkl = np.column_stack([table[n] for n in "hkl"]) @ op.T
    found = dict(zip(map(tuple, hkl.tolist()), table, strict=True))
    keys = [tuple(int(s[n]) for n in "hkl") for s in spots]
    pairs = [(s["photons"], found[k]) for s, k in zip(spots, keys, strict=True) if k in found]
    photons, intensity = np.array([p for p, _ in pairs]), np.array([r["intensity"] for _, r in pairs])
    sigma = np.array([r["sigma"] for _, r in pairs])
    assert len(pairs) > 60
    assert np.corrcoef(photons, intensity)[0, 1] > 0.98
    assert intensity.sum() / photons.sum() == pytest.approx(1.0, abs=0.05)
    assert np.median(np.abs(intensity - photons) / sigma) < 1.2
    strong = [k in found for s, k in zip(spots, keys, strict=True) if s["photons"] > 100 and not s["masked"]]
    assert np.mean(strong) > 0.8
