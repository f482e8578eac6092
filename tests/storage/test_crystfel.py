"""CrystFEL streams and geometry files: written, read back, and in the form CrystFEL asks for."""

import re

import numpy as np
import pytest

from storage.crystfel import (
    CrystfelStreamWriter,
    StreamCrystal,
    StreamPeaks,
    StreamReflections,
    geometry_file,
    read_preamble,
    read_stream,
)
from storage.errors import BadFrame, OutputExists, ShapeMismatch, StorageFull
from storage.geometry import Geometry, Panel
from storage.models import DetectorHeader, StreamHeader

SHAPE = (1065, 1030)
DETECTOR = DetectorHeader(
    pixel_size_x=75e-6,
    pixel_size_y=75e-6,
    beam_center_x=517.3,
    beam_center_y=540.8,
    detector_distance=0.1,
    incident_energy=12000.0,
    saturation_value=40000,
)
HEADER = StreamHeader(
    experiment="lyso-2026", run=17, data_source="eiger", shape=SHAPE, dtype="uint16", detector=DETECTOR
)
CELL = "CrystFEL unit cell file version 1.0\n\nlattice_type = tetragonal\ncentering = P\n"


def make_peaks(n=5):
    rng = np.random.default_rng(3)
    return StreamPeaks(x=rng.uniform(0, 1030, n), y=rng.uniform(0, 1065, n), intensity=rng.uniform(10, 1e6, n))


def make_crystal(n=4, **more):
    """Lysozyme, 79.2 79.2 37.9 Å, in a general orientation."""
    rng = np.random.default_rng(5)
    rotation, _ = np.linalg.qr(rng.normal(size=(3, 3)))
    A = np.diag([1 / 79.2, 1 / 79.2, 1 / 37.9]) @ (rotation * np.sign(np.linalg.det(rotation)))
    reflections = StreamReflections(
        h=np.arange(n) - 2,
        k=np.arange(n) * 7,
        l=-np.arange(n),
        intensity=rng.normal(0, 1e4, n),
        sigma=rng.uniform(1, 100, n),
        peak=rng.uniform(0, 4e4, n),
        background=rng.uniform(0, 5, n),
        x=rng.uniform(0, 1030, n),
        y=rng.uniform(0, 1065, n),
    )
    facts = {"lattice_type": "tetragonal", "unique_axis": "c", "resolution_limit": 4.0, "reflections": reflections}
    return StreamCrystal(A, **(facts | more))


def write(path, *frames, **options):
    """A stream of frames given as the keyword arguments of write_frame."""
    with CrystfelStreamWriter(path, HEADER, image_filename="run17.nxs", **options) as stream:
        for frame in frames:
            stream.write_frame(**frame)
    return path


def test_what_is_written_is_read_back(tmp_path):
    peaks, crystals = make_peaks(), [make_crystal(n_saturated=2, n_implausible=1), make_crystal(1, centering="I")]
    path = write(
        tmp_path / "run.stream",
        {"frame_index": 3, "hit": False, "peaks": StreamPeaks.none()},
        {"frame_index": 12, "hit": True, "peaks": peaks, "crystals": crystals, "row": 1},
    )
    blank, frame = read_stream(path)
    assert (blank.frame_index, blank.event, blank.hit, blank.indexed_by, blank.crystals) == (
        3,
        "//3",
        False,
        "none",
        (),
    )
    assert len(blank.peaks.x) == 0
    assert (frame.frame_index, frame.serial_number, frame.event, frame.hit) == (12, 13, "//1", True)
    assert (frame.image_filename, frame.indexed_by) == ("run17.nxs", "file")
    assert frame.photon_energy == pytest.approx(12000)
    for name in ("x", "y", "intensity"):
        np.testing.assert_allclose(getattr(frame.peaks, name), getattr(peaks, name), atol=0.0051)
    for written, read in zip(crystals, frame.crystals, strict=True):
        np.testing.assert_allclose(read.A, written.A, atol=1e-8)
        np.testing.assert_allclose(read.cell, (79.2, 79.2, 37.9, 90, 90, 90), rtol=1e-5)
        for name in ("lattice_type", "centering", "unique_axis", "resolution_limit", "n_saturated", "n_implausible"):
            assert getattr(read, name) == getattr(written, name)
        for name, tolerance in {"h": 0, "k": 0, "l": 0, "intensity": 0.0051, "sigma": 0.0051, "x": 0.051}.items():
            np.testing.assert_allclose(
                getattr(read.reflections, name), getattr(written.reflections, name), atol=tolerance, rtol=0
            )


