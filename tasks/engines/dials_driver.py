"""Indexes stills with DIALS, inside DIALS's own Python; nothing of ours is imported here.

Started as ``python dials_driver.py FOLDER FIRST``. The folder holds ``job.json`` (beam, panels, cell, parameters) and
``spots.npz`` (spots of all frames, one behind the other). For each frame from position FIRST on, a line of JSON is
written to standard output as soon as it is done; whatever DIALS prints goes to standard error.
"""

import copy
import json
import os
import sys
import types
from typing import Any


def main(folder: str, first: int) -> None:
    # What DIALS prints must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(content: dict[str, Any]) -> None:
        answers.write(json.dumps(content) + "\n")

    have_stub()
    import numpy as np
    from dials.command_line.stills_process import phil_scope
    from dials.util.version import dials_version
    from libtbx.phil import parse

    with open(os.path.join(folder, "job.json")) as file:
        job = json.load(file)
    spots = np.load(os.path.join(folder, "spots.npz"))
    texts = [*job["phil"], *known_cell(job)]
    scope, unknown = phil_scope.fetch(sources=[parse(text) for text in texts], track_unused_definitions=True)
    if unknown:
        answer({"refused": ", ".join(str(one) for one in unknown)})
        return
    params, imageset = scope.extract(), still_of(job)
    answer({"ready": dials_version()})
    for position in range(first, len(spots["offset"]) - 1):
        rows = slice(spots["offset"][position], spots["offset"][position + 1])
        table = _table({name: spots[name][rows] for name in ("x", "y", "intensity", "panel")})
        answer({"position": position} | index_still(table, imageset, copy.deepcopy(params)))


def have_stub() -> None:
    """DIALS imports this module of XFEL's for stills without using it, and Debian does not ship it."""
    try:
        import xfel_mono_sim_ext  # noqa: F401
    except ImportError:
        sys.modules["xfel_mono_sim_ext"] = types.ModuleType("xfel_mono_sim_ext")


def known_cell(job: dict[str, Any]) -> list[str]:
    cell = ",".join(map(str, job["cell"]))
    return [
        f'indexing.known_symmetry.space_group="{job["space_group"]}"',
        f"indexing.known_symmetry.unit_cell={cell}",
        f"indexing.multiple_lattice_search.max_lattices={job['max_lattices']}",
        "indexing.stills.indexer=stills",
        "indexing.nproc=1",
        "refinement.mp.nproc=1",
    ]


def still_of(job: dict[str, Any]) -> Any:
    """One still without pixels: only its models are asked for."""
    from dxtbx.imageset import ImageSet, ImageSetData, MemReader
    from dxtbx.model import BeamFactory, Detector, Panel

    detector = Detector()
    for panel in job["panels"]:
        slow, fast = panel["shape"]
        detector.add_panel(
            Panel(
                "SENSOR_PAD", panel["name"], panel["fast"], panel["slow"], panel["origin"], panel["pixel_size"],
                (fast, slow), (-1.0, 1e9), 0.0, "",
            )
        )  # fmt: skip
    imageset = ImageSet(ImageSetData(MemReader([None]), None))
    imageset.set_detector(detector, 0)
    imageset.set_beam(BeamFactory.make_beam(wavelength=job["wavelength"], sample_to_source=(0, 0, 1)), 0)
    return imageset


def _table(spots: dict[str, Any]) -> Any:
    import numpy as np
    from dials.array_family import flex

    n = len(spots["x"])
    x, y, intensity = (flex.double(np.ascontiguousarray(spots[name], float)) for name in ("x", "y", "intensity"))
    still, width = flex.double(n, 0.5), flex.double(n, _CENTROID_VARIANCE_PX2)
    table = flex.reflection_table()
    table["xyzobs.px.value"] = flex.vec3_double(x, y, still)
    table["xyzobs.px.variance"] = flex.vec3_double(width, width, flex.double(n, 1.0))
    table["intensity.sum.value"] = intensity
    table["intensity.sum.variance"] = intensity
    table["panel"] = flex.size_t(np.ascontiguousarray(spots["panel"], np.uint64))
    table["id"] = flex.int(n, 0)
    table["flags"] = flex.size_t(n, 0)
    table.set_flags(flex.bool(n, True), table.flags.strong)
    return table


# A spot's centroid is known to a fifth of a pixel or so; only its size against others' would matter.
_CENTROID_VARIANCE_PX2 = 0.04


def index_still(table: Any, imageset: Any, params: Any) -> dict[str, Any]:
    """Lattices of one frame: A (3, 3) row by row, and how many spots DIALS counts; or why there is none."""
    from dials.algorithms.indexing.indexer import Indexer
    from dxtbx.model.experiment_list import Experiment, ExperimentList

    experiments = ExperimentList(
        [Experiment(imageset=imageset, beam=imageset.get_beam(0), detector=imageset.get_detector(0))]
    )
    try:
        indexer = Indexer.from_parameters(table, experiments, params=params)
        indexer.index()
        numbers, crystals = indexer.refined_reflections["id"], indexer.refined_experiments.crystals()
    except Exception as error:
        # DIALS says by exceptions of many kinds that a frame has no lattice; none of them is a fault of the others.
        return {"lattices": [], "why": f"{type(error).__name__}: {error}"}
    lattices = [
        {"A": list(crystal.get_A()), "n_indexed": (numbers == number).count(True)}
        for number, crystal in enumerate(crystals)
    ]
    return {"lattices": lattices, "why": ""}


if __name__ == "__main__":
    # Modules beside this file must not stand in for those of DIALS.
    sys.path.pop(0)
    main(sys.argv[1], int(sys.argv[2]))
