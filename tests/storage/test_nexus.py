"""NXmx files: the detector's bytes unchanged, and readers of the field that see what went in."""

import json
import os
import re
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import fabio
import h5py
import hdf5plugin
import numpy as np
import pytest

from storage.codec import encode
from storage.errors import BadFrame, IndexConflict, OutputExists, ShapeMismatch, StorageFull
from storage.models import DetectorHeader, RunHeader, SeriesHeader, StreamHeader
from storage.nexus import DATA_PATH, MASK_PATH, Beamline, NxmxWriter
from tests.real_data import THAUMATIN

SHAPE = (64, 80)
STARTED = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)
DETECTOR = DetectorHeader(
    description="EIGER2 X 4M",
    serial_number="E-08-0101",
    pixel_size_x=75e-6,
    pixel_size_y=75e-6,
    beam_center_x=37.25,
    beam_center_y=30.5,
    detector_distance=0.123,
    incident_wavelength=1.0312,
    count_time=0.0099,
    frame_time=0.01,
    saturation_value=40000,
    flatfield_enabled=True,
)


def make_header(dtype="uint16", codec="bslz4", detector=DETECTOR, shape=SHAPE, **more):
    return StreamHeader(
        experiment="lyso-2026",
        run=17,
        data_source="eiger",
        shape=shape,
        dtype=dtype,
        codec=codec,
        detector=detector,
        **more,
    )


def make_frames(n=3, dtype="uint16"):
    return np.random.default_rng(17).poisson(3, (n, *SHAPE)).astype(dtype)


def make_mask():
    mask = np.zeros(SHAPE, np.uint32)
    mask[:, 40:42] = 1
    mask[5, 5] = 1 << 8
    mask[20, :] |= np.uint32(1 << 31)
    return mask


def compress(frame, codec):
    """A frame in a codec; lz4 by HDF5's own filter, since nobody else here writes it."""
    if codec != "lz4":
        return encode(frame, codec)
    with h5py.File("lz4", "w", driver="core", backing_store=False) as file:
        dataset = file.create_dataset("data", data=frame, chunks=frame.shape, **hdf5plugin.LZ4())
        return dataset.id.read_direct_chunk((0, 0))[1]


def export(path, frames, header=None, indices=None, **options):
    header = header or make_header()
    with NxmxWriter(path, header, **options) as writer:
        for index, frame in zip(indices or range(len(frames)), frames, strict=True):
            writer.append(index, compress(frame, header.codec), STARTED + timedelta(seconds=0.01 * index))
    return path


LAYOUTS = pytest.mark.parametrize("layout", [{}, {"frames_per_file": 2}], ids=["one-file", "series"])