def test_the_cell_is_that_of_the_vectors():
    direct = np.array([[50.0, 0, 0], [-20.0, 40.0, 0], [5.0, 7.0, 90.0]])
    a, b, c, alpha, beta, gamma = StreamCrystal(np.linalg.inv(direct).T).cell
    assert (a, b, c) == pytest.approx(tuple(np.sqrt((direct**2).sum(axis=1))))
    assert np.cos(np.radians(gamma)) == pytest.approx(-1000 / (a * b))
    assert np.cos(np.radians(beta)) == pytest.approx(250 / (a * c))
    assert np.cos(np.radians(alpha)) == pytest.approx((-100 + 280) / (b * c))


def test_resolution_of_peaks_comes_from_the_geometry(tmp_path):
    """75 px off a 100 mm, 12 keV beam: 2 sin(theta) / lambda, computed here by hand."""
    peaks = StreamPeaks(np.array([517.3, 517.3 + 400]), np.array([540.8, 540.8]), np.array([1.0, 1.0]))
    (frame,) = read_stream(write(tmp_path / "a.stream", {"frame_index": 0, "hit": True, "peaks": peaks}))
    wavelength_nm = 12398.419843 / 12000 / 10
    theta = np.arctan(400 * 75e-6 / 0.1) / 2
    np.testing.assert_allclose(frame.peaks.q_invnm, [0.0, 2 * np.sin(theta) / wavelength_nm], atol=0.0051)


def test_every_line_has_crystfels_form(tmp_path):
    frames = {"frame_index": 0, "hit": True, "peaks": make_peaks(1), "crystals": [make_crystal(1), make_crystal(0)]}
    text = write(tmp_path / "a.stream", frames, audit_lines=["nearline 0.1"], cell_text=CELL).read_text()
    assert text.startswith("CrystFEL stream format 2.3\nnearline 0.1\n----- Begin geometry file -----\n")
    assert f"----- Begin unit cell -----\n{CELL}----- End unit cell -----\n----- Begin chunk -----\n" in text
    number = r"[+-]?\d+\.\d"
    for form in (
        r"Image filename: run17\.nxs",
        r"Event: //0",
        r"Image serial number: 1",
        r"photon_energy_eV = 12000\.000000",
        r"beam_divergence = 0\.00e\+00 rad",
        r"beam_bandwidth = 1\.00e-08 \(fraction\)",
        r"average_camera_length = 0\.100000 m",
        r"  fs/px   ss/px \(1/d\)/nm\^-1   Intensity  Panel",
        rf" *{number}{{2}} +{number}{{2}} +{number}\d +{number}\d   p0",
        r"Cell parameters 7\.92000 7\.92000 3\.79000 nm, 90\.00000 90\.00000 90\.00000 deg",
        rf"astar = {number}{{7}} {number}{{7}} {number}{{7}} nm\^-1",
        r"lattice_type = tetragonal",
        r"profile_radius = 0\.00200 nm\^-1",
        r"diffraction_resolution_limit = 4\.00 nm\^-1 or 2\.50 A",
        r"   h    k    l          I   sigma\(I\)       peak background  fs/px  ss/px panel",
        rf"  -2    0    0 +{number}\d +{number}\d +{number}\d +{number}\d +{number} +{number} p0",
        r"No integrated reflections\.",
        r"--- End crystal",
    ):
        assert re.search(rf"^{form}$", text, re.MULTILINE), form
    assert text.endswith("--- End crystal\n----- End chunk -----\n")
    assert not re.search(r"[ \t]$", text.split("----- End unit cell")[1], re.MULTILINE)


