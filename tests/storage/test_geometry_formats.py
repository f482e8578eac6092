"""Geometry files written, read back, and held against the programs they belong to."""

import json
import os
import shutil
import subprocess
from bz2 import decompress

import numpy as np
import pyFAI.detectors
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pyFAI.geometry import Geometry as PyfaiGeometry

from storage.errors import BadGeometry
from storage.geometry import Geometry, Panel, override_detector
from storage.geometry_formats import geometry_text, poni, read_geometry, write_geometry
from storage.models import DetectorHeader
from storage.panels import DetectorGeometry, rectangles_of
from storage.sensor import Sensor, absorption_of
from tests.real_data import THAUMATIN, needs_thaumatin

PIXEL = 75e-6
WAVELENGTH = 1.0332


def turned(degrees):
    """Rotation by angles about x, y, z, one after the other."""
    a, b, c = np.radians(degrees)
    about_x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    about_y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    about_z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return about_z @ about_y @ about_x


def panel(name, degrees, centre, shape, origin=(0, 0)):
    """A panel turned about its own centre (x, y, z), m, from the usual mounting."""
    rotation = turned(degrees)
    fast, slow = rotation @ [-PIXEL, 0, 0], rotation @ [0, -PIXEL, 0]
    corner = np.array(centre) - 0.5 * (shape[1] * fast + shape[0] * slow)
    return Panel(name, tuple(corner.tolist()), tuple(fast.tolist()), tuple(slow.tolist()), shape, origin)


def four_panels():
    """Two by two, each tilted and displaced in its own way, with gaps of 10 px between them in the array."""
    return Geometry(
        (
            panel("q0", (2, -3, 0.4), (0.02, 0.021, 0.11), (256, 300)),
            panel("q1", (-1, 4, -0.3), (-0.02, 0.02, 0.112), (256, 300), (0, 310)),
            panel("q2", (0.5, 0.2, 1.0), (0.021, -0.02, 0.108), (256, 300), (266, 0)),
            panel("q3", (0, 0, 0), (-0.02, -0.02, 0.11), (256, 300), (266, 310)),
        ),
        WAVELENGTH,
        Sensor(0.00045, absorption_of("Si", WAVELENGTH)),
    )


def positions(geometry, number):
    """Of the corners and the middle of a panel, (5, 3) m."""
    slow, fast = geometry.panels[number].shape
    x, y = np.array([0, fast, 0, fast, 0.37 * fast]), np.array([0, 0, slow, slow, 0.61 * slow])
    return geometry.lab_position(x, y, number)


def assert_same(found, geometry, atol=1e-9):
    assert [(p.name, p.shape, p.origin) for p in found.panels] == [(p.name, p.shape, p.origin) for p in geometry.panels]
    again = Geometry(found.panels, found.wavelength)
    for number in range(len(geometry.panels)):
        np.testing.assert_allclose(positions(again, number), positions(geometry, number), atol=atol, rtol=0)


# ---- round trips

angles = st.floats(-25, 25)
tilts = st.tuples(angles, angles, st.floats(-180, 180))
places = st.tuples(st.floats(-0.2, 0.2), st.floats(-0.2, 0.2), st.floats(0.05, 1.0))