@pytest.mark.parametrize("codec", ["bslz4", "lz4", "raw"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_chunks_are_the_detectors_bytes(tmp_path, codec, dtype):
    frames = make_frames(dtype=dtype)
    path = export(tmp_path / "run.nxs", frames, make_header(dtype, codec))
    with h5py.File(path) as file:
        data = file[DATA_PATH]
        assert data.chunks == (1, *SHAPE)
        for k, frame in enumerate(frames):
            assert data.id.read_direct_chunk((k, 0, 0)) == (0, compress(frame, codec))
        np.testing.assert_array_equal(data[:], frames)


def test_series_files_hold_the_detectors_bytes(tmp_path):
    frames = make_frames(5)
    export(tmp_path / "run.nxs", frames, frames_per_file=2)
    for k, frame in enumerate(frames):
        with h5py.File(tmp_path / f"run_{k // 2 + 1:06d}.h5") as file:
            assert file[DATA_PATH].id.read_direct_chunk((k % 2, 0, 0))[1] == encode(frame)
    assert len(list(tmp_path.iterdir())) == 4


@LAYOUTS
def test_holes_read_as_the_largest_value(tmp_path, layout):
    frames = make_frames(2)
    export(tmp_path / "run.nxs", frames, indices=[1, 6], stop=8, **layout)
    with h5py.File(tmp_path / "run.nxs") as file:
        assert file[DATA_PATH].shape == (8, *SHAPE)
        assert file["entry/data/frame"][:].tolist() == list(range(8))
        np.testing.assert_array_equal(file[DATA_PATH][[1, 6]], frames)
        assert (file[DATA_PATH][[0, 2, 3, 4, 5, 7]] == 65535).all()
        time = file["entry/data/time"][:]
        assert np.isnan(time[[0, 7]]).all()
        assert time[6] - time[1] == pytest.approx(0.05)


@LAYOUTS
def test_frames_may_come_in_any_order(tmp_path, layout):
    frames = make_frames(6)
    export(tmp_path / "run.nxs", frames[[4, 0, 5, 2, 1, 3]], indices=[4, 0, 5, 2, 1, 3], **layout)
    with h5py.File(tmp_path / "run.nxs") as file:
        np.testing.assert_array_equal(file[DATA_PATH][:], frames)


@LAYOUTS
def test_a_selection_keeps_the_original_frame_numbers(tmp_path, layout):
    frames = make_frames(3)
    export(tmp_path / "hits.nxs", frames, indices=[12, 99, 100], keep_holes=False, **layout)
    with h5py.File(tmp_path / "hits.nxs") as file:
        np.testing.assert_array_equal(file[DATA_PATH][:], frames)
        data = file["entry/data"]
        assert data["frame"][:].tolist() == [12, 99, 100]
        assert data.attrs["axes"].tolist() == ["frame", ".", "."]
        assert data.attrs["frame_indices"] == 0
        assert file["entry/process_1/selection/frame"] == data["frame"]


def test_a_part_of_a_run_starts_at_its_first_index(tmp_path):
    frames = make_frames(2)
    export(tmp_path / "run.nxs", frames, indices=[100, 101], start=100)
    with h5py.File(tmp_path / "run.nxs") as file:
        assert file["entry/data/frame"][:].tolist() == [100, 101]


def test_a_series_may_be_moved_and_a_lost_file_reads_as_masked(tmp_path):
    frames = make_frames(4)
    (tmp_path / "here").mkdir()
    export(tmp_path / "here" / "run.nxs", frames, frames_per_file=2)
    moved = shutil.move(tmp_path / "here", tmp_path / "there")
    with h5py.File(Path(moved) / "run.nxs") as file:
        np.testing.assert_array_equal(file[DATA_PATH][:], frames)
    (Path(moved) / "run_000002.h5").unlink()
    with h5py.File(Path(moved) / "run.nxs") as file:
        assert (file[DATA_PATH][2:] == 65535).all()


def test_virtual_pixels_are_not_masked(tmp_path):
    export(tmp_path / "run.nxs", make_frames(), pixel_mask=make_mask())
    with h5py.File(tmp_path / "run.nxs") as file:
        mask = file[MASK_PATH]
        np.testing.assert_array_equal(mask[:], make_mask() & 0x7FFFFFFF)
        assert mask.dtype == np.uint32
        assert mask.attrs["virtual_pixels"] == SHAPE[1]


def test_times_are_utc_with_z(tmp_path):
    run = RunHeader(
        experiment="lyso-2026", run=17, started_at=STARTED.astimezone(timezone(timedelta(hours=2))), sample="lysozyme"
    )
    header = make_header(planned=1000)
    export(tmp_path / "run.nxs", make_frames(), header, run_header=run)
    with h5py.File(tmp_path / "run.nxs") as file:
        entry = file["entry"]
        assert entry["start_time"][()] == b"2026-03-04T05:06:07.000000Z"
        assert entry["end_time"][()] == b"2026-03-04T05:06:07.020000Z"
        assert entry["end_time_estimated"][()] == b"2026-03-04T05:06:17.000000Z"
        assert entry["sample/name"][()] == b"lysozyme"


def test_end_time_is_left_out_when_nobody_observed_it(tmp_path):
    armed = SeriesHeader(series_id=3, series_unique_id="abc", arm_date=STARTED, number_of_images=200)
    with NxmxWriter(tmp_path / "run.nxs", make_header(series=armed)) as writer:
        writer.append(0, encode(make_frames()[0]))
    with h5py.File(tmp_path / "run.nxs") as file:
        assert "end_time" not in file["entry"]
        assert file["entry/start_time"].attrs["known_from"] == "arm of the detector"
        assert file["entry/end_time_estimated"][()] == b"2026-03-04T05:06:09.000000Z"


def test_processes_stand_in_order_and_end_with_the_export(tmp_path):
    with NxmxWriter(tmp_path / "run.nxs", make_header()) as writer:
        writer.append(0, encode(make_frames()[0]))
        writer.add_process("find_peaks", "1.2", STARTED, {"threshold": 15, "min_snr": 5.0})
        writer.add_process("index", "0.3", "2026-03-04T06:00:00Z", {"cell": [58.4, 58.4, 152.3, 90, 90, 90]})
    with h5py.File(tmp_path / "run.nxs") as file:
        steps = [file[f"entry/process_{k}"] for k in (1, 2, 3)]
        assert [s["program"][()] for s in steps] == [b"find_peaks", b"index", b"nearline"]
        assert [int(s["sequence_index"][()]) for s in steps] == [1, 2, 3]
        assert json.loads(steps[0]["parameters/data"][()]) == {"threshold": 15, "min_snr": 5.0}
        exported = json.loads(steps[2]["parameters/data"][()])
        assert StreamHeader.model_validate(exported["stream"]) == make_header()


def test_a_failed_export_leaves_nothing_and_spares_the_old_file(tmp_path):
    frames = make_frames(4)
    export(tmp_path / "run.nxs", frames)
    before = (tmp_path / "run.nxs").read_bytes()
    with pytest.raises(BadFrame, match="shorter than"):
        export_then_fail(tmp_path / "run.nxs", frames)
    assert [p.name for p in tmp_path.iterdir()] == ["run.nxs"]
    assert (tmp_path / "run.nxs").read_bytes() == before


def export_then_fail(path, frames):
    with NxmxWriter(path, make_header(), overwrite=True, frames_per_file=2) as writer:
        writer.append(0, encode(frames[0]))
        writer.append(3, encode(frames[3]))
        writer.append(1, b"")


@LAYOUTS
def test_nothing_stands_under_a_final_name_before_close(tmp_path, layout):
    writer = NxmxWriter(tmp_path / "run.nxs", make_header(), **layout)
    writer.append(0, encode(make_frames()[0]))
    assert all(p.suffix == ".part" for p in tmp_path.iterdir())
    writer.close()
    writer.close()
    assert not list(tmp_path.glob("*.part"))


def test_overwrite_replaces(tmp_path):
    export(tmp_path / "run.nxs", make_frames(2))
    export(tmp_path / "run.nxs", make_frames(3), overwrite=True)
    with h5py.File(tmp_path / "run.nxs") as file:
        assert len(file[DATA_PATH]) == 3


@pytest.mark.parametrize("existing", ["run.nxs", "run_000001.h5"], ids=["master", "data-file"])
def test_an_existing_file_is_not_touched(tmp_path, existing):
    (tmp_path / existing).write_bytes(b"precious")
    with pytest.raises(OutputExists, match=rf"{existing} exists; choose another"):
        export(tmp_path / "run.nxs", make_frames(1), frames_per_file=2)
    assert [p.name for p in tmp_path.iterdir()] == [existing]
    assert (tmp_path / existing).read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("index", "blob", "error", "words"),
    [
        (1, encode(np.zeros((64, 79), np.uint16)), BadFrame, "frame 1 of eiger: .*declares 10112"),
        (1, encode(np.zeros(SHAPE, np.uint32)), BadFrame, "declares 20480"),
        (1, encode(make_frames()[0])[:-5], BadFrame, "cut"),
        (1, b"", BadFrame, "shorter than"),
        (0, encode(make_frames()[0]), IndexConflict, "already written"),
        (-1, encode(make_frames()[0]), BadFrame, "outside the exported range"),
        (10, encode(make_frames()[0]), BadFrame, "outside the exported range"),
    ],
    ids=["shape", "dtype", "cut", "empty", "twice", "negative", "behind-stop"],
)
def test_a_bad_frame_is_refused_and_the_file_goes_on(tmp_path, index, blob, error, words):
    frames = make_frames(2)
    with NxmxWriter(tmp_path / "run.nxs", make_header(), stop=10) as writer:
        writer.append(0, encode(frames[0]))
        with pytest.raises(error, match=words):
            writer.append(index, blob)
        writer.append(1, encode(frames[1]))
    with h5py.File(tmp_path / "run.nxs") as file:
        np.testing.assert_array_equal(file[DATA_PATH][:2], frames)


def test_a_selection_must_rise(tmp_path):
    with NxmxWriter(tmp_path / "run.nxs", make_header(), keep_holes=False) as writer:
        writer.append(7, encode(make_frames()[0]))
        with pytest.raises(BadFrame, match="rising"):
            writer.append(3, encode(make_frames()[1]))


@pytest.mark.parametrize(
    ("header", "options", "error", "words"),
    [
        (make_header(dtype="float32"), {}, BadFrame, "float32"),
        (make_header(shape=(100,)), {}, BadFrame, "2-D"),
        (make_header(detector=None), {}, BadFrame, "no detector header"),
        (make_header(detector=DetectorHeader()), {}, BadFrame, "geometry is unknown"),
        (make_header(), {"pixel_mask": np.zeros((80, 64), np.uint32)}, ShapeMismatch, "pixel_mask has shape"),
        (make_header(), {"frames_per_file": 0}, BadFrame, "frames_per_file is 0"),
    ],
    ids=["float", "1-D", "no-detector", "no-distance", "mask-turned", "no-frames-per-file"],
)
def test_a_stream_that_is_no_nxmx_is_refused_at_once(tmp_path, header, options, error, words):
    with pytest.raises(error, match=words):
        NxmxWriter(tmp_path / "run.nxs", header, **options)
    assert not list(tmp_path.iterdir())


def test_no_frame_is_an_error(tmp_path):
    with pytest.raises(BadFrame, match="no frame was appended"), NxmxWriter(tmp_path / "run.nxs", make_header()):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["absent", "a-file", "read-only"])
