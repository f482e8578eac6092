"""`nearline check`: an experiment file held against reality, check by check, each with its remedy."""

import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from flows.experiment import Experiment, all_recipes, load_experiment
from nearline.doctor import Check, State
from nearline.prefect_server import is_healthy
from storage.errors import BadRecipe, EngineMissing, NearlineError
from storage.models import DetectorHeader
from storage.panels import DetectorGeometry
from storage.photons import energy_from_wavelength
from streaming.client import is_reachable
from tasks.recipe import Recipe, read_mask
from tasks.steps import STEPS
from tasks.unit_cell import lattice_rotations

__all__ = ["check_engines", "check_experiment"]

_CONNECT_S = 1.0
_LEAST_ROOM = 20 << 30
# What an X-ray detector can be set to. The bounds are wide, and catch a unit: mm for m, keV for eV, nm for Å.
_PLAUSIBLE = {
    "detector_distance": (0.01, 20.0, "m"),
    "incident_wavelength": (0.1, 15.0, "Å"),
    "incident_energy": (800.0, 150e3, "eV"),
    "pixel_size_x": (1e-6, 2e-3, "m"),
    "pixel_size_y": (1e-6, 2e-3, "m"),
    "sensor_thickness": (0.0, 1e-2, "m"),
    "beam_center_x": (-20e3, 40e3, "px"),
    "beam_center_y": (-20e3, 40e3, "px"),
    "count_time": (1e-7, 3600.0, "s"),
    "frame_time": (1e-7, 3600.0, "s"),
}
# The volume of an asymmetric unit that holds one atom; less means a wrong unit or group.
_LEAST_ASU_A3 = 10.0


def check_experiment(path: Path, api: str | None = None) -> Iterator[Check]:
    """Every check, in order; the file itself first, and nothing after it if it cannot be read."""
    try:
        experiment = load_experiment(path)
    except NearlineError as error:
        yield _failed("file", error)
        return
    yield Check("file", "ok", f"experiment {experiment.experiment} at {experiment.beamline}, in {experiment.file}")
    recipes: dict[str | None, Recipe] = {}
    yield from _check_recipes(experiment, recipes)
    for name, recipe in recipes.items():
        yield from _check_cell(name, recipe)
    for recipe in {r.digest: r for r in recipes.values()}.values():
        yield from check_engines(recipe)
        yield from _check_geometry(recipe)
        yield from _check_mask(recipe)
    yield from _check_sources(experiment)
    yield from _check_folder(experiment)
    yield from _check_servers(experiment, api)


def _failed(name: str, error: Exception) -> Check:
    what, _, remedy = str(error).rpartition("; ")
    return Check(name, "fail", what or remedy, remedy if what else "")


# ---- what is analysed ---------------------------------------------------------------------------


def _check_recipes(experiment: Experiment, recipes: dict[str | None, Recipe]) -> Iterator[Check]:
    """Each sample's recipe, filled into ``recipes``; one that does not load leaves the others."""
    for sample in experiment.samples:
        only = experiment.model_copy(update={"samples": (sample,), "default_sample": None})
        try:
            recipes |= all_recipes(only)
        except (BadRecipe, OSError) as error:
            yield _failed("recipe", error)
    try:
        recipes |= {name: r for name, r in all_recipes(experiment).items() if name is None}
    except (BadRecipe, OSError) as error:
        if not experiment.samples:
            yield _failed("recipe", error)
    for name, recipe in recipes.items():
        steps = ", ".join(step.name for step in recipe.steps)
        yield Check("recipe", "ok", f"{recipe.name} for {_of(name)}: {steps or 'no steps'}")


def _of(sample: str | None) -> str:
    return f"sample {sample}" if sample else "runs without a sample"


def _check_cell(name: str | None, recipe: Recipe) -> Iterator[Check]:
    """That the cell fits its space group was seen when the recipe was read; here, whether it is a crystal's."""
    if recipe.sample is None:
        return
    cell = recipe.sample.unit_cell
    n_operations = len(cell.group.operations())
    volume = cell.volume / n_operations
    if volume < _LEAST_ASU_A3:
        found = f"{_of(name)}: {cell.describe()} leaves {volume:.1f} Å³ for each of {n_operations} asymmetric units"
        yield Check("cell", "fail", found, "give the edges in Å, and the right space group")
        return
    n_point = sum(1 for op in cell.group.operations().sym_ops if op.det_rot() > 0)
    ambiguous = len(lattice_rotations(cell)) // n_point
    note = f"; {ambiguous} ways to index the same spots" if ambiguous > 1 else ""
    yield Check("cell", "ok", f"{_of(name)}: {cell.describe()}, asymmetric unit {volume:.0f} Å³{note}")


def check_engines(recipe: Recipe) -> Iterator[Check]:
    """Programs of others that steps of the recipe index with: there, and in which version."""
    for spec in recipe.steps:
        engine = STEPS[spec.use].engine if spec.use in STEPS else None
        if engine is None:
            continue
        try:
            yield Check("engine", "ok", f"{recipe.name}, step {spec.name}: {engine.version()}")
        except EngineMissing as error:
            yield _failed("engine", error)


