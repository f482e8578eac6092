import numpy as np
import pytest

from storage.errors import BadFrame, ShapeMismatch
from storage.geometry import Geometry
from storage.models import DetectorHeader
from tasks.bin_frames import MARKED, bin_frame, binned_header

RNG = np.random.default_rng(7)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "int32", "int64"])
@pytest.mark.parametrize("factor", [1, 2, 3])
def test_sums_against_numpy_with_the_edge_trimmed(dtype, factor):
    frame = RNG.integers(0, 100, (31, 44)).astype(dtype)
    sums, marked = bin_frame(frame, None, factor)
    h, w = 31 // factor, 44 // factor
    expected = frame[: h * factor, : w * factor].reshape(h, factor, w, factor).sum(axis=(1, 3))
    assert sums.dtype == np.uint32
    np.testing.assert_array_equal(sums, expected)
    assert not marked.any()


MARKS = {
    "masked": (5, 1, None),
    "saturated": (101, 0, 100),
    "unsigned maximum": (65535, 0, None),
}


@pytest.mark.parametrize(("value", "mask_value", "saturation"), MARKS.values(), ids=MARKS)
def test_one_bad_child_marks_its_pixel_only(value, mask_value, saturation):
    frame, mask = np.full((6, 6), 100, np.uint16), np.zeros((6, 6), np.uint8)
    frame[3, 4], mask[3, 4] = value, mask_value
    sums, marked = bin_frame(frame, mask, 2, saturation)
    expected = np.zeros((3, 3), np.uint8)
    expected[1, 2] = 1
    np.testing.assert_array_equal(marked, expected)
    assert sums[1, 2] == MARKED
    assert (sums[expected == 0] == 400).all()


def test_negative_marks_and_overflow_are_not_summed():
    assert bin_frame(np.array([[5, -1], [5, 5]], np.int32), None, 2)[1].all()
    assert bin_frame(np.full((2, 2), 2**31, np.uint32), None, 2)[1].all()


def test_bad_input_is_refused():
    with pytest.raises(BadFrame, match="integer counts"):
        bin_frame(np.zeros((4, 4)), None, 2)
    with pytest.raises(BadFrame, match="factor 5"):
        bin_frame(np.zeros((4, 4), np.uint8), None, 5)
    with pytest.raises(ShapeMismatch, match="mask"):
        bin_frame(np.zeros((4, 4), np.uint8), np.zeros((4, 5)), 2)
    with pytest.raises(BadFrame, match="not positive"):
        binned_header(DetectorHeader(), 0)


def test_binned_header_keeps_every_place_in_the_laboratory():
    fine = DetectorHeader(
        beam_center_x=511.3, beam_center_y=498.9, detector_distance=0.15, incident_energy=12400, saturation_value=999
    )
    coarse = binned_header(fine, 2)
    big, small = Geometry.from_header(fine, (1000, 1000)), Geometry.from_header(coarse, (500, 500))
    x, y = RNG.uniform(0, 1000, (2, 50))
    np.testing.assert_allclose(big.scattering_vector(x, y), small.scattering_vector(x / 2, y / 2), atol=1e-15)
    assert coarse.saturation_value == 999