def test_a_folder_that_cannot_be_written_is_named(tmp_path, folder):
    target = tmp_path / folder
    if folder == "a-file":
        target.write_text("")
    if folder == "read-only":
        target.mkdir(mode=0o500)
        if os.access(target, os.W_OK):
            pytest.skip("this user may write everywhere")
    with pytest.raises(StorageFull, match=r"cannot write .*run\.nxs.*check that the folder exists"):
        NxmxWriter(target / "run.nxs", make_header())


# A file size limit stands for a full disk; in a process of its own, as it cannot be raised again.
FULL_DISK = """
import resource, sys
import numpy as np
from storage.errors import StorageFull
from storage.models import StreamHeader
from storage.nexus import NxmxWriter
header = StreamHeader.model_validate_json(sys.argv[2])
frame = np.zeros(header.shape, header.dtype).tobytes()
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    with NxmxWriter(sys.argv[1], header, frames_per_file=int(sys.argv[3]) or None) as writer:
        for k in range(50):
            writer.append(k, frame)
except StorageFull as error:
    print(error)
"""


@pytest.mark.parametrize("per_file", ["0", "40"], ids=["one-file", "series"])
def test_a_full_disk_is_said_and_nothing_is_left(tmp_path, per_file):
    header = make_header(codec="raw").model_dump_json()
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, tmp_path / "run.nxs", header, per_file],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    assert "run.nxs" in done.stdout
    assert "has free space" in done.stdout
    assert not list(tmp_path.iterdir())


