"""Stands in for CrystFEL's indexamajig: reads what its manual says it reads, and writes a stream.

Started with indexamajig's command line. It does not search: it knows the true lattices (STAND_IN_KNOWS, a JSON file of
one A, rows a*, b*, c*, for each frame), and gives one only if the peaks it was handed fit it. It takes the files at
their word (CXI peaks count from the middle of the first pixel, the geometry is CrystFEL's), so where they
contradict each other nothing fits. STAND_IN_HANGS and STAND_IN_DIES name a frame on which it does so; STAND_IN_SHIFT a
detector shift, mm, that it claims.
"""

import argparse
import json
import os
import re
import sys
import time
from pathlib import Path

import h5py
import numpy as np

from storage.crystfel import CrystfelStreamWriter, StreamCrystal, StreamPeaks
from storage.geometry import Geometry, Panel
from storage.models import StreamHeader
from storage.photons import wavelength_from_energy


def arguments():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("input", "output", "geometry", "indexing", "peaks", "temp-dir", "max-indexer-threads", "tolerance"):
        parser.add_argument(f"--{name}")
    parser.add_argument("-p", dest="cell")
    parser.add_argument("-j", dest="jobs")
    for flag in ("no-revalidate", "no-image-data", "cell-parameters-only", "no-refls-in-stream", "multi"):
        parser.add_argument(f"--{flag}", action="store_true", dest=flag)
    return parser.parse_args()


def read_geometry(text):
    """The one panel of a geometry file, key by key."""
    values = dict(re.findall(r"^(?:p0/)?(\w+) = (.*)$", text, re.MULTILINE))
    res, clen = float(values["res"]), float(values["clen"].removesuffix(" m"))

    def step(word):
        parts = {axis: float(number) for number, axis in re.findall(r"([-+][\d.]+)([xyz])", values[word])}
        return tuple(parts.get(axis, 0.0) / res for axis in "xyz")

    corner = (float(values["corner_x"]) / res, float(values["corner_y"]) / res, clen)
    shape = (int(values["max_ss"]) + 1, int(values["max_fs"]) + 1)
    wavelength = wavelength_from_energy(float(values["photon_energy"].removesuffix(" eV")))
    return values, Geometry((Panel("p0", corner, step("fs"), step("ss"), shape),), wavelength)


def main():
    if sys.argv[1:] == ["--version"]:
        print("CrystFEL: 0.11.1\nLicense GPLv3+")
        return
    given = arguments()
    text = Path(given.geometry).read_text()
    values, geometry = read_geometry(text)
    header = StreamHeader(
        experiment="x", run=1, data_source="x", shape=geometry.panels[0].shape, dtype="uint16", frames_per_chunk=1
    )
    assert "lattice_type" in Path(given.cell).read_text()
    truths = json.loads(Path(os.environ["STAND_IN_KNOWS"]).read_text())
    shift = tuple(map(float, os.environ.get("STAND_IN_SHIFT", "0,0").split(",")))
    with CrystfelStreamWriter(
        given.output,
        header,
        geometry=geometry,
        geometry_text=text,
        image_filename="x",
        overwrite=True,
        indexed_by="asdf",
    ) as stream:
        for line in Path(given.input).read_text().splitlines():
            name, event = line.split()
            number = int(event.removeprefix("//"))
            if os.environ.get("STAND_IN_HANGS") == str(number):
                time.sleep(1000)
            if os.environ.get("STAND_IN_DIES") in (str(number), "always"):
                sys.exit("Segmentation fault, or so")
            with h5py.File(name) as file:
                peaks = file[values["peak_list"]]
                n = peaks["nPeaks"][number]
                x, y = (peaks[f"peak{axis}PosRaw"][number, :n] + 0.5 for axis in "XY")
                intensity = peaks["peakTotalIntensity"][number, :n]
                assert file[values["data"]].shape[1:] == geometry.panels[0].shape
            A = np.array(truths[number])
            index = geometry.scattering_vector(x, y) @ np.linalg.inv(A)
            # Half a pixel would move a third of the spots out of this.
            fit = (np.abs(index - np.rint(index)).max(axis=1) < 0.15).mean()
            crystals = [StreamCrystal(A=A, det_shift_mm=shift)] if fit > 0.8 else []
            stream.write_frame(number, hit=True, peaks=StreamPeaks(x, y, intensity), crystals=crystals)


if __name__ == "__main__":
    main()
