"""Parallax in the sensor: how far out oblique spots appear, and that the geometry knows it both ways."""

import numpy as np
import pytest

from storage.errors import BadFrame
from storage.geometry import Geometry
from storage.models import DetectorHeader
from storage.sensor import Sensor, absorption_of

SHAPE = (2162, 2068)
DETECTOR = DetectorHeader(
    beam_center_x=1034, beam_center_y=1081, detector_distance=0.13, incident_energy=12_000, sensor_thickness=0.00045
)
FLAT = DETECTOR.model_copy(update={"sensor_thickness": 0.0})


@pytest.mark.parametrize(("energy", "total"), [(10_000, 33.89), (15_000, 10.34)])
def test_silicon_is_as_in_the_tables(energy, total):
    # NIST mass attenuation coefficients, cm²/g, at 2.33 g/cm³; up to 8 % of them are scattering, not absorption.
    assert 0.92 < absorption_of("Si", 12398.42 / energy) / (total * 2.33 * 100) < 1


def test_the_mean_path_of_thin_and_thick_sensors():
    assert Sensor(1e-6, 4000).mean_path(np.array(1.0)) < 1e-8, "nothing to travel through"
    assert Sensor(1.0, 4000).mean_path(np.array(1.0)) == pytest.approx(1 / 4000), "all are stopped on their way"
    assert Sensor().mean_path(np.array([0.5, 1.0])).tolist() == [0, 0]


def test_spots_at_27_degrees_appear_nine_tenths_of_a_pixel_farther_out():
    angle = np.radians(27)
    q = np.array([[np.sin(angle), 0, np.cos(angle) - 1], [0, -np.sin(angle), np.cos(angle) - 1], [0, 0, 0]]) / 1.0332
    with_depth, without = (np.column_stack(Geometry.from_header(d, SHAPE).project(q)) for d in (DETECTOR, FLAT))
    moved = with_depth - without
    np.testing.assert_allclose(moved, [[-0.9, 0], [0, 0.9], [0, 0]], atol=0.1)
    assert np.hypot(*(with_depth - [1034, 1081]).T)[:2] == pytest.approx(
        np.hypot(*(without - [1034, 1081]).T)[:2] + 0.9, abs=0.1
    )


def test_a_spot_leads_back_to_its_ray():
    geometry = Geometry.from_header(DETECTOR, SHAPE)
    x, y = np.random.default_rng(0).uniform(0, 2068, (2, 500))
    back = geometry.project(geometry.scattering_vector(x, y))
    np.testing.assert_allclose(back, [x, y], atol=2e-3)


def test_an_unknown_material_is_said_and_has_no_parallax(caplog):
    with pytest.raises(BadFrame, match="'Xe' is unknown"):
        absorption_of("Xe", 1.0)
    geometry = Geometry.from_header(DETECTOR.model_copy(update={"sensor_material": "Xe"}), SHAPE)
    assert geometry.sensor == Sensor()
    assert "no parallax" in caplog.text