def test_a_growing_stream_gives_its_whole_frames(tmp_path):
    path = tmp_path / "run.stream"
    with CrystfelStreamWriter(path, HEADER, image_filename="run17.nxs") as stream:
        for index in range(3):
            stream.write_frame(index, hit=True, peaks=make_peaks(), crystals=[make_crystal()])
            assert [f.frame_index for f in read_stream(path)] == list(range(index + 1))
    whole = path.read_text()
    start = whole.rindex("----- Begin chunk")
    for cut in range(start, len(whole) - 1, 97):
        path.write_text(whole[:cut])
        assert len(list(read_stream(path))) == 2


def test_preamble_is_read_back(tmp_path):
    path = write(tmp_path / "a.stream", audit_lines=["nearline 0.1", "nearline process lyso-2026/17"], cell_text=CELL)
    preamble = read_preamble(path)
    assert preamble.audit_lines == ("nearline 0.1", "nearline process lyso-2026/17")
    assert preamble.geometry == geometry_file(HEADER)
    assert preamble.cell == CELL
    assert list(read_stream(path)) == []


FOREIGN = """CrystFEL stream format 2.3
Generated by CrystFEL 0.12.0
indexamajig -i files.lst -o x.stream
----- Begin geometry file -----
photon_energy = 12000 eV
----- End geometry file -----
Indexing methods selected: xgandalf-nolatt-cell
----- Begin chunk -----
Image filename: data/run=1:x.h5
Event: entry//7
Image serial number: 1
hit = 1
indexed_by = xgandalf-nolatt-cell
photon_energy_eV = 12000.000000
header/float//entry/some/thing = 3.500000
num_peaks = 1
Peaks from peak search
  fs/px   ss/px (1/d)/nm^-1   Intensity  Panel
 580.87   14.85       3.64      397.34   p0
End of peak list
--- Begin crystal
Cell parameters 7.91593 7.91593 3.79251 nm, 90.00000 90.00000 90.00000 deg
astar = +0.0275025 -0.0701365 -0.1014057 nm^-1
bstar = +0.0556216 +0.0997826 -0.0539287 nm^-1
cstar = +0.2296783 -0.0686870 +0.1097986 nm^-1
profile_radius = 0.00273 nm^-1
Reflections measured after indexing
   h    k    l          I   sigma(I)       peak background  fs/px  ss/px panel
   1    2    3     100.00      10.00      14.00       1.40  500.5  400.2 p0
End of reflections
--- End crystal
----- End chunk -----
"""


def test_a_stream_of_indexamajig_is_read(tmp_path):
    (tmp_path / "x.stream").write_text(FOREIGN)
    (frame,) = read_stream(tmp_path / "x.stream")
    assert (frame.image_filename, frame.event, frame.frame_index) == ("data/run=1:x.h5", "entry//7", None)
    assert frame.peaks.q_invnm.tolist() == [3.64]
    (crystal,) = frame.crystals
    np.testing.assert_allclose(crystal.cell, (79.1593, 79.1593, 37.9251, 90, 90, 90), rtol=1e-4)
    assert (crystal.lattice_type, crystal.centering, crystal.resolution_limit) == ("triclinic", "P", None)
    assert [crystal.reflections.h[0], crystal.reflections.k[0], crystal.reflections.l[0]] == [1, 2, 3]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("format 2.3", "format 2.1", "not 'CrystFEL stream format 2.3'"),
        (" 580.87   14.85 ", " 580.87 ", "has 4 columns"),
        (" 100.00 ", " 1o0.00 ", "damaged"),
        ("photon_energy_eV = 12000.000000", "", "photon_energy_eV"),
        ("bstar = +0.0556216", "bstar = what", "damaged"),
        ("cstar", "star", "cstar"),
    ],
    ids=["version", "columns", "number", "no-energy", "vector", "no-vector"],
)
def test_a_damaged_stream_is_refused(tmp_path, old, new, words):
    (tmp_path / "x.stream").write_text(FOREIGN.replace(old, new))
    with pytest.raises(BadFrame, match=words):
        list(read_stream(tmp_path / "x.stream"))