# What the field's readers say.


@LAYOUTS
def test_the_nxmx_package_parses_it(tmp_path, layout):
    nxmx = pytest.importorskip("nxmx", reason="nxmx is not installed")
    place = Beamline(source="Diamond Light Source", instrument="I24", time_zone="+01:00", beam_size=(7e-6, 7e-6))
    export(tmp_path / "run.nxs", make_frames(), pixel_mask=make_mask(), beamline=place, **layout)
    with h5py.File(tmp_path / "run.nxs") as file:
        (entry,) = nxmx.NXmx(file).entries
        instrument, sample = entry.instruments[0], entry.samples[0]
        detector, beam = instrument.detectors[0], instrument.beams[0]
        assert entry.source.name == "Diamond Light Source"
        assert instrument.name == "I24"
        assert sample.depends_on is None
        assert entry.start_time == STARTED
        assert beam.incident_wavelength.to("angstrom").magnitude == pytest.approx(1.0312)
        assert detector.sensor_material == "Si"
        assert detector.frame_time.to("s").magnitude == pytest.approx(0.01)
        assert (detector.saturation_value, detector.underload_value, detector.bit_depth_readout) == (40000, 0, 16)
        assert detector["flatfield_applied"][()]
        (module,) = detector.modules
        assert module.data_size.tolist() == list(SHAPE)
        chain = nxmx.get_dependency_chain(module.fast_pixel_direction)
        assert [axis.path.rsplit("/", 1)[1] for axis in chain] == ["fast_pixel_direction", "module_offset", "det_z"]
        corner = nxmx.get_cumulative_transformation(chain[1:])[0, :3, 3]
        np.testing.assert_allclose(corner, [37.25 * 0.075, 30.5 * 0.075, 123.0])
        assert entry.data[0].signal == "data"


