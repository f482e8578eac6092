"""The simulator's truth holds in its pixels, its symmetry and its statistics."""

import gemmi
import numpy as np
import pytest

from storage.codec import decode
from storage.errors import BadFrame, RunNotFound, ServiceUnavailable, ShapeMismatch
from storage.geometry import Geometry
from streaming.simulator import (
    SimulatedCrystal,
    SimulatorSettings,
    StillPhysics,
    StillSimulator,
    make_frames,
    read_truth,
    simulate,
    write_truth,
)
from streaming.simulator.run import SENSOR_SIZES
from streaming.simulator.stills import MASK_GAP, module_mask, polarisation_factor

from .dectris_client import Receiver

SMALL = (512, 512)
HKL = np.array([[h, k, l] for h in range(-4, 5) for k in range(-4, 5) for l in range(-4, 5)], np.int32)  # noqa: E741
HITS = StillPhysics(hit_fraction=1.0)


@pytest.fixture(scope="module")
def hits() -> StillSimulator:
    return StillSimulator(SMALL, physics=HITS)


# ---- the crystal

GROUPS = [
    ("P 43 21 2", (79.1, 79.1, 37.9, 90, 90, 90)),
    ("P 1", (30, 40, 50, 80, 95, 100)),
    ("C 1 2 1", (60, 40, 50, 90, 100, 90)),
    ("P 61 2 2", (60, 60, 90, 90, 90, 120)),
    ("H 3 2", (80, 80, 120, 90, 90, 120)),
    ("F 4 3 2", (90, 90, 90, 90, 90, 90)),
    ("P 21 3", (70, 70, 70, 90, 90, 90)),
]


@pytest.mark.parametrize(("group", "cell"), GROUPS, ids=[group for group, _ in GROUPS])
@pytest.mark.parametrize("bijvoet", [0.0, 0.2])
def test_intensities_obey_the_laue_group_and_absences(group, cell, bijvoet):
    crystal = SimulatedCrystal(cell, group, seed=3, bijvoet=bijvoet)
    operations = gemmi.SpaceGroup(group).operations()
    asu = gemmi.ReciprocalAsu(gemmi.SpaceGroup(group))
    intensity = crystal.intensity(HKL)
    by_asu: dict[tuple, float] = {}
    for hkl, value in zip(HKL.tolist(), intensity, strict=True):
        if operations.is_systematically_absent(hkl):
            assert value == 0
            continue
        unique, isym = asu.to_asu(hkl, operations)
        # an even isym is a Friedel mate; mates only agree where Friedel's law was kept or the reflection is centric
        friedel = isym % 2 == 0 and bijvoet > 0 and not operations.is_reflection_centric(hkl)
        assert by_asu.setdefault((*unique, friedel), value) == pytest.approx(value, rel=1e-12)


def test_bijvoet_differences_have_the_asked_size():
    crystal = SimulatedCrystal(bijvoet=0.1)
    hkl = SimulatedCrystal().reflections(3.0).hkl
    centric = crystal.group.operations().centric_flag_array(hkl)
    plus, minus = crystal.intensity(hkl), crystal.intensity(-hkl)
    assert np.array_equal(plus[centric], minus[centric])
    ratio = 2 * (plus - minus)[~centric] / (plus + minus)[~centric]
    assert np.sqrt(np.mean(ratio**2)) == pytest.approx(0.1, rel=0.05)


def test_intensities_do_not_depend_on_resolution_asked_for():
    crystal = SimulatedCrystal(seed=5)
    coarse, fine = crystal.reflections(6.0), crystal.reflections(4.0)
    known = dict(zip(map(tuple, fine.hkl.tolist()), fine.intensity, strict=True))
    assert [known[tuple(hkl)] for hkl in coarse.hkl.tolist()] == coarse.intensity.tolist()


def test_intensities_follow_the_wilson_fall_off():
    crystal = SimulatedCrystal(b_factor=30.0)
    found = crystal.reflections(2.5)
    d_squared = 1 / ((found.hkl @ crystal.reciprocal_basis) ** 2).sum(axis=1)
    shell = (d_squared < 3.0**2) & (d_squared > 2.9**2)
    assert found.intensity[shell].mean() == pytest.approx(np.exp(-30 / (2 * 2.95**2)), rel=0.1)


def test_seed_is_another_structure():
    assert not np.allclose(SimulatedCrystal(seed=1).intensity(HKL), SimulatedCrystal(seed=2).intensity(HKL))


