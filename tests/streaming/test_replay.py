"""Recorded files become the same frames again, with their header, mask and origin."""

import bz2
import gzip
import shutil
import threading
from pathlib import Path

import fabio
import h5py
import hdf5plugin
import numpy as np
import pytest
from blake3 import blake3

from storage.codec import decode, encode
from storage.errors import BadFrame, RunNotFound, ShapeMismatch
from streaming.replay import parse_cbf_header, read_files, replay
from streaming.simulator import SenderSettings
from tests.real_data import THAUMATIN, needs_thaumatin

from .dectris_client import Receiver

SHAPE = (24, 40)
BSLZ4 = dict(hdf5plugin.Bitshuffle(cname="lz4"))
CBF_TEXT = """# Detector: PILATUS3 6M, S/N 60-0119
# 2019-09-11T13:20:29.091
# Pixel_size 172e-6 m x 172e-6 m
# Silicon sensor, thickness 0.000450 m
# Exposure_time 0.0190000 s
# Exposure_period 0.0200000 s
# Tau = 0 s
# Count_cutoff 115897 counts
# Threshold_setting: 6400 eV
# Wavelength 0.96859 A
# Energy_range (0, 0) eV
# Detector_distance 0.35100 m
# Beam_xy (1261.61, 1306.96) pixels
"""


def counts(n: int, dtype: str = "uint16", shape: tuple[int, int] = SHAPE) -> np.ndarray:
    return np.random.default_rng(4).integers(0, 250, (n, *shape)).astype(dtype)


def sent_by(paths, settings=None, n_series=1, **options) -> list[dict]:
    """Messages an independent client gets from replay()."""
    receivers: list[Receiver] = []
    settings = settings or SenderSettings(bind="tcp://127.0.0.1:*", receiver_timeout=20)
    replay(paths, settings, on_bound=lambda endpoint: receivers.append(Receiver(endpoint, n_series)), **options)
    return receivers[0].messages()


# ---- miniCBF


def write_cbf(path: Path, pixels: np.ndarray, text: str = CBF_TEXT) -> Path:
    """A miniCBF file, compressed as its name says."""
    plain = path.with_name(path.name.partition(".cbf")[0] + ".cbf")
    header = {"_array_data.header_convention": '"PILATUS_1.2"', "_array_data.header_contents": text}
    fabio.cbfimage.CbfImage(data=pixels, header=header).write(str(plain))
    if plain != path:
        opener = {".gz": gzip.open, ".bz2": bz2.open}[path.suffix]
        with plain.open("rb") as source, opener(path, "wb") as target:
            shutil.copyfileobj(source, target)
        plain.unlink()
    return path


@pytest.fixture
def cbf_folder(tmp_path) -> Path:
    """Three frames whose numbers and names sort differently, in three compressions."""
    for number, ending, pixels in zip((9, 10, 11), (".cbf.bz2", ".cbf", ".cbf.gz"), cbf_counts(), strict=True):
        write_cbf(tmp_path / f"scan_1_{number}{ending}", pixels)
    (tmp_path / "notes.txt").write_text("not an image")
    return tmp_path


def cbf_counts() -> np.ndarray:
    pixels = counts(3, "int32") * 300
    pixels[:, 5] = -1
    pixels[:, 7, 3] = -2
    return pixels


def test_cbf_files_keep_counts_order_and_origin(cbf_folder):
    with read_files(cbf_folder) as series:
        assert (series.shape, series.dtype, series.n_images, series.codec) == (SHAPE, "uint32", 3, "bslz4")
        frames = list(series)
    names = ["scan_1_9.cbf.bz2", "scan_1_10.cbf", "scan_1_11.cbf.gz"]
    assert [frame.user_data["source_file"] for frame in frames] == names
    for frame, pixels in zip(frames, cbf_counts(), strict=True):
        received = decode(frame.blob, SHAPE, "uint32")
        assert np.array_equal(received[pixels >= 0], pixels[pixels >= 0])
        assert (received[pixels < 0] == 2**32 - 1).all()
        digest = blake3((cbf_folder / frame.user_data["source_file"]).read_bytes()).hexdigest()
        assert frame.user_data["source_digest"] == f"blake3:{digest}"
        assert "Detector_distance 0.35100 m" in frame.user_data["cbf_header"]


def test_cbf_markers_become_mask_bits(cbf_folder):
    mask = read_files(cbf_folder / "*.cbf*").pixel_mask
    assert mask.dtype == np.uint32
    assert (mask[5] == 1).all()
    assert mask[7, 3] == 2
    assert np.count_nonzero(mask) == SHAPE[1] + 1