@LAYOUTS
def test_fabio_opens_it(tmp_path, layout):
    frames = make_frames()
    path = export(tmp_path / "run.h5", frames, **layout)
    with fabio.open(str(path)) as image:
        assert image.nframes == len(frames)
        for k, frame in enumerate(frames):
            np.testing.assert_array_equal(image.getframe(k).data, frame)
    with fabio.open(f"{path}::{DATA_PATH}") as image:
        np.testing.assert_array_equal(image.data, frames[0])


@LAYOUTS
def test_nxvalidate_finds_no_error(tmp_path, layout):
    pytest.importorskip("nexusformat", reason="nexusformat is not installed")
    path = tmp_path / "run.nxs"
    with NxmxWriter(
        path,
        make_header(),
        pixel_mask=make_mask(),
        flatfield=np.ones(SHAPE),
        beamline=Beamline(time_zone="+01:00"),
        **layout,
    ) as writer:
        writer.append(0, encode(make_frames()[0]), STARTED)
        writer.append(2, encode(make_frames()[2]), STARTED)
        writer.add_process("find_peaks", "1.2", STARTED, {"threshold": 15})
    said = nxvalidate(path)
    assert "Application Definition: NXmx" in said
    assert "Total number of errors: 0" in said, said


def test_nxvalidate_would_notice_an_error(tmp_path):
    pytest.importorskip("nexusformat", reason="nexusformat is not installed")
    export(tmp_path / "run.nxs", make_frames())
    with h5py.File(tmp_path / "run.nxs", "r+") as file:
        del file["entry/instrument/beam/incident_wavelength"]
    assert "Total number of errors: 0" not in nxvalidate(tmp_path / "run.nxs")


def nxvalidate(path):
    done = subprocess.run(
        [sys.executable, "-m", "nexusformat.scripts.nxvalidate", "-e", path], capture_output=True, text=True, check=True
    )
    return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)


needs_dials = pytest.mark.skipif(shutil.which("dials.import") is None, reason="dials.import is not on PATH")

# Run by DIALS' own Python: geometry, mask and pixels as dxtbx sees them.
DXTBX = """
import json, sys
import numpy as np
from dxtbx import flumpy
from dxtbx.model.experiment_list import ExperimentListFactory
experiments = ExperimentListFactory.from_filenames([sys.argv[1]])
imageset = experiments.imagesets()[0]
panel, beam = imageset.get_detector()[0], imageset.get_beam()
np.savez(sys.argv[2], mask=flumpy.to_numpy(imageset.get_mask(0)[0]),
         pixels=np.stack([flumpy.to_numpy(e.imageset.get_raw_data(0)[0]) for e in experiments]))
print(json.dumps({
    "distance": panel.get_distance(), "beam_center": panel.get_beam_centre_px(beam.get_s0()),
    "wavelength": beam.get_wavelength(), "pixel_size": panel.get_pixel_size(), "image_size": panel.get_image_size(),
    "trusted": panel.get_trusted_range(), "thickness": panel.get_thickness(), "material": panel.get_material(),
    "fast": panel.get_fast_axis(), "slow": panel.get_slow_axis(), "experiments": len(experiments),
    "goniometer": imageset.get_goniometer() is not None, "scan": imageset.get_scan() is not None}))
"""


def dials(*command, cwd):
    # Debian's h5py has no bitshuffle filter: it takes hdf5plugin's. What belongs to our own
    # interpreter must not reach theirs.
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "VIRTUAL_ENV"))}
    environment = clean | {"HDF5_PLUGIN_PATH": hdf5plugin.PLUGIN_PATH}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def seen_by_dxtbx(path, folder):
    shebang = Path(shutil.which("dials.import")).read_text().splitlines()[0]
    out = folder / f"{path.name}.npz"
    printed = dials(shebang.removeprefix("#!").split()[0], "-c", DXTBX, path, out, cwd=folder)
    return json.loads(printed.splitlines()[-1]), np.load(out)