@pytest.mark.parametrize(
    ("cell", "group", "word"),
    [((79.1, 79.1, 37.9, 90, 90, 90), "P 99", "unknown"), ((70, 80, 90, 90, 90, 90), "P 43 21 2", "does not fit")],
    ids=["no such group", "cell against group"],
)
def test_impossible_crystals_are_refused(cell, group, word):
    with pytest.raises(BadFrame, match=word):
        SimulatedCrystal(cell, group)


# ---- frames


def test_frames_depend_on_seed_and_index_only(hits):
    again = StillSimulator(SMALL, physics=HITS)
    array, truth = again.frame(5)
    again.frame(2)
    later, later_truth = hits.frame(5)
    assert np.array_equal(array, later)
    assert np.array_equal(truth.spots, later_truth.spots)
    assert not np.array_equal(array, StillSimulator(SMALL, physics=HITS, seed=1).frame(5)[0])
    one, other = (make_frames(hits, 6, threads=n)[0] for n in (1, 3))
    assert one == other
    assert np.array_equal(decode(one[5], SMALL, "uint16"), array)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_spots_are_where_the_truth_says(dtype):
    simulator = StillSimulator(SMALL, dtype, physics=StillPhysics(hit_fraction=1.0, background=0.2))
    n_checked = 0
    for index in range(5):
        array, truth = simulator.frame(index)
        for spot in _bright_lone_spots(simulator, truth.spots):
            x, y = float(spot["x"]), float(spot["y"])
            left, top = int(x) - 4, int(y) - 4
            window = array[top : top + 9, left : left + 9].astype(float)
            net = window - simulator.background[top : top + 9, left : left + 9]
            centre_y, centre_x = (np.sum(net * (np.mgrid[0:9, 0:9] + 0.5), axis=(1, 2)) / net.sum()) + (top, left)
            assert np.hypot(centre_x - x, centre_y - y) < 0.35
            peak_y, peak_x = np.unravel_index(window.argmax(), window.shape)
            assert max(abs(peak_x + left + 0.5 - x), abs(peak_y + top + 0.5 - y)) < 1.5
            assert abs(net.sum() - spot["photons"]) < 6 * np.sqrt(window.sum())
            n_checked += 1
    assert n_checked > 20


def _bright_lone_spots(simulator: StillSimulator, spots: np.ndarray) -> np.ndarray:
    """Spots well above background, clear of the mask, the edge and other spots."""
    chosen = []
    for spot in spots[spots["photons"] > 200]:
        x, y = int(spot["x"]), int(spot["y"])
        inside = 6 <= x < simulator.shape[1] - 6 and 6 <= y < simulator.shape[0] - 6
        near = np.hypot(spots["x"] - spot["x"], spots["y"] - spot["y"]) < 10
        if (
            inside
            and not simulator.pixel_mask[y - 6 : y + 7, x - 6 : x + 7].any()
            and spots["photons"][near].sum() < 1.05 * spot["photons"]
        ):
            chosen.append(spot)
    return np.array(chosen, spots.dtype)


def test_orientation_gives_the_spots_and_the_cell(hits):
    truth = hits.truth(0)
    hkl = np.stack([truth.spots[name] for name in "hkl"], axis=1)
    x, y = Geometry.from_header(hits.header, SMALL).project(hkl @ truth.A)
    assert np.allclose(x, truth.spots["x"], atol=1e-3)
    assert np.allclose(y, truth.spots["y"], atol=1e-3)
    real = np.linalg.inv(truth.A).T
    assert np.allclose(np.linalg.norm(real, axis=1), [79.1, 79.1, 37.9])
    assert np.linalg.det(truth.A) > 0
    k = hkl @ truth.A + (0, 0, 1 / hits.geometry.wavelength)
    assert np.abs(np.linalg.norm(k, axis=1) - 1 / hits.geometry.wavelength).max() < 2e-3


def test_orientations_are_uniform(hits):
    # for a uniform rotation each axis is uniform on the sphere: mean 0, variance of a component 1/3
    axes = np.array([hits.truth(i).A[2] for i in range(400)]) * 37.9
    assert np.abs(axes.mean(axis=0)).max() < 0.12
    assert np.allclose((axes**2).mean(axis=0), 1 / 3, atol=0.08)