@settings(max_examples=60, deadline=None)
@given(first=tilts, second=tilts, at=places, other=places, suffix=st.sampled_from([".geom", ".expt"]))
def test_panels_come_back_wherever_they_stand(tmp_path_factory, first, second, at, other, suffix):
    geometry = Geometry((panel("a", first, at, (64, 100)), panel("b", second, other, (30, 50), (64, 7))), WAVELENGTH)
    assume(geometry.distance >= 0)
    path = tmp_path_factory.mktemp("geometry") / f"any{suffix}"
    write_geometry(path, geometry)
    found = read_geometry(path)
    assert_same(found, geometry)
    assert found.wavelength == pytest.approx(WAVELENGTH, rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(tilt=tilts, at=places)
def test_a_flat_detector_comes_back_from_a_poni(tmp_path_factory, tilt, at):
    geometry = Geometry((panel("p0", tilt, at, (64, 100)),), WAVELENGTH)
    assume(geometry.distance >= 0)
    path = tmp_path_factory.mktemp("geometry") / "any.poni"
    write_geometry(path, geometry)
    assert_same(read_geometry(path), geometry)


def test_a_detector_whose_plane_is_behind_the_sample_is_refused(tmp_path):
    """Near, far aside and turned away: the direct beam never meets it, and there is no distance to state."""
    geometry = Geometry((panel("p0", (0.0, -21.0, -4.0), (0.125, -0.125, 0.05078125), (64, 100)),), WAVELENGTH)
    write_geometry(tmp_path / "any.poni", geometry)
    with pytest.raises(BadGeometry, match=r"the beam meets the plane of the detector 0\.00\d+ m behind the sample"):
        read_geometry(tmp_path / "any.poni")


@pytest.mark.parametrize("suffix", [".geom", ".expt"])
def test_bad_regions_come_back_as_the_same_mask(tmp_path, suffix):
    bad = ((10, 20, 30, 40), (250, 300, 290, 330))
    path = tmp_path / f"bad{suffix}"
    write_geometry(path, four_panels(), bad)
    found = read_geometry(path)
    expected = np.ones((522, 610), np.uint8)
    for y in (0, 266):
        for x in (0, 310):
            expected[y : y + 256, x : x + 300] = 0
    for y0, y1, x0, x1 in bad:
        expected[y0:y1, x0:x1] = 1
    np.testing.assert_array_equal(found.mask((522, 610)), expected)


def test_a_coplanar_grid_of_panels_is_one_detector_in_a_poni(tmp_path):
    whole = panel("a", (3, -2, 1), (0.01, 0, 0.1), (200, 300))
    right = Geometry((whole,), 1.0).lab_position(160.0, 0.0)
    parts = (
        Panel("a", whole.corner, whole.fast, whole.slow, (200, 150)),
        Panel("b", tuple(right.tolist()), whole.fast, whole.slow, (200, 140), (0, 160)),
    )
    write_geometry(tmp_path / "a.poni", Geometry(parts, 1.0))
    np.testing.assert_allclose(
        positions(Geometry(read_geometry(tmp_path / "a.poni").panels, 1.0), 0),
        positions(Geometry((whole,), 1.0), 0),
        atol=1e-9,
    )
    with pytest.raises(BadGeometry, match=r"not in the plane .* write \.geom or \.expt"):
        geometry_text(".poni", four_panels())


# ---- CrystFEL

GEOM = """
; two panels, of which the second is described with defaults of the file
photon_energy = 9 keV
clen = 80 mm
res = 10000      ; 100 µm
coffset = 0.02
dim0 = %
rigid_group_a = one
rigid_group_b = two
rigid_group_collection_all = a,b
one/min_fs = 0
one/max_fs = 99
one/min_ss = 0
one/max_ss = 49
one/fs = x
one/ss = -0.6y + 8e-1z
one/corner_x = -120.5
one/corner_y = 30
coffset = -0.005
two/min_fs = 0
two/max_fs = 99
two/min_ss = 50
two/max_ss = 99
two/fs = -y
two/ss = -1.0x
two/corner_x = 10
two/corner_y = -5
badstrip/min_fs = 10
badstrip/max_fs = 12
badstrip/min_ss = 40
badstrip/max_ss = 60
badcorner/min_x = -121
badcorner/max_x = -115.4
badcorner/min_y = 0
badcorner/max_y = 31
"""


def test_a_geom_is_read_as_its_manual_says(tmp_path):
    path = tmp_path / "two.geom"
    path.write_text(GEOM)
    found = read_geometry(path)
    one, two = found.panels
    assert found.wavelength == pytest.approx(12398.4198 / 9000, rel=1e-7)
    assert (found.distance, found.shape, found.groups) == (0.08, (100, 100), {"a": ("one",), "b": ("two",)})
    np.testing.assert_allclose(one.corner, (-0.01205, 0.003, 0.1))
    np.testing.assert_allclose([one.fast, one.slow], [(1e-4, 0, 0), (0, -0.6e-4, 0.8e-4)])
    np.testing.assert_allclose(two.corner, (0.001, -0.0005, 0.075))
    np.testing.assert_allclose([two.fast, two.slow], [(0, -1e-4, 0), (-1e-4, 0, 0)])
    assert (two.shape, two.origin) == ((50, 100), (50, 0))
    mask = found.mask((100, 100))
    assert mask[40:61, 10:13].all()
    # x from -121 to -115.4 holds the first six columns of panel one, y from 0 to 31 its rows 0 to 49
    assert mask[:50, :6].all()
    assert mask.sum() == 21 * 3 + 50 * 6


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("one/fs = x", "one/fs = 1.0w", r"line 15: one/fs is '1.0w'; write a direction like"),
        ("one/max_fs = 99", "one/max_fs = 9.5", "line 12: one/max_fs is '9.5'; give a whole number"),
        ("one/max_fs = 99", "one/max_fs = -1", "panel 'one' spans fs 0 to -1"),
        ("two/corner_x = 10\n", "", "panel 'two' has no corner_x; add lines like two/corner_x"),
        ("clen = 80 mm", "clen = 80 furlong", "line 4: one/clen is '80 furlong'; give a number in m, mm"),
        ("photon_energy = 9 keV", "photon_energy = -9 keV", "line 3: photon_energy is -9 keV; give one above 0"),
        ("two/min_ss = 50", "two/min_ss = 49", "share pixels of the frame's array"),
        ("res = 10000 ", "res = 0 ", "res of panel 'one' is 0.0"),
        ("two/ss = -1.0x", "two/ss = -1.0y", "do not span a plane"),
        ("rigid_group_a = one", "rigid_group_a one", "line 8: 'rigid_group_a one' is not of the form key = value"),
        ("badstrip/max_ss", "badstrip/most_ss", "a bad region has no 'most_ss'"),
    ],
)  # fmt: skip
def test_a_geom_that_cannot_be_meant_names_the_line(tmp_path, old, new, words):
    path = tmp_path / "bad.geom"
    assert old in GEOM
    path.write_text(GEOM.replace(old, new))
    with pytest.raises(BadGeometry, match=words):
        read_geometry(path)