def test_cbf_header_becomes_ours(cbf_folder):
    header = read_files(str(cbf_folder)).header
    assert (header.description, header.serial_number) == ("PILATUS3 6M", "60-0119")
    assert (header.beam_center_x, header.beam_center_y) == (1261.61, 1306.96)
    assert (header.detector_distance, header.incident_wavelength) == (0.351, 0.96859)
    assert header.incident_energy == pytest.approx(12800.5, abs=0.1)
    assert (header.count_time, header.frame_time) == (0.019, 0.02)
    assert (header.pixel_size_x, header.sensor_thickness, header.sensor_material) == (172e-6, 0.00045, "Si")
    assert (header.saturation_value, header.threshold_energy) == (115897, 6400)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("# Detector: EIGER 16M XR4i S/N 160-0001 Diamond", "serial_number", "160-0001 Diamond"),
        ("# Detector: EIGER 16M XR4i S/N 160-0001 Diamond", "description", "EIGER 16M XR4i"),
        ("# Threshold_setting 9000 eV", "threshold_energy", 9000),
        ("# Threshold_setting = 9000 eV", "threshold_energy", 9000),
        ("# CdTe sensor, thickness 0.001 m", "sensor_material", "CdTe"),
        ("# Detector_distance -0.2 m", "detector_distance", 0.2),
        ("# Wavelength 9.8e-1 A", "incident_wavelength", 0.98),
        ("# Wavelength 0 A", "incident_energy", 0.0),
        ("Beam_xy (10, 20.5) pixels", "beam_center_y", 20.5),
        ("", "pixel_size_x", 172e-6),
        ("# Some_new_key 3 m", "detector_distance", 0.0),
    ],
)
def test_cbf_header_lines(line, name, value):
    assert getattr(parse_cbf_header(line), name) == value


def test_header_values_can_be_overridden(cbf_folder):
    header = read_files(cbf_folder, detector_distance=0.2, beam_center_x=7.0, incident_wavelength=1.0).header
    assert (header.detector_distance, header.beam_center_x, header.incident_wavelength) == (0.2, 7.0, 1.0)
    assert header.incident_energy == pytest.approx(12398.42, abs=0.01)
    assert read_files(cbf_folder, incident_energy=12398.42).header.incident_wavelength == pytest.approx(1.0, abs=1e-6)
    assert read_files(cbf_folder, detector_distance=None).header.detector_distance == 0.351
    with pytest.raises(BadFrame, match=r"no .*field clen"):
        read_files(cbf_folder, clen=0.1)


@pytest.mark.parametrize("preload", [False, True])
def test_replay_sends_cbf_files_as_a_series(cbf_folder, preload):
    settings = SenderSettings(
        bind="tcp://127.0.0.1:*", repeat=2, experiment="thau", run=3, series_id=10, receiver_timeout=20
    )
    stages: set[str] = set()
    options = {"preload": preload, "overrides": {"detector_distance": 0.2}}
    messages = sent_by(cbf_folder, settings, 2, progress=lambda stage, done, total: stages.add(stage), **options)
    assert [m["type"] for m in messages] == (["start"] + ["image"] * 3 + ["end"]) * 2
    start = messages[5]
    assert start["series_id"] == 11
    assert dict(start["user_data"]["nearline"]) == {"experiment": "thau", "run": 4, "sample": None}
    assert start["user_data"]["source"]["transcoded"]
    assert start["detector_translation"][2] == -0.2
    assert np.array_equal(start["pixel_mask"]["threshold_1"], read_files(cbf_folder).pixel_mask)
    for message, pixels in zip(messages[6:9], cbf_counts(), strict=True):
        received = message["data"]["threshold_1"]
        assert np.array_equal(np.where(pixels < 0, np.uint32(2**32 - 1), pixels), received)
        assert message["user_data"]["source_file"].startswith("scan_1_")
    assert ("reading frames" in stages) == preload


def test_stop_ends_the_series_early(cbf_folder):
    stop = threading.Event()
    messages = sent_by(cbf_folder, stop=stop, progress=lambda stage, done, total: stop.set())
    assert [m["type"] for m in messages] == ["start", "image", "end"]