def test_geometry_file_says_where_the_pixels_are():
    lines = geometry_file(HEADER, mask_path="/entry/instrument/detector/pixel_mask").splitlines()
    assert lines[1:] == [
        "photon_energy = 12000.000000 eV",
        "clen = 0.1 m",
        "adu_per_photon = 1",
        "data = /entry/data/data",
        "dim0 = %",
        "dim1 = ss",
        "dim2 = fs",
        "flag_morethan = 65533",
        "; merge with --max-adu=40000",
        "mask0_data = /entry/instrument/detector/pixel_mask",
        "mask0_goodbits = 0x0",
        "mask0_badbits = 0xffff",
        "",
        "p0/min_fs = 0",
        "p0/max_fs = 1029",
        "p0/min_ss = 0",
        "p0/max_ss = 1064",
        "p0/res = 13333.3333",
        "p0/fs = -1.000000000x +0.000000000y",
        "p0/ss = +0.000000000x -1.000000000y",
        "p0/corner_x = 517.300000",
        "p0/corner_y = 540.800000",
        "",
        "group_all = p0",
    ]


def test_geometry_file_of_two_tilted_panels():
    """Lab positions computed from the file's own text agree with the model."""
    geometry = Geometry(
        (
            Panel("left", (0.01, 0.02, 0.2), (-1e-4, 0, 0), (0, -1e-4, 0), (100, 50)),
            Panel("right", (-0.01, 0.02, 0.19), (-0.8e-4, 0, 0.6e-4), (0, -1e-4, 0), (100, 50), (0, 50)),
        ),
        1.0,
    )
    text = geometry_file(HEADER, geometry=geometry, mask_file="mask.h5", mask_path="/mask")
    assert "mask0_file = mask.h5\nmask0_data = /mask\n" in text
    assert "group_all = left,right" in text
    values = dict(line.split(" = ", 1) for line in text.splitlines() if " = " in line)
    res, clen = float(values["right/res"]), float(values["clen"].split()[0])
    fs = np.array([float(t) for t in re.findall(r"[+-][\d.]+", values["right/fs"])])
    corner = [float(values["right/corner_x"]), float(values["right/corner_y"])]
    z = clen + float(values["right/coffset"])
    at = np.array([*corner, z * res]) + 50 * fs
    np.testing.assert_allclose(at / res, geometry.lab_position(50.0, 0.0, 1), atol=1e-9)
    assert (values["right/min_fs"], values["right/max_fs"]) == ("50", "99")


def test_peaks_are_named_by_panel(tmp_path):
    geometry = Geometry(
        (
            Panel("left", (0.01, 0.02, 0.2), (-1e-4, 0, 0), (0, -1e-4, 0), (100, 50)),
            Panel("right", (0.005, 0.02, 0.2), (-1e-4, 0, 0), (0, -1e-4, 0), (100, 50), (0, 50)),
        ),
        1.0,
    )
    peaks = StreamPeaks(np.array([10.0, 60.0]), np.array([5.0, 5.0]), np.array([1.0, 1.0]))
    frame = {"frame_index": 0, "hit": True, "peaks": peaks}
    path = write(tmp_path / "a.stream", frame, geometry=geometry)
    assert re.findall(r"   (left|right)$", path.read_text(), re.MULTILINE) == ["left", "right"]
    (read,) = read_stream(path)
    expected = np.linalg.norm(geometry.scattering_vector(np.array(10.0), np.array(5.0), 1)) * 10
    assert read.peaks.q_invnm[1] == pytest.approx(expected, abs=0.0051)


def bad_reflections(**changed):
    good = make_crystal().reflections
    columns = {name: getattr(good, name) for name in good.__slots__}
    return make_crystal(reflections=StreamReflections(**(columns | changed)))