MODULES = """
clen = 0.2
photon_energy = 9000
res = 10000
dim0 = %
dim2 = ss
dim3 = fs
min_fs = 0
max_fs = 99
min_ss = 0
max_ss = 39
corner_x = -50
corner_y = 0
m1a/dim1 = 1
m1b/dim1 = 1
m1b/min_ss = 40
m1b/max_ss = 63
m1b/corner_y = 41
m0/dim1 = 0
m0/max_ss = 63
m0/corner_y = -100
bad_edge/min_fs = 0
bad_edge/max_fs = 99
bad_edge/min_ss = 62
bad_edge/max_ss = 63
bad_spot/panel = m1a
bad_spot/min_fs = 5
bad_spot/max_fs = 6
bad_spot/min_ss = 10
bad_spot/max_ss = 10
"""


def test_modules_that_a_geom_numbers_lie_one_below_the_other(tmp_path):
    path = tmp_path / "modules.geom"
    path.write_text(MODULES)
    found = read_geometry(path)
    places = {p.name: (p.origin, p.shape, p.corner[:2]) for p in found.panels}
    assert places == {
        "m1a": ((64, 0), (40, 100), (-0.005, 0.0)),
        "m1b": ((104, 0), (24, 100), (-0.005, 0.0041)),
        "m0": ((0, 0), (64, 100), (-0.005, -0.01)),
    }
    bad = np.argwhere(found.mask((128, 100)))
    assert {tuple(pixel) for pixel in bad} == {
        *((row, x) for row in (62, 63, 126, 127) for x in range(100)), (74, 5), (74, 6),
    }  # fmt: skip
    assert any("one below the other" in note for note in found.notes)
    # Written again, it is of the frame as it is here: two axes.
    write_geometry(tmp_path / "flat.geom", Geometry(found.panels, WAVELENGTH))
    assert {p.name: p.origin for p in read_geometry(tmp_path / "flat.geom").panels} == {
        name: origin for name, (origin, *_) in places.items()
    }


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("m0/dim1 = 0\n", "", "m0 has no dim1; give every panel the number of its module"),
        ("m0/dim1 = 0\n", "m0/dim1 = 0\nm0/dim4 = 1\nm1a/dim4 = 0\nm1b/dim4 = 0\n", "dim1, dim4 tell panels apart"),
        ("dim2 = ss\ndim3 = fs", "dim2 = fs\ndim3 = ss", "line 6: panel 'm1a' has fs before ss; frames are"),
        ("m0/dim1 = 0\n", "m0/dim1 = 1\n", "share pixels of the frame's array"),
    ],
)
def test_modules_that_cannot_be_told_apart_are_refused(tmp_path, old, new, words):
    assert old in MODULES
    path = tmp_path / "bad.geom"
    path.write_text(MODULES.replace(old, new))
    with pytest.raises(BadGeometry, match=words):
        read_geometry(path)


