"""A stream as a lazy, read-only Zarr array."""

import numpy as np
import pytest

from storage.array_view import open_view
from storage.codec import encode

from .stores import SHAPE, new_header, pixels
from .test_codec import hdf5_lz4


@pytest.mark.parametrize("codec", ["bslz4", "lz4", "raw"])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
def test_frames_holes_and_slices(codec, dtype):
    asked = []

    def read_blob(index, part):
        asked.append(index)
        array = pixels(index, dtype)
        return None if index == 5 else hdf5_lz4(array) if codec == "lz4" else encode(array, codec)

    view = open_view(new_header(codec=codec, dtype=dtype), 3, 8, read_blob)
    assert view.shape == (5, *SHAPE)
    assert asked == [], "nothing is read until asked"
    assert np.array_equal(view[1], pixels(4, dtype))
    assert asked == [4]
    assert (view[2] == np.iinfo(dtype).max).all()
    assert np.array_equal(view[3:5, 10:20, ::7], np.stack([pixels(6, dtype), pixels(7, dtype)])[:, 10:20, ::7])
    assert np.array_equal(view[-1], pixels(7, dtype))


@pytest.mark.parametrize("shape", [(), (5,), (3, 4, 5)], ids=str)
def test_other_dimensions(shape):
    header = new_header(shape=shape, dtype="float32", codec="raw")
    view = open_view(header, 0, 3, lambda i, _: np.full(shape, i, "f4").tobytes())
    assert np.array_equal(view[:], np.stack([np.full(shape, i, "f4") for i in range(3)]))


def test_empty():
    assert open_view(new_header(), 2, 2, lambda i, _: b"").shape == (0, *SHAPE)


def test_read_only():
    view = open_view(new_header(), 0, 2, lambda i, _: encode(pixels(i)))
    with pytest.raises((PermissionError, ValueError)):
        view[0] = 1
