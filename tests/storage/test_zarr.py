"""Plain Zarr reads what we store, in a process that never imported us."""

import json
import subprocess
import sys

import numpy as np
import pytest

from storage.codec import encode
from storage.states import FrameState

from .stores import SHAPE, new_store, pixels, row
from .test_codec import hdf5_lz4

READER = """
import sys, json, zarr
array = zarr.open(sys.argv[1], mode="r")["data"]
import numpy as np
ours = [name for name in sys.modules if name.split(".")[0] in ("nearline", "streaming", "flows", "tasks")]
assert not ours, ours
np.save(sys.argv[2], np.stack([array[i] for i in range(array.shape[0])]))
print(json.dumps({"shape": array.shape, "fill": float(array.fill_value)}))
"""


def blob_of(array: np.ndarray, codec: str) -> bytes:
    return hdf5_lz4(array) if codec == "lz4" else encode(array, codec)


@pytest.mark.parametrize(
    ("codec", "dtype"),
    [*(("bslz4", kind) for kind in ("uint8", "uint16", "uint32", "float32")), ("lz4", "uint16"), ("raw", "uint16")],
    ids=lambda v: v,
)
def test_zarr_reads_frames_and_holes(tmp_path, codec, dtype):
    store = new_store(tmp_path, codec=codec, dtype=dtype)
    for index in (0, 1, 3, 5):
        blob = blob_of(pixels(index, dtype), codec)
        store.append(row(index, blob), blob)
    store.account(2, 3, FrameState.missing, "hole")
    store.finish(6, "hole")
    out = tmp_path / "out.npy"
    command = [sys.executable, "-I", "-c", READER, store.paths.zarr, out]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found, said = np.load(out), json.loads(done.stdout)
    assert said["shape"] == [6, *SHAPE]
    for index in (0, 1, 3, 5):
        assert np.array_equal(found[index], pixels(index, dtype))
    for index in (2, 4):
        hole = np.isnan(found[index]) if dtype == "float32" else found[index] == np.iinfo(dtype).max
        assert hole.all()


@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 5)], ids=str)
def test_arrays_of_other_dimensions(tmp_path, shape):
    import zarr

    store = new_store(tmp_path, shape=shape, dtype="float64", codec="raw")
    for index in range(5):
        blob = encode(np.full(shape, index / 2), "raw")
        store.append(row(index, blob), blob)
    store.finish(0, "end")
    array = zarr.open(str(store.paths.zarr), mode="r")["data"]
    assert array.shape == (5, *shape)
    assert np.array_equal(array[3], np.full(shape, 1.5))


def test_live_stream_shows_its_sealed_chunks(tmp_path):
    import zarr

    store = new_store(tmp_path)
    for index in range(6):
        blob = encode(pixels(index))
        store.append(row(index, blob), blob)
        store.seal_complete()
    array = zarr.open(str(store.paths.zarr), mode="r")["data"]
    assert array.shape[0] == 4
    assert np.array_equal(array[3], pixels(3))