def test_a_clen_from_the_data_file_leaves_the_distance_to_the_header(tmp_path):
    path = tmp_path / "path.geom"
    path.write_text(GEOM.replace("clen = 80 mm", "clen = /LCLS/detector_1/EncoderValue"))
    geometry = read_geometry(path)
    assert geometry.distance is None
    header = override_detector(DetectorHeader(detector_distance=0.3), {"geometry": geometry})
    assert [p.corner[2] for p in header.panels] == pytest.approx([0.32, 0.295])
    assert Geometry.from_header(header, (100, 100)).panels == header.panels


# ---- pyFAI


@pytest.mark.parametrize("orientation", [1, 2, 3, 4, None])
def test_a_poni_puts_pixels_where_pyfai_does(tmp_path, orientation):
    shape = (120, 200)
    detector = pyFAI.detectors.Detector(75e-6, 80e-6, max_shape=shape, orientation=orientation or 3)
    theirs = PyfaiGeometry(0.123, 0.02, -0.03, 0.11, -0.2, 0.7, detector=detector, wavelength=1.1e-10)
    path = tmp_path / "a.poni"
    theirs.save(str(path))
    if orientation is None:
        path.write_text(path.read_text().replace('"orientation": 3, ', "").replace("version: 2.1", "version: 2"))
    assert_as_pyfai(read_geometry(path), theirs)


def assert_as_pyfai(found, theirs):
    slow, fast = found.panels[0].shape
    # indices of its own, float64: what pyFAI makes by itself is float32, 1e-9 m at this size
    rows, columns = np.mgrid[0:slow, 0:fast].astype(float)
    z, y, x = (np.asarray(v) for v in theirs.calc_pos_zyx(d1=rows, d2=columns))
    ours = Geometry(found.panels, 1.0).lab_position(columns + 0.5, rows + 0.5)
    # pyFAI's 1 (its y) is up, its 2 (its x) to the right looking along the beam
    np.testing.assert_allclose(ours, np.stack([-x, y, z], axis=-1), atol=1e-12, rtol=0)
    assert found.wavelength == pytest.approx(theirs.wavelength * 1e10)


def test_pyfai_reads_our_poni_and_sees_the_usual_mounting_as_orientation_2(tmp_path):
    geometry = Geometry((panel("p0", (4, -7, 2), (0.01, -0.02, 0.2), (120, 200)),), WAVELENGTH)
    path = tmp_path / "ours.poni"
    write_geometry(path, geometry)
    theirs = PyfaiGeometry()
    theirs.load(str(path))
    assert int(theirs.detector.orientation) == 2
    assert_as_pyfai(read_geometry(path), theirs)
    assert read_geometry(path).notes == ()