@needs_thaumatin
def test_thaumatin_stills_keep_fabios_values():
    messages = sent_by(THAUMATIN, preload=True)
    start, images = messages[0], messages[1:-1]
    assert (start["image_size_y"], start["image_size_x"]) == (2527, 2463)
    assert (start["beam_center_x"], start["beam_center_y"]) == (1261.61, 1306.96)
    with fabio.open(str(THAUMATIN / "thau_3_2_0005.cbf.bz2")) as first:
        assert np.array_equal(start["pixel_mask"]["threshold_1"], -np.minimum(first.data, 0))
    assert [m["user_data"]["source_file"][9:13] for m in images] == ["0005", "0011", "0014", "0016"]
    for message in images[::3]:
        with fabio.open(str(THAUMATIN / message["user_data"]["source_file"])) as original:
            expected = np.where(original.data < 0, np.uint32(2**32 - 1), original.data)
        assert np.array_equal(message["data"]["threshold_1"], expected)


# ---- HDF5


def write_master(path: Path, pixels: np.ndarray | None = None, **storage) -> Path:
    """An NXmx master; chunks of one frame, bitshuffle + LZ4, unless told otherwise."""
    with h5py.File(path, "w") as file:
        entry = file.create_group("entry")
        if pixels is not None:
            options = {"chunks": (1,) * (pixels.ndim - 2) + SHAPE, **BSLZ4} | storage
            entry.create_dataset("data/data", data=pixels, **options)
        detector = entry.create_group("instrument/detector")
        fields = {
            "description": ("EIGER2 4M", None),
            "sensor_material": (b"Silicon", None),
            "sensor_thickness": (450, "um"),
            "x_pixel_size": (75e-6, "m"),
            "y_pixel_size": (75e-6, "m"),
            "beam_center_x": (20.5, "pixel"),
            "beam_center_y": (12.25, "pixel"),
            "distance": ([150.0], "mm"),
            "count_time": (9.9, "ms"),
            "frame_time": (0.01, "s"),
            "saturation_value": (30000, None),
            "pixel_mask_applied": (1, None),
        }
        for name, (value, unit) in fields.items():
            detector[name] = value
            if unit:
                detector[name].attrs["units"] = unit
        detector["pixel_mask"] = np.eye(*SHAPE, dtype=np.uint32)
        entry["instrument/beam/incident_wavelength"] = 0.1
        entry["instrument/beam/incident_wavelength"].attrs["units"] = "nm"
    return path


def pixels_of(series) -> list[np.ndarray]:
    return [decode(frame.blob, series.shape, series.dtype, series.codec) for frame in series]


def test_bslz4_chunks_pass_through_untouched(tmp_path):
    pixels = counts(4)
    with read_files(write_master(tmp_path / "a.h5", pixels)) as series:
        frames = list(series)
    assert all(isinstance(frame.data, bytes) for frame in frames)
    assert [frame.data for frame in frames] == [encode(image) for image in pixels]
    assert frames[2].user_data == {"source_file": "a.h5", "source_frame": 2}
    assert not series.source["transcoded"]


def test_nxmx_header_becomes_ours(tmp_path):
    with read_files(write_master(tmp_path / "a.h5", counts(1))) as series:
        header = series.header
        assert np.array_equal(series.pixel_mask, np.eye(*SHAPE))
    assert (header.description, header.sensor_material) == ("EIGER2 4M", "Si")
    assert (header.detector_distance, header.incident_wavelength) == (pytest.approx(0.15), pytest.approx(1.0))
    assert (header.beam_center_x, header.beam_center_y) == (20.5, 12.25)
    assert (header.sensor_thickness, header.count_time) == (pytest.approx(0.00045), pytest.approx(0.0099))
    assert (header.saturation_value, header.pixel_mask_enabled, header.flatfield_enabled) == (30000, True, None)


def test_geometry_of_a_file_without_legacy_fields(tmp_path):
    path = write_master(tmp_path / "a.h5", counts(1))
    with h5py.File(path, "a") as file:
        detector = file["entry/instrument/detector"]
        for name in ("beam_center_x", "beam_center_y", "distance"):
            del detector[name]
        detector["module/fast_pixel_direction"] = 75e-6
        detector["module/fast_pixel_direction"].attrs["vector"] = (-1, 0, 0)
        detector["module/module_offset"] = 0.0
        detector["module/module_offset"].attrs.update(
            {"offset": (20.5 * 0.075, 12.25 * 0.075, 0), "offset_units": "mm"}
        )
        detector["transformations/det_z"] = [150.0]
        detector["transformations/det_z"].attrs["units"] = "mm"
    with read_files(path) as series:
        header = series.header
    assert (header.beam_center_x, header.beam_center_y) == (pytest.approx(20.5), pytest.approx(12.25))
    assert header.detector_distance == pytest.approx(0.15)


