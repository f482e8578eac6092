"""The peer of search and indexing: DIALS on whole frames, in a process of DIALS's own.

Started as ``python dials_frames.py DRIVER FOLDER`` with the interpreter that has DIALS; nothing of ours is imported but
DRIVER, the file `tasks.engines.dials_driver`, which imports nothing of ours. Reads ``frames.npy`` (n, slow, fast) and
``job.json`` as the driver does, with ``trusted``, the largest count that is one. Writes a line of JSON for each frame:
seconds of peak search and indexing (not of reading and converting pixels), the number of peaks, and the lattices.
"""

import copy
import importlib.util
import json
import os
import sys
import time

import numpy as np

_FEWEST_OF_HIT = 15


class _InMemory:
    """What dxtbx asks of a format."""

    def __init__(self, pixels):
        self.pixels = pixels

    def get_raw_data(self):
        return self.pixels


def main(driver_path: str, folder: str) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    spec = importlib.util.spec_from_file_location("dials_driver", driver_path)
    driver = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(driver)
    driver.have_stub()
    from dials.array_family import flex
    from dials.command_line.stills_process import phil_scope
    from dxtbx.imageset import ImageSet, ImageSetData, MemReader
    from dxtbx.model.experiment_list import Experiment, ExperimentList
    from libtbx.phil import parse

    with open(os.path.join(folder, "job.json")) as file:
        job = json.load(file)
    texts = [*job["phil"], *driver.known_cell(job), "spotfinder.mp.nproc=1"]
    params = phil_scope.fetch(sources=[parse(text) for text in texts]).extract()
    models = driver.still_of(job)
    beam, detector = models.get_beam(0), models.get_detector(0)
    for panel in detector:
        panel.set_trusted_range((0, job["trusted"]))
    for frame in np.load(os.path.join(folder, "frames.npy"), mmap_mode="r"):
        pixels = (flex.int(np.array(frame, np.int32)),)
        imageset = ImageSet(ImageSetData(MemReader([_InMemory(pixels)]), None))
        imageset.set_beam(beam, 0)
        imageset.set_detector(detector, 0)
        experiments = ExperimentList([Experiment(imageset=imageset, beam=beam, detector=detector)])
        mine = copy.deepcopy(params)
        at = time.perf_counter()
        table = flex.reflection_table.from_observations(experiments, mine, is_stills=True)
        searched = time.perf_counter() - at
        found = {"lattices": []}
        at = time.perf_counter()
        if len(table) >= _FEWEST_OF_HIT:
            found = driver.index_still(table, imageset, mine)
        indexed = time.perf_counter() - at
        answer = {"search": searched, "index": indexed, "n_peaks": len(table), "lattices": found["lattices"]}
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