@pytest.mark.parametrize("name", ["Eiger2_4M", "Eiger_16M", "Pilatus6M", "Eiger2CdTe_9M", "Pilatus CdTe 1M"])
def test_a_poni_that_only_names_its_detector_is_known(tmp_path, name):
    detector = pyFAI.detector_factory(name)
    PyfaiGeometry(0.2, 0.1, 0.1, detector=detector, wavelength=1e-10).save(str(tmp_path / "a.poni"))
    (found,) = read_geometry(tmp_path / "a.poni").panels
    assert found.shape == detector.max_shape
    np.testing.assert_allclose(np.linalg.norm([found.slow, found.fast], axis=1), [detector.pixel1, detector.pixel2])


def test_all_known_detectors_are_as_pyfai_has_them():
    known = {
        "".join(c for c in alias.lower() if c.isalnum()): kind
        for kind in set(pyFAI.detectors.ALL_DETECTORS.values())
        for alias in [kind.__name__, *kind.aliases]
    }
    for name, (shape, size) in poni._KNOWN.items():
        detector = known[name]()
        assert (detector.max_shape, detector.pixel1, detector.pixel2) == (shape, size, size), name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Poni1: 0.1\n", "no Distance"),
        ("Distance: far\nPoni1: 0\nPoni2: 0\nDetector: Pilatus1M\n",
         "line 1: Distance is 'far'"),
        ("Distance: 0.1\nPoni1: 0\nPoni2: 0\nDetector: Mythen\n", "Detector 'Mythen': how many pixels"),
        ("Distance: 0.1\nDetector_config: {pixel1\n", "line 2: Detector_config is not JSON"),
        ("Distance: 0.1\nDetector_config: {\"orientation\": 7}\n", "orientation is 7; it is 1 to 4"),
        ("Distance: 0.1\nDetector_config: {\"splineFile\": \"frelon.spline\"}\n", "displaced by splineFile"),
    ],
)  # fmt: skip
def test_a_poni_that_cannot_be_meant_names_the_key(tmp_path, text, words):
    (tmp_path / "bad.poni").write_text(text)
    with pytest.raises(BadGeometry, match=words):
        read_geometry(tmp_path / "bad.poni")


# ---- DIALS

PYTHON_OF_DIALS = shutil.which("dials.python") or "/usr/bin/python3"
ASK = """
import json, sys
from dxtbx.model.experiment_list import ExperimentListFactory
answers = []
for path in sys.argv[1:]:
    experiments = ExperimentListFactory.from_json_file(path, check_format=False)
    answer = {"s0": list(experiments[0].beam.get_s0()), "panels": []}
    for panel in experiments[0].detector:
        (fast, slow), (px, py) = panel.get_image_size(), panel.get_pixel_size()
        points = [(0, 0), (fast, 0), (0, slow), (fast, slow), (0.37 * fast, 0.61 * slow)]
        answer["panels"].append({
            "plane": [list(panel.get_lab_coord((x * px, y * py))) for x, y in points],
            "spots": [list(panel.get_pixel_lab_coord(p)) for p in points],
        })
    answers.append(answer)
print(json.dumps(answers))
"""
MAKE = """
import sys
from dxtbx.model import BeamFactory, Detector, Experiment, ExperimentList
detector = Detector()
root = detector.hierarchy()
root.set_frame((1, 0, 0), (0, -1, 0), (1, 2, -150))
group = root.add_group()
group.set_frame((0.8, 0.6, 0), (0.6, -0.8, 0), (10, 0, -140))
for number in range(2):
    panel = group.add_panel()
    panel.set_name("module %d" % number)
    panel.set_local_frame((1, 0, 0), (0, 0.96, 0.28), (5 - 20 * number, 1, 0))
    panel.set_image_size((100, 60))
    panel.set_pixel_size((0.1, 0.1))
    panel.set_raw_image_offset((0, 70 * number))
    panel.add_mask(3, 4, 10, 20)
beam = BeamFactory.make_beam(sample_to_source=(0, 0, 1), wavelength=0.98)
ExperimentList([Experiment(beam=beam, detector=detector)]).as_file(sys.argv[1])
"""
needs_dials = pytest.mark.skipif(not shutil.which("dials.import"), reason="DIALS is not installed")