STORAGES = {
    "gzip": ("uint16", {"compression": "gzip", "compression_opts": 1}),
    "not compressed": ("uint16", {"chunks": None, "compression": None, "compression_opts": None}),
    "several frames in a chunk": ("uint32", {"chunks": (2, *SHAPE)}),
    "tiles": ("uint8", {"chunks": (1, 12, 20)}),
    "big-endian": (">u2", {}),
    "signed": ("int32", {}),
    "64 bits": ("uint64", {}),
    "bitshuffle with zstd": ("uint16", dict(hdf5plugin.Bitshuffle(cname="zstd"))),
}


@pytest.mark.parametrize(("dtype", "storage"), STORAGES.values(), ids=STORAGES)
def test_other_storages_are_decoded_and_declared(tmp_path, dtype, storage):
    pixels = counts(3, dtype)
    if np.dtype(dtype).kind == "i":
        pixels[:, 0] = -1
    with read_files(write_master(tmp_path / "a.h5", pixels, **storage)) as series:
        assert series.source["transcoded"]
        assert series.codec == "bslz4"
        found = np.array(pixels_of(series))
    assert series.dtype == {"int32": "uint32", "uint64": "uint32", ">u2": "uint16"}.get(dtype, dtype)
    assert np.array_equal(
        found, np.where(pixels < 0, found.dtype.type(-1 % 2**32), pixels) if dtype == "int32" else pixels
    )


def test_lz4_chunks_pass_through_as_lz4(tmp_path):
    pixels = counts(3)
    path = write_master(tmp_path / "a.h5", pixels, **hdf5plugin.LZ4())
    with read_files(path) as series:
        assert series.codec == "lz4"
        assert np.array_equal(pixels_of(series), pixels)
    assert np.array_equal([m["data"]["threshold_1"] for m in sent_by(path)[1:-1]], pixels)


@pytest.fixture(params=["links", "virtual", "virtual 4-D"])
def split_master(request, tmp_path) -> Path:
    """A master over two data files of 2 and 3 frames, in each layout in use."""
    pixels = counts(5)
    if request.param == "virtual 4-D":
        pixels = pixels[:, None]
    for name, part in (("a_data_000001.h5", pixels[:2]), ("a_data_000002.h5", pixels[2:])):
        write_master(tmp_path / name, part)
    master = write_master(tmp_path / "a_master.h5")
    with h5py.File(master, "a") as file:
        if request.param == "links":
            for i in (1, 2):
                file[f"entry/data/data_{i:06d}"] = h5py.ExternalLink(f"a_data_{i:06d}.h5", "/entry/data/data")
        else:
            layout = h5py.VirtualLayout(pixels.shape, pixels.dtype)
            layout[:2] = h5py.VirtualSource("a_data_000001.h5", "entry/data/data", pixels[:2].shape)
            layout[2:] = h5py.VirtualSource("a_data_000002.h5", "entry/data/data", pixels[2:].shape)
            file["entry"].require_group("data").create_virtual_dataset("data", layout, fillvalue=65535)
    return master


def test_masters_of_every_layout_pass_chunks_through(split_master):
    with read_files(split_master) as series:
        frames = list(series)
    assert [frame.data for frame in frames] == [encode(image) for image in counts(5)]
    assert [frame.user_data["source_frame"] for frame in frames] == [0, 1, 0, 1, 2]


def test_a_folder_is_read_through_its_master(split_master):
    with read_files(split_master.parent) as series:
        assert series.n_images == 5


def test_replay_sends_a_master_as_a_series(split_master):
    messages = sent_by(split_master)
    assert [m["image_id"] for m in messages[1:-1]] == [0, 1, 2, 3, 4]
    assert np.array_equal([m["data"]["threshold_1"] for m in messages[1:-1]], counts(5))
    assert messages[0]["number_of_images"] == 5


def test_a_missing_data_file_is_named(split_master):
    (split_master.parent / "a_data_000002.h5").unlink()
    with pytest.raises(RunNotFound, match=r"a_data_000002\.h5"):
        read_files(split_master)


def test_frames_never_written_are_left_out_not_made_up(tmp_path):
    path = write_master(tmp_path / "a.h5", counts(5))
    with h5py.File(path, "a") as file:
        del file["entry/data/data"]
        dataset = file["entry/data"].create_dataset("data", (5, *SHAPE), "u2", chunks=(1, *SHAPE), **BSLZ4)
        dataset[0], dataset[3] = counts(2)
    messages = sent_by(path)
    assert messages[0]["number_of_images"] == 5
    assert [m["image_id"] for m in messages[1:-1]] == [0, 3]