def _check_geometry(recipe: Recipe) -> Iterator[Check]:
    """The values that replace the detector's: within what can be, and in agreement with each other."""
    given = {field: value for field, value in recipe.detector.items() if isinstance(value, float)}
    if not recipe.detector:
        yield Check("geometry", "ok", f"{recipe.name}: as the detector says")
        return
    if recipe.geometry is not None:
        yield _check_panels(recipe, recipe.geometry)
    wrong = [
        f"{field} is {given[field]:g} {unit}, not between {low:g} and {high:g} {unit}"
        for field, (low, high, unit) in _PLAUSIBLE.items()
        if field in given and not low <= given[field] <= high
    ]
    if given.get("incident_energy") and given.get("incident_wavelength"):
        energy = energy_from_wavelength(given["incident_wavelength"])
        if abs(energy / given["incident_energy"] - 1) > 1e-3:
            wrong.append(
                f"incident_wavelength {given['incident_wavelength']:g} Å is {energy:.0f} eV, "
                f"but incident_energy is {given['incident_energy']:g} eV"
            )
    for problem in wrong:
        yield Check("geometry", "fail", f"{recipe.name}: {problem}", "correct detector in the recipe (m, Å, eV, px)")
    if given and not wrong:
        header: DetectorHeader = recipe.detector_header(None)
        shown = ", ".join(f"{field} {getattr(header, field):g}" for field in given)
        yield Check("geometry", "ok", f"{recipe.name}: {shown}")


def _check_panels(recipe: Recipe, geometry: DetectorGeometry) -> Check:
    """That the file can be read was seen with the recipe; here, where it puts the detector."""
    header = recipe.detector_header(DetectorHeader(detector_distance=0.0))
    slow, fast = geometry.shape
    n_panels = len(geometry.panels)
    found = (
        f"{recipe.name}: {geometry.file}: {n_panels} panel{'s' if n_panels > 1 else ''} on {slow} × {fast} px"
        f", beam centre ({header.beam_center_x:.2f}, {header.beam_center_y:.2f}) px"
    )
    if header.detector_distance:
        found += f", distance {header.detector_distance:.5g} m"
    low, high, unit = _PLAUSIBLE["detector_distance"]
    if header.detector_distance and not low <= header.detector_distance <= high:
        return Check("geometry", "fail", f"{found}, not between {low:g} and {high:g} {unit}", "correct the file")
    if geometry.notes:
        return Check("geometry", "warn", found, "; ".join(geometry.notes))
    return Check("geometry", "ok", found)


def _check_mask(recipe: Recipe) -> Iterator[Check]:
    """That the file is there was seen when the recipe was read; here, whether it leaves pixels to look at."""
    if recipe.mask is None:
        return
    mask = read_mask(Path(recipe.mask))
    masked = float(np.count_nonzero(mask)) / max(mask.size, 1)
    found = f"{recipe.mask}: {' × '.join(map(str, mask.shape))} px, {100 * masked:.1f} % masked"
    if mask.ndim != 2 or masked == 1.0:
        yield Check("mask", "fail", found, "save a (slow, fast) array, nonzero where a pixel must not be used")
    elif masked > 0.5:
        yield Check("mask", "warn", found, "nonzero means do not use; invert it if it is the other way round")
    else:
        yield Check("mask", "ok", found)


# ---- where it runs ------------------------------------------------------------------------------


def _check_sources(experiment: Experiment) -> Iterator[Check]:
    for source in experiment.data_sources:
        answers = _accepts(source.endpoint)
        found = f"{source.name} at {source.endpoint} {'accepts connections' if answers else 'does not answer'}"
        remedy = "" if answers else "switch its stream on, or correct data_sources; runs begin once it answers"
        yield Check("detector", "ok" if answers else "warn", found, remedy)


def _accepts(endpoint: str) -> bool:
    """Whether something listens at ``tcp://host:port``."""
    place = urlsplit(endpoint)
    try:
        with socket.create_connection((place.hostname, place.port or 0), timeout=_CONNECT_S):
            return True
    except (OSError, ValueError):
        return False


def _check_folder(experiment: Experiment) -> Iterator[Check]:
    folder = experiment.root
    there = next(place for place in (folder, *folder.parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        remedy = "give this account the right to write there, or correct deployment.root"
        yield Check("data folder", "fail", f"{folder} cannot be written", remedy)
        return
    usage = shutil.disk_usage(there)
    found = f"{folder}{'' if folder.exists() else ' (will be made)'}: {usage.free / 2**30:.0f} GiB free"
    state: State = "ok" if usage.free >= _LEAST_ROOM else "warn" if usage.free >= 1 << 30 else "fail"
    yield Check("data folder", state, found, "" if state == "ok" else "free some space, or change deployment.root")


def _check_servers(experiment: Experiment, api: str | None) -> Iterator[Check]:
    from flows.deploying import api_of

    service, prefect = experiment.deployment.service.address, api or api_of(experiment)
    rows: list[tuple[str, str, Any, str]] = [
        ("service", service, is_reachable(service), "nearline serve"),
        ("prefect", prefect, is_healthy(prefect), "prefect server start"),
    ]
    for name, place, answers, command in rows:
        remedy = "" if answers else f"start it with `{command}`, or correct deployment.{name}"
        yield Check(name, "ok" if answers else "warn", f"{place} {'answers' if answers else 'does not answer'}", remedy)