def test_background_is_poisson_about_its_expectation():
    simulator = StillSimulator(SMALL, physics=StillPhysics(hit_fraction=0.0, background=3.0))
    good = simulator.pixel_mask == 0
    expected = simulator.background[good].astype(float)
    counts = np.array([simulator.frame(i)[0][good] for i in range(8)], float)
    assert counts.mean() == pytest.approx(expected.mean(), rel=0.005)
    assert ((counts - expected) ** 2 / expected).mean() == pytest.approx(1.0, rel=0.01)
    assert (counts == 0).mean() == pytest.approx(np.exp(-expected).mean(), rel=0.01)
    # neighbours share hashed bits; they must not share their noise
    residual = (counts - expected) / np.sqrt(expected)
    assert abs((residual[:, 1:] * residual[:, :-1]).mean()) < 0.003
    assert abs((residual[1:] * residual[:-1]).mean()) < 0.003


def test_water_ring_is_brighter_than_its_surroundings(hits):
    geometry = hits.geometry
    y, x = np.mgrid[0:512, 0:512] + 0.5
    d = 1 / np.linalg.norm(geometry.scattering_vector(x, y), axis=-1)
    mean = [hits.background[(abs(d - at) < 0.05 * at) & (hits.pixel_mask == 0)].mean() for at in (5.5, 3.4, 2.65)]
    assert mean[1] > 1.5 * max(mean[0], mean[2])


def test_masked_pixels_hold_the_maximum(hits):
    array, _ = hits.frame(0)
    assert (array[hits.pixel_mask != 0] == 65535).all()
    assert array[hits.pixel_mask == 0].max() < 65535
    without = StillSimulator(SMALL, physics=StillPhysics(gaps=False, bad_pixel_fraction=0.0))
    assert not without.pixel_mask.any()


@pytest.mark.parametrize(
    ("size", "masked_rows", "masked_columns"),
    [("512", 18, 0), ("1M", 38, 0), ("4M", 3 * 38, 12), ("9M", 5 * 38, 2 * 12), ("16M", 7 * 38, 3 * 12)],
)
def test_gaps_are_those_of_the_detector(size, masked_rows, masked_columns):
    gap = module_mask(SENSOR_SIZES[size]) == MASK_GAP
    assert gap.all(axis=1).sum() == masked_rows
    assert gap.all(axis=0).sum() == masked_columns


def test_blank_frames_hold_no_spots():
    truth = StillSimulator(SMALL, physics=StillPhysics(hit_fraction=0.0)).truth(0)
    assert not truth.is_hit
    assert len(truth.spots) == 0
    assert np.isnan(truth.A).all()


def test_hit_fraction_is_kept():
    simulator = StillSimulator((64, 64), physics=StillPhysics(hit_fraction=0.3), d_min=8.0)
    assert np.mean([simulator.truth(i).is_hit for i in range(500)]) == pytest.approx(0.3, abs=0.07)


@pytest.mark.parametrize(("size", "fewest"), [("512", 20), ("1M", 40), ("4M", 50)])
def test_default_hits_are_clear_hits(size, fewest):
    simulator = StillSimulator(SENSOR_SIZES[size], physics=HITS)
    visible = []
    for index in range(12):
        spots = simulator.truth(index).spots
        under = simulator.background[spots["y"].astype(int), spots["x"].astype(int)]
        # the brightest pixel of a spot of this width holds about a sixth of its photons
        visible.append(np.count_nonzero(~spots["masked"] & (spots["photons"] / 6 > 3 + 5 * np.sqrt(under))))
    assert min(visible) >= fewest
    assert max(visible) < 250


def test_unmasked_noisy_pixels_are_hot_in_every_frame():
    physics = StillPhysics(hit_fraction=0.0, noisy_pixels=5)
    simulator = StillSimulator(SMALL, physics=physics)
    hot = [
        np.flatnonzero((frame > 19) & (simulator.pixel_mask == 0)) for frame in (simulator.frame(i)[0] for i in (0, 1))
    ]
    assert len(np.intersect1d(*hot)) >= 4


# ---- options


def test_polarisation_weakens_horizontal_scatter():
    up, side = np.array([0, 0.6, 0.8]), np.array([0.6, 0, 0.8])
    assert polarisation_factor(up, 1.0) == 1.0
    assert polarisation_factor(side, 1.0) == pytest.approx(0.64)
    assert polarisation_factor(side, 0.5) == pytest.approx((1 + 0.8**2) / 2)
    plain = StillSimulator(SMALL, physics=HITS)
    polarised = StillSimulator(SMALL, physics=StillPhysics(hit_fraction=1.0, polarisation=0.99))
    ratio = polarised.truth(0).spots["photons"] / plain.truth(0).spots["photons"]
    assert ratio.min() > 0.7
    assert ratio.max() <= 1.0
    assert ratio.min() < 0.97