def of_dials(script, *arguments):
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL"))}
    done = subprocess.run(
        [PYTHON_OF_DIALS, "-c", script, *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-800:]
    return done.stdout


def assert_as_dials(geometry, answer, parallax_atol=1e-9):
    """Positions of the plane within 1e-9 m; and where rays of spots enter, parallax taken off.

    parallax_atol : m; absorption of a sensor that DIALS described is looked up in another table than ours.
    """
    for number, theirs in enumerate(answer["panels"]):
        plane, spots = (np.array(theirs[name]) * [-1e-3, 1e-3, -1e-3] for name in ("plane", "spots"))
        ours = positions(geometry, number)
        np.testing.assert_allclose(ours, plane, atol=1e-9, rtol=0)
        entered = ours - geometry._parallax(ours, number) if geometry.sensor.thickness else ours
        np.testing.assert_allclose(entered, spots, atol=parallax_atol, rtol=0)


@pytest.mark.dials
@needs_dials
def test_dials_sees_our_panels_where_we_do(tmp_path):
    bare = Geometry(four_panels().panels, WAVELENGTH)
    for name, geometry in (("with", four_panels()), ("without", bare)):
        write_geometry(tmp_path / f"{name}.expt", geometry, ((0, 5, 0, 5),))
    answers = json.loads(of_dials(ASK, tmp_path / "with.expt", tmp_path / "without.expt"))
    for geometry, answer in zip((four_panels(), bare), answers, strict=True):
        assert_as_dials(geometry, answer)
        np.testing.assert_allclose(answer["s0"], [0, 0, -1 / WAVELENGTH])


@pytest.mark.dials
@needs_dials
def test_panels_in_groups_that_dials_wrote_are_read_where_it_sees_them(tmp_path):
    of_dials(MAKE, tmp_path / "made.expt")
    found = read_geometry(tmp_path / "made.expt")
    assert_as_dials(Geometry(found.panels, found.wavelength), json.loads(of_dials(ASK, tmp_path / "made.expt"))[0])
    assert [(p.name, p.origin) for p in found.panels] == [("module_0", (0, 0)), ("module_1", (70, 0))]
    assert found.bad == ((4, 20, 3, 10), (74, 90, 3, 10))
    assert found.wavelength == 0.98


@pytest.mark.dials
@needs_dials
@needs_thaumatin
def test_what_dials_imports_of_a_real_frame_is_read_where_it_sees_it(tmp_path):
    (tmp_path / "still_0001.cbf").write_bytes(decompress((THAUMATIN / "thau_3_2_0005.cbf.bz2").read_bytes()))
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL"))}
    subprocess.run(
        ["dials.import", "still_0001.cbf"], cwd=tmp_path, env=environment, check=True, capture_output=True, timeout=120
    )
    found = read_geometry(tmp_path / "imported.expt")
    header = override_detector(DetectorHeader(), {"geometry": found})
    geometry = Geometry.from_header(header, found.shape)
    assert_as_dials(geometry, json.loads(of_dials(ASK, tmp_path / "imported.expt"))[0], parallax_atol=1.5e-6)
    # as the frame's own header says: Beam_xy (1261.61, 1306.96) pixels, Detector_distance 0.35100 m
    assert geometry.beam_center == pytest.approx((1261.61, 1306.96), abs=0.02)
    assert geometry.distance == pytest.approx(0.351, abs=1e-6)


def test_a_beam_off_the_axis_is_turned_onto_it_with_the_detector(tmp_path):
    path = tmp_path / "off.expt"
    write_geometry(path, four_panels())
    content = json.loads(path.read_text())
    content["beam"][0]["direction"] = [0.01, -0.02, np.sqrt(1 - 0.0005)]
    path.write_text(json.dumps(content))
    found = read_geometry(path)
    # what the file says of scattering angles is what counts, and how far away each pixel is
    beam = np.array([0.01, 0.02, np.sqrt(1 - 0.0005)])
    for number in range(4):
        before, after = positions(four_panels(), number), positions(Geometry(found.panels, 1.0), number)
        np.testing.assert_allclose(after[:, 2], before @ beam, atol=1e-12)
        np.testing.assert_allclose(np.linalg.norm(after, axis=1), np.linalg.norm(before, axis=1), atol=1e-12)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "line 1: not JSON"),
        ("{}", "no detector in it"),
        (
            geometry_text(".expt", four_panels()).replace("266", "0").replace("310", "0"),
            "where its 4 panels lie in the frame's array is not in the file",
        ),
        ('{"detector": [{"panels": [{"origin": [0, 0, 1]}]}]}', "not an experiment list .*'fast_axis'"),
    ],
)
def test_an_expt_that_cannot_be_meant_names_the_key(tmp_path, text, words):
    (tmp_path / "bad.expt").write_text(text)
    with pytest.raises(BadGeometry, match=words):
        read_geometry(tmp_path / "bad.expt")