def strong_pixels(path, folder):
    dials("dials.import", path, f"output.experiments={path.stem}.expt", cwd=folder)
    said = dials("dials.find_spots", f"{path.stem}.expt", "nproc=1", f"output.reflections={path.stem}.refl", cwd=folder)
    return re.findall(r"Found (\d+) strong pixels", said), re.findall(r"Extracted (\d+) spots", said)


@pytest.mark.dials
@needs_dials
@LAYOUTS
def test_dials_sees_the_same_pixels_and_geometry(tmp_path, layout):
    frames = make_frames()
    path = export(tmp_path / "run.nxs", frames[[0, 2]], indices=[0, 2], pixel_mask=make_mask(), **layout)
    seen, arrays = seen_by_dxtbx(path, tmp_path)
    assert seen["distance"] == pytest.approx(123.0)
    assert seen["beam_center"] == pytest.approx([37.25, 30.5])
    assert seen["wavelength"] == pytest.approx(1.0312)
    assert seen["pixel_size"] == pytest.approx([0.075, 0.075])
    assert seen["image_size"] == [80, 64]
    assert seen["trusted"] == [-1, 40000]
    assert (seen["material"], seen["thickness"]) == ("Si", pytest.approx(0.45))
    assert (seen["fast"], seen["slow"]) == ([1, 0, 0], [0, -1, 0])
    assert (seen["experiments"], seen["goniometer"], seen["scan"]) == (3, False, False)
    np.testing.assert_array_equal(arrays["pixels"][[0, 2]], frames[[0, 2]])
    assert (arrays["pixels"][1] == -1).all()
    np.testing.assert_array_equal(arrays["mask"], (make_mask() & 0x7FFFFFFF == 0) & (frames[0] >= 0))


@pytest.fixture
def still():
    path = THAUMATIN / "thau_3_2_0014.cbf.bz2"
    if not path.exists():
        pytest.skip(f"real data is absent: {path}; set NEARLINE_TEST_DATA to the folder that has it")
    return path


def export_still(cbf, path, **layout):
    """A Pilatus frame through uint32: the detector's -1 and -2 wrap to the two largest values."""
    with fabio.open(str(cbf)) as image:
        pixels = image.data
    detector = DetectorHeader(
        description="PILATUS3 6M",
        pixel_size_x=172e-6,
        pixel_size_y=172e-6,
        sensor_thickness=0.00045,
        beam_center_x=1261.61,
        beam_center_y=1306.96,
        detector_distance=0.351,
        incident_wavelength=0.96859,
        count_time=0.019,
        frame_time=0.02,
        saturation_value=115897,
    )
    header = make_header("uint32", detector=detector, shape=pixels.shape)
    export(path, [pixels.astype(np.uint32)], header, pixel_mask=(pixels < 0).astype(np.uint32), **layout)
    return pixels


@LAYOUTS
def test_fabio_reads_a_real_still_back(tmp_path, still, layout):
    pixels = export_still(still, tmp_path / "still.h5", **layout)
    with fabio.open(str(tmp_path / "still.h5")) as image:
        np.testing.assert_array_equal(image.data.astype(np.int32), pixels)


@pytest.mark.dials
@needs_dials
def test_dials_finds_the_same_spots_as_in_the_cbf(tmp_path, still):
    nexus = tmp_path / "still.nxs"
    export_still(still, nexus)
    ours, our_arrays = seen_by_dxtbx(nexus, tmp_path)
    theirs, their_arrays = seen_by_dxtbx(still, tmp_path)
    for quantity in (
        "distance",
        "beam_center",
        "wavelength",
        "pixel_size",
        "image_size",
        "trusted",
        "thickness",
        "fast",
        "slow",
    ):
        assert ours[quantity] == pytest.approx(theirs[quantity], rel=1e-6, abs=1e-9), quantity
    good = their_arrays["pixels"] >= 0
    np.testing.assert_array_equal(our_arrays["pixels"][good], their_arrays["pixels"][good])
    assert (our_arrays["pixels"][~good] < 0).all()
    np.testing.assert_array_equal(our_arrays["mask"], their_arrays["mask"])
    found = strong_pixels(nexus, tmp_path)
    assert found == strong_pixels(still, tmp_path)
    assert int(found[0][0]) > 1000
