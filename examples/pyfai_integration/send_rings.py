"""Send simulated frames of lanthanum hexaboride powder, the usual calibrant, into a running service.

nearline serve &
python examples/pyfai_integration/send_rings.py calibration
"""

import sys

import numpy as np

import nearline
from storage.geometry import Geometry
from storage.models import DetectorHeader, StreamHeader

# NIST SRM 660c at 22.5 °C.
LATTICE_ANGSTROM = 4.156826
SHAPE = (512, 480)
# Of a sensor without depth: pyFAI, as it is used here, takes no parallax into account.
DETECTOR = DetectorHeader(
    sensor_thickness=0.0,
    description="simulated", pixel_size_x=172e-6, pixel_size_y=172e-6, detector_distance=0.08,
    beam_center_x=231.3, beam_center_y=262.8, incident_wavelength=0.8, saturation_value=60_000,
)  # fmt: skip
_WIDTH = 0.012
_POLARIZATION = 0.99


def ring_positions(q_max: float) -> dict[float, int]:
    """q of each ring of the simple cubic lattice in 1/Å, to the number of lattice planes in it."""
    side = np.arange(-8, 9)
    h, k, l = (axis.ravel() for axis in np.meshgrid(side, side, side))  # noqa: E741 (the indices' own names)
    sums, planes = np.unique(h**2 + k**2 + l**2, return_counts=True)
    q = 2 * np.pi * np.sqrt(sums) / LATTICE_ANGSTROM
    return {float(at): int(n) for at, n in zip(q, planes, strict=True) if 0 < at < q_max}


def expected_counts() -> np.ndarray:
    """(slow, fast): rings and a smooth background, with the beam's polarisation and the pixels' solid angle."""
    geometry = Geometry.from_header(DETECTOR, SHAPE)
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]] + 0.5
    q = 2 * np.pi * np.linalg.norm(geometry.scattering_vector(x, y), axis=-1)
    where = geometry.lab_position(x, y)
    cosine = where[..., 2] / np.linalg.norm(where, axis=-1)
    horizontal = where[..., 0] / np.linalg.norm(where, axis=-1)
    vertical = where[..., 1] / np.linalg.norm(where, axis=-1)
    # Thomson scattering: no intensity along the electric field, here nearly all of it horizontal.
    part = (1 + _POLARIZATION) / 2
    polarization = part * (1 - horizontal**2) + (1 - part) * (1 - vertical**2)
    rings = sum(15 * n / at * np.exp(-0.5 * ((q - at) / _WIDTH) ** 2) for at, n in ring_positions(7.0).items())
    return (8 * np.exp(-q / 3) + rings) * polarization * cosine**3


def pixel_mask() -> np.ndarray:
    """(slow, fast) uint32, nonzero = do not use: a gap between modules, a beamstop with its holder, a hot pixel."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    stop = np.hypot(x - DETECTOR.beam_center_x, y - DETECTOR.beam_center_y) < 18
    holder = (abs(x - DETECTOR.beam_center_x) < 4) & (y > DETECTOR.beam_center_y)
    mask = np.where((y >= 195) & (y < 212), 1, 0) | np.where(stop | holder, 1 << 3, 0)
    mask[100, 70] = 1 << 4
    return mask.astype(np.uint32)


def send_rings(experiment: str, n_frames: int = 40) -> str:
    """Send frames with photon noise as ``pilatus``; the run's name."""
    expected, mask, random = expected_counts(), pixel_mask(), np.random.default_rng(0)
    with nearline.producer(experiment, "pilatus") as producer, producer.run(sample="LaB6", planned=n_frames) as out:
        header = StreamHeader(
            experiment=experiment, run=out.run, data_source="pilatus", shape=SHAPE, dtype="uint16",
            frames_per_chunk=10, planned=n_frames, detector=DETECTOR,
        )  # fmt: skip
        out.start(header, mask)
        for index in range(n_frames):
            frame = random.poisson(expected * (1 + 0.1 * np.sin(index / 3))).astype(np.uint16)
            frame[mask != 0] = np.iinfo(np.uint16).max  # as a detector marks what is not measured
            out.send(frame, meta={"shutter_open": True})
    return f"{experiment}/{out.run}"


if __name__ == "__main__":
    print(send_rings(sys.argv[1]))