@pytest.mark.parametrize("name", ["panels.txt", "missing.geom"])
def test_other_files_are_refused(tmp_path, name):
    with pytest.raises(BadGeometry, match=r"no geometry format|cannot read geometry"):
        read_geometry(tmp_path / name)


# ---- from a file to a header


def read(geometry):
    return DetectorGeometry(panels=geometry.panels, wavelength=geometry.wavelength, distance=geometry.distance)


def test_a_header_with_panels_survives_json_and_one_without_has_no_word_of_them():
    header = override_detector(DetectorHeader(detector_distance=0.2), {"geometry": read(four_panels())})
    assert DetectorHeader.model_validate_json(header.model_dump_json()) == header
    assert "panels" not in DetectorHeader().model_dump()
    assert Geometry.from_header(header, (522, 610)).panels == four_panels().panels
    assert header.incident_wavelength == WAVELENGTH


def test_a_distance_beside_a_geometry_moves_it_along_the_beam():
    geometry = read(four_panels())
    header = override_detector(DetectorHeader(), {"geometry": geometry, "detector_distance": geometry.distance + 0.05})
    for old, new in zip(geometry.panels, header.panels, strict=True):
        np.testing.assert_allclose(new.corner, np.add(old.corner, (0, 0, 0.05)), atol=1e-15)
    assert header.detector_distance == pytest.approx(geometry.distance + 0.05)


def test_a_wavelength_beside_a_geometry_goes_before_it():
    header = override_detector(DetectorHeader(), {"geometry": read(four_panels()), "incident_energy": 10000.0})
    assert header.incident_wavelength == pytest.approx(1.23984198)


@pytest.mark.parametrize("name", ["beam_center_x", "pixel_size_y"])
def test_what_a_geometry_says_already_is_refused_beside_it(name):
    with pytest.raises(ValueError, match=f"{name} beside geometry"):
        override_detector(DetectorHeader(), {"geometry": read(four_panels()), name: 1.0})


def test_a_geometry_of_another_detector_is_refused():
    header = override_detector(DetectorHeader(), {"geometry": read(four_panels())})
    with pytest.raises(ValueError, match=r"panel 'q1' spans .* but frames are \(512, 512\)"):
        Geometry.from_header(header, (512, 512))


# ---- in the frame's array