def test_a_virtual_set_of_half_frames_is_put_together(tmp_path):
    pixels = counts(3)
    for name, half in (("top.h5", pixels[:, :12]), ("bottom.h5", pixels[:, 12:])):
        with h5py.File(tmp_path / name, "w") as file:
            file["data"] = half
    master = write_master(tmp_path / "a_master.h5")
    with h5py.File(master, "a") as file:
        layout = h5py.VirtualLayout(pixels.shape, pixels.dtype)
        layout[:, :12] = h5py.VirtualSource("top.h5", "data", (3, 12, 40))
        layout[:, 12:] = h5py.VirtualSource("bottom.h5", "data", (3, 12, 40))
        file["entry"].require_group("data").create_virtual_dataset("data", layout)
    with read_files(master) as series:
        assert np.array_equal(pixels_of(series), pixels)


def test_a_channel_must_be_chosen_where_there_are_two(tmp_path):
    pixels = counts(6).reshape(3, 2, *SHAPE)
    path = write_master(tmp_path / "a.h5", pixels)
    with pytest.raises(BadFrame, match="2 channels"):
        read_files(path)
    with read_files(path, channel=1) as series:
        assert np.array_equal(pixels_of(series), pixels[:, 1])
    with pytest.raises(BadFrame, match="channel 2"):
        read_files(path, channel=2)


# ---- what cannot be replayed


def not_cbf(folder: Path) -> list[Path]:
    (folder / "x.cbf").write_bytes(b"\x00" * 100)
    return [folder / "x.cbf"]


def not_hdf5(folder: Path) -> list[Path]:
    (folder / "x.h5").write_bytes(b"\x00" * 100)
    return [folder / "x.h5"]


def other_format(folder: Path) -> list[Path]:
    (folder / "x.tif").write_bytes(b"II")
    return [folder / "x.tif"]


def no_images(folder: Path) -> list[Path]:
    return [write_master(folder / "x.h5")]


def no_entry(folder: Path) -> list[Path]:
    h5py.File(folder / "x.h5", "w").close()
    return [folder / "x.h5"]


def real_numbers(folder: Path) -> list[Path]:
    return [write_master(folder / "x.h5", counts(1, "float32"))]


def two_kinds(folder: Path) -> list[Path]:
    return [write_cbf(folder / "x_1.cbf", cbf_counts()[0]), write_master(folder / "x.h5", counts(1))]


def two_cbf_shapes(folder: Path) -> list[Path]:
    return [write_cbf(folder / f"x_{n}.cbf", counts(1, "int32", (n, 20))[0]) for n in (10, 12)]


def two_dtypes(folder: Path) -> list[Path]:
    return [write_master(folder / f"{name}.h5", counts(1, name)) for name in ("uint16", "uint32")]


def strange_unit(folder: Path) -> list[Path]:
    path = write_master(folder / "x.h5", counts(1))
    with h5py.File(path, "a") as file:
        file["entry/instrument/detector/distance"].attrs["units"] = "furlong"
    return [path]


@pytest.mark.parametrize(
    ("make", "error", "word"),
    [
        (not_cbf, BadFrame, "no miniCBF file"),
        (not_hdf5, BadFrame, "not a readable HDF5 file"),
        (other_format, BadFrame, "no known format"),
        (no_images, BadFrame, "no images at"),
        (no_entry, BadFrame, "no /entry group"),
        (real_numbers, BadFrame, "float32"),
        (two_kinds, BadFrame, "one kind at a time"),
        (two_cbf_shapes, ShapeMismatch, "12 x 20 px"),
        (two_dtypes, BadFrame, "differ in dtype"),
        (strange_unit, BadFrame, "furlong"),
        (lambda folder: [folder / "none.cbf"], RunNotFound, "no file or folder"),
        (lambda folder: [folder / "*.cbf"], RunNotFound, "no files match"),
        (lambda folder: [folder], RunNotFound, "holds no CBF or HDF5"),
        (lambda folder: [], RunNotFound, "no files were named"),
    ],
    ids=lambda value: getattr(value, "__name__", None) if callable(value) else None,
)
def test_files_that_cannot_be_replayed_are_refused(tmp_path, make, error, word):
    with pytest.raises(error, match=word):
        read_files(make(tmp_path))


def test_a_cut_cbf_file_is_named(cbf_folder):
    path = cbf_folder / "scan_1_10.cbf"
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(BadFrame, match=r"scan_1_10\.cbf"):
        list(read_files(cbf_folder))