def test_parallax_moves_spots_outward():
    plain, shifted = (
        StillSimulator(SMALL, physics=StillPhysics(hit_fraction=1.0, parallax=on)) for on in (False, True)
    )
    first = {tuple(s)[:3]: (s["x"], s["y"]) for s in plain.truth(0).spots}
    centre = np.array([plain.header.beam_center_x, plain.header.beam_center_y])
    for spot in shifted.truth(0).spots:
        if tuple(spot)[:3] in first:
            before, after = np.array(first[tuple(spot)[:3]]) - centre, np.array([spot["x"], spot["y"]]) - centre
            assert 0 <= np.linalg.norm(after) - np.linalg.norm(before) < 1.5
            assert abs(np.cross([*before, 0], [*after, 0])[2]) / np.linalg.norm(before) < 0.01


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: StillPhysics(hit_fraction=1.5), BadFrame),
        (lambda: StillPhysics(spot_sigma=5), BadFrame),
        (lambda: StillPhysics(background=-1), BadFrame),
        (lambda: StillSimulator(dtype="int32"), BadFrame),
        (lambda: StillSimulator((4, 4)), ShapeMismatch),
        (lambda: SimulatorSettings(size="5M"), ValueError),
    ],
    ids=["hit fraction", "spot size", "background", "dtype", "shape", "size"],
)
def test_impossible_settings_are_refused(make, error):
    with pytest.raises(error):
        make()


# ---- the truth file


def test_truth_file_gives_everything_back(tmp_path):
    simulator = StillSimulator(SMALL, physics=StillPhysics(hit_fraction=0.5))
    frames = [simulator.truth(i) for i in range(6)]
    assert {frame.is_hit for frame in frames} == {True, False}
    back = read_truth(write_truth(tmp_path / "truth.parquet", frames, {"seed": 0}))
    assert back.metadata == {"seed": 0}
    assert back.is_hit.tolist() == [frame.is_hit for frame in frames]
    for i, frame in enumerate(frames):
        assert back[i + 6].index == frame.index
        assert np.array_equal(back[i].A, frame.A, equal_nan=True)
        assert np.array_equal(back[i].quaternion, frame.quaternion, equal_nan=True)
        assert np.array_equal(back[i].spots, frame.spots)


def test_missing_truth_file_says_so(tmp_path):
    with pytest.raises(RunNotFound, match="no truth file"):
        read_truth(tmp_path / "none.parquet")


# ---- all of it


def test_simulate_sends_what_the_truth_says(tmp_path):
    receivers: list[Receiver] = []
    stages: list[str] = []
    settings = SimulatorSettings(
        bind="tcp://127.0.0.1:*",
        size="512",
        n_frames=5,
        unique_frames=3,
        repeat=2,
        experiment="lyso",
        run=7,
        sample="hewl",
        truth=tmp_path / "truth.parquet",
    )
    sent = simulate(
        settings,
        lambda stage, done, total: stages.append(stage),
        on_bound=lambda endpoint: receivers.append(Receiver(endpoint, n_series=2)),
    )
    messages = receivers[0].messages()
    assert [m["type"] for m in messages] == (["start"] + ["image"] * 5 + ["end"]) * 2
    assert (sent.n_series, sent.n_frames) == (2, 10)
    assert [m["user_data"]["nearline"]["run"] for m in messages if m["type"] == "start"] == [7, 8]
    assert sent.series_unique_ids == (messages[0]["series_unique_id"], messages[7]["series_unique_id"])
    truth, simulator = read_truth(settings.truth), settings.simulator()
    assert len(truth) == 3
    for message in messages[8:13]:
        expected, frame_truth = simulator.frame(message["image_id"] % 3)
        assert np.array_equal(message["data"]["threshold_1"], expected)
        assert np.array_equal(truth[message["image_id"]].spots, frame_truth.spots)
    assert {"making frames", "sending"} <= set(stages)


def test_simulate_without_a_receiver_gives_up_with_a_word():
    waits: list[str] = []
    settings = SimulatorSettings(bind="tcp://127.0.0.1:*", size="64x64", n_frames=1, receiver_timeout=0.6)
    with pytest.raises(ServiceUnavailable, match="no receiver"):
        simulate(settings, lambda stage, done, total: waits.append(stage))
    assert any("waiting for a receiver" in stage for stage in waits)