def test_positions_in_the_array_are_those_of_the_panel_below():
    geometry = four_panels()
    x, y = np.array([5.5, 400.0, 17.0, 505.0, 305.0, 300.0]), np.array([7.5, 3.0, 400.0, 521.9, 10.0, 100.0])
    panels = geometry.panel_at(x, y)
    # off every panel in the gap; on the far edge still on
    assert panels.tolist() == [0, 1, 2, 3, -1, 0]
    q, lab = geometry.q_at(x, y), geometry.lab_at(x, y)
    for i, number in enumerate(panels):
        if number < 0:
            assert np.isnan(q[i]).all()
            continue
        y0, x0 = geometry.panels[number].origin
        np.testing.assert_allclose(lab[i], geometry.lab_position(x[i] - x0, y[i] - y0, number), atol=1e-15)
        np.testing.assert_allclose(q[i], geometry.scattering_vector(x[i] - x0, y[i] - y0, number), atol=1e-13)


def test_rays_are_placed_on_the_panel_they_meet():
    geometry = four_panels()
    rng = np.random.default_rng(1)
    x, y = rng.uniform(0, 610, 4000), rng.uniform(0, 522, 4000)
    q = geometry.q_at(x, y)
    inside = np.isfinite(q[:, 0])
    rows, found_x, found_y, panel = geometry.place(q[inside])
    order = np.argsort(rows, kind="stable")
    x, y = x[inside], y[inside]
    # panels of this detector do not cover each other: each ray is seen once, but for those within an edge's rounding
    assert abs(len(rows) - inside.sum()) <= 2
    np.testing.assert_array_equal(panel, geometry.panel_at(found_x, found_y))
    # back from parallax taken at the apparent place: some 1e-3 px
    assert np.abs(found_x[order] - x[rows[order]]).max() < 0.01
    assert np.abs(found_y[order] - y[rows[order]]).max() < 0.01


def test_one_panel_gives_the_very_bits_it_always_gave():
    header = DetectorHeader(beam_center_x=50.2, beam_center_y=41.7, detector_distance=0.1, incident_wavelength=1.1)
    geometry = Geometry.from_header(header, (100, 120))
    rng = np.random.default_rng(2)
    x, y = rng.uniform(0, 120, 50), rng.uniform(0, 100, 50)
    np.testing.assert_array_equal(geometry.q_at(x, y), geometry.scattering_vector(x, y))
    q = geometry.scattering_vector(x, y)
    rows, found_x, found_y, _ = geometry.place(q)
    np.testing.assert_array_equal((found_x, found_y), [v[rows] for v in geometry.project(q)])
    assert (geometry.distance, geometry.beam_center) == (0.1, pytest.approx((50.2, 41.7), abs=1e-12))
    assert geometry.tilt_deg == 0


def test_marked_pixels_are_made_up_of_rectangles():
    rng = np.random.default_rng(3)
    marked = rng.random((20, 30)) < 0.3
    again = np.zeros_like(marked)
    for y0, y1, x0, x1 in rectangles_of(marked):
        assert not again[y0:y1, x0:x1].any()
        again[y0:y1, x0:x1] = True
    np.testing.assert_array_equal(again, marked)


def test_a_ring_is_a_scattering_angle_on_whatever_panel():
    """A cone of 10° meets panels at 0.1 m and 0.13 m, the second tilted, in pixels of one radius."""
    near, far = (
        panel("a", (0, 0, 0), (0.015, 0, 0.1), (200, 200)),
        panel("b", (4, 9, 0), (-0.02, 0, 0.13), (200, 200), (0, 200)),
    )
    geometry = Geometry((near, far), WAVELENGTH)
    rings = []
    for number in range(2):
        y, x = np.mgrid[0:200, 0:200] + 0.5
        r = geometry.lab_position(x, y, number)
        on = np.abs(np.degrees(np.arctan2(np.hypot(r[..., 0], r[..., 1]), r[..., 2])) - 10) < 0.01
        assert on.sum() > 20
        rings.append(geometry.radius_px(number)[on])
    expected = geometry.distance * np.tan(np.radians(10)) / PIXEL
    np.testing.assert_allclose(np.concatenate(rings), expected, rtol=2e-3)