@pytest.mark.parametrize(
    ("frame", "error", "words"),
    [
        ({"peaks": StreamPeaks(np.zeros(2), np.zeros(3), np.zeros(2))}, ShapeMismatch, "frame 7: y has shape"),
        ({"peaks": StreamPeaks(np.ones(1), np.ones(1), np.ones(1), np.ones(2))}, ShapeMismatch, "q_invnm"),
        (
            {"peaks": StreamPeaks(np.array([1.0, 2000.0]), np.ones(2), np.ones(2))},
            BadFrame,
            "x 2000.00, y 1.00 px is on no",
        ),
        ({"crystals": [bad_reflections(sigma=np.array([1, np.nan, 1, 1]))]}, BadFrame, "sigma is nan in row 1"),
        (
            {"crystals": [bad_reflections(h=np.zeros(4), k=np.ones(4), l=np.ones(4))]},
            BadFrame,
            r"\(0, 1, 1\) occurs more",
        ),
        ({"crystals": [make_crystal(lattice_type="cubical")]}, BadFrame, "cubical"),
        ({"crystals": [make_crystal(centering="Z")]}, BadFrame, "centering"),
        ({"crystals": [make_crystal(unique_axis="d")]}, BadFrame, "unique_axis"),
        ({"crystals": [StreamCrystal(np.ones((3, 3)))]}, BadFrame, "independent"),
    ],
    ids=["lengths", "q", "off-panel", "nan", "twice", "lattice", "centering", "axis", "flat-cell"],
)
def test_a_bad_frame_is_refused_whole(tmp_path, frame, error, words):
    path = tmp_path / "run.stream"
    with CrystfelStreamWriter(path, HEADER, image_filename="run17.nxs") as stream:
        with pytest.raises(error, match=words):
            stream.write_frame(7, hit=True, **frame)
        stream.write_frame(8, hit=True, peaks=make_peaks())
    assert [f.frame_index for f in read_stream(path)] == [8]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"indexed_by": "magic"}, "magic"),
        ({"audit_lines": ["x" * 1100]}, "CrystFEL refuses"),
        ({"audit_lines": ["x" * 900] * 5}, "CrystFEL refuses"),
        ({"audit_lines": ["----- Begin chunk -----"]}, "reword"),
        ({"image_filename": "a\nb"}, "line break"),
    ],
    ids=["indexer", "long-line", "long-audit", "marker", "line-break"],
)
def test_what_crystfel_would_refuse_is_refused_at_once(tmp_path, options, words):
    with pytest.raises(BadFrame, match=words):
        CrystfelStreamWriter(tmp_path / "run.stream", HEADER, **({"image_filename": "run17.nxs"} | options))
    assert not list(tmp_path.iterdir())


def test_an_existing_stream_is_not_touched(tmp_path):
    (tmp_path / "run.stream").write_text("precious")
    with pytest.raises(OutputExists, match=r"run\.stream exists; choose another"):
        write(tmp_path / "run.stream")
    assert (tmp_path / "run.stream").read_text() == "precious"
    write(tmp_path / "run.stream", overwrite=True)
    assert list(read_stream(tmp_path / "run.stream")) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(StorageFull, match=r"cannot write .*check that the folder exists"):
        write(tmp_path / "absent" / "run.stream")


def test_a_full_disk_is_said():
    with pytest.raises(StorageFull, match="No space left"):
        write("/dev/full", overwrite=True)


def test_a_stream_goes_on_after_a_crash(tmp_path):
    path, frames = tmp_path / "run.stream", [{"frame_index": k, "hit": True, "peaks": make_peaks()} for k in range(3)]
    whole = write(tmp_path / "whole.stream", *frames).read_bytes()
    path.write_bytes(whole[: whole.rindex(b"End of peak list")])
    write(path, frames[2], resume=True)
    assert path.read_bytes() == whole


def test_a_stream_cut_anywhere_goes_on(tmp_path):
    path, frame = tmp_path / "run.stream", {"frame_index": 0, "hit": False}
    whole = write(tmp_path / "whole.stream", frame).read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        write(path, frame, resume=True)
        assert path.read_bytes() == whole, size


def test_a_stream_of_another_geometry_is_not_resumed(tmp_path):
    path = write(tmp_path / "run.stream", cell_text=CELL)
    with pytest.raises(BadFrame, match="another geometry, cell or command line"):
        write(path, resume=True)


@pytest.mark.parametrize(
    "header", [HEADER.model_copy(update={"detector": None}), HEADER.model_copy(update={"shape": (9,)})]
)
def test_geometry_needs_an_image_of_a_known_detector(header):
    with pytest.raises(BadFrame, match="2-D frames of a known detector"):
        geometry_file(header)
