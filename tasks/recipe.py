"""A recipe: what is done to each frame, as an ordered list of typed steps.

Written as YAML, TOML or Python; each step names what it uses (one of ours, or a user's
``package:function``) and its parameters. A recipe holds everything by value (a cell file is
read when the recipe is loaded), so that it can be recorded and executed again.
"""

import tomllib
from pathlib import Path
from typing import Any, Self

import blake3
import numpy as np
import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from storage.errors import BadGeometry, BadRecipe, ShapeMismatch
from storage.geometry import override_detector
from storage.geometry_formats import read_geometry
from storage.masks import array_digest
from storage.models import DetectorHeader, Model, field_problem
from storage.panels import DetectorGeometry
from tasks.steps import STEPS
from tasks.unit_cell import UnitCell, read_cell
from tasks.user_steps import check_user_step

__all__ = ["Export", "Recipe", "RefineDetector", "Sample", "StepSpec", "crystallography", "load_recipe", "read_mask"]


# Binning and the peak search see every frame, what comes behind them the hits only.
_GROUPS = {"bin": "peaks", "find_peaks": "peaks", "find_peaks_dispersion": "peaks"}


class Sample(Model):
    """The crystal: its cell in Å and degrees, and its space group."""

    name: str | None = None
    cell: tuple[float, float, float, float, float, float] = Field(description="a, b, c in Å, alpha, beta, gamma in °")
    space_group: str = Field(description="Hermann-Mauguin name, e.g. P 43 21 2")

    @property
    def unit_cell(self) -> UnitCell:
        return read_cell(self.cell, self.space_group)


class StepSpec(Model):
    """One step: what it uses, under which name its results are kept, with which parameters."""

    use: str = Field(description="a step of ours (docs/recipes.md), such as find_peaks or index, or package:function")
    name: str = Field("", description="name of the step in this recipe; by default what it uses")
    params: dict[str, Any] = Field(default_factory=dict)
    group: str = Field(
        "", description="neighbouring steps of one group are one task; by default peaks, index, integrate"
    )

    @property
    def group_name(self) -> str:
        """The group this step belongs to."""
        return self.group or _GROUPS.get(self.use, self.name)

    @model_validator(mode="before")
    @classmethod
    def _named_after_use(cls, values: Any) -> Any:
        if isinstance(values, dict) and not values.get("name"):
            return values | {"name": str(values.get("use", "")).rpartition(":")[2]}
        return values


class Export(Model):
    """Files and streams written beside the tables while the run is processed."""

    nexus: str = Field("all", pattern="^(all|hits|none)$", description="frames in the NXmx file: all, hits or none")
    crystfel: bool = Field(True, description="write a CrystFEL .stream")
    hits_stream: bool = Field(
        False,
        description="publish the detector's bytes of hits as a stream, <source>.hits@<processing>, as they are found",
    )
    report: bool = Field(False, description="write report.html beside the tables when the run has ended")


class RefineDetector(Model):
    """When to look whether the detector stands elsewhere than it was taken to, while a run is processed.

    What is found is in force from a later chunk on, which follows from the chunks alone: whoever processes the run, and
    with however many workers, gets the same.
    """

    n_crystals: int = Field(
        50, ge=10, description="crystals before the first look; the next is at twice as many, and so on to 16 times"
    )
    min_shift: float = Field(0.1, gt=0, description="px; a beam centre or panels that are off by less are left alone")
    distance: bool = Field(
        False,
        description="refine the distance too, so that the cell is the sample's, which must be better known than the "
        "distance; otherwise a wrong distance looks like another cell",
    )
    lag: int = Field(
        4,
        gt=0,
        description="chunks from a look to the first that is analysed with what it found; no more chunks than this "
        "are under way at a time",
    )


class Recipe(Model):
    """Steps in order, and what they share."""

    name: str = "recipe"
    sample: Sample | None = None
    steps: tuple[StepSpec, ...] = ()
    export: Export = Export()
    detector: dict[str, float | DetectorGeometry] = Field(
        default_factory=dict,
        description="header values that replace the detector's, e.g. detector_distance in m; geometry: a .geom, .expt "
        "or .poni file, kept by value",
    )
    refine_detector: RefineDetector | None = Field(
        None,
        description="refine the beam centre, or the panels, from the crystals found, and go on with what was found "
        "(docs/geometry.md); {} for the usual limits",
    )
    mask: str | None = Field(None, description=".npy file, (slow, fast), nonzero = do not use; added to the detector's")
    mask_digest: str | None = Field(None, description="of the mask's values, set when the recipe is loaded")

    @field_validator("steps")
    @classmethod
    def _names_differ(cls, steps: tuple[StepSpec, ...]) -> tuple[StepSpec, ...]:
        names = [step.name for step in steps]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"steps named {twice} appear twice; give them a name: of their own")
        return steps

    @field_validator("detector")
    @classmethod
    def _known_fields(cls, values: dict[str, float | DetectorGeometry]) -> dict[str, float | DetectorGeometry]:
        for name, value in values.items():
            if isinstance(value, DetectorGeometry) != (name == "geometry"):
                raise ValueError(f"{name} is a {type(value).__name__}; geometry is a file, all others are numbers")
        override_detector(DetectorHeader(), values)
        return values

    @model_validator(mode="after")
    def _steps_can_run(self) -> Self:
        for step in self.steps:
            _check_step(step, self)
        if self.refine_detector is not None and not any(step.use == "index" for step in self.steps):
            raise ValueError("refine_detector goes by crystals, and no step uses index; add it, or leave this out")
        return self

    @property
    def digest(self) -> str:
        """blake3 of the recipe's content, hex."""
        how: Any = {"name": True, "mask": True, "steps": {"__all__": {"group"}}}
        # A report changes no result. Without a stream of hits recipes keep the digest from before there was one.
        how["export"] = {"report"} if self.export.hits_stream else {"report", "hits_stream"}
        if self.refine_detector is None:
            how["refine_detector"] = True
        if "geometry" in self.detector:
            how["detector"] = {"geometry": {"file", "notes"}}
        return blake3.blake3(self.model_dump_json(exclude=how).encode()).hexdigest()

    @property
    def geometry(self) -> DetectorGeometry | None:
        """The geometry file's content; None for the flat detector that the header describes."""
        found = self.detector.get("geometry")
        return found if isinstance(found, DetectorGeometry) else None

    def mask_of(self, shape: tuple[int, ...], user: np.ndarray | None) -> np.ndarray | None:
        """What this recipe adds to the detector's mask: the user's, and what lies off the geometry's panels.

        user : (slow, fast), as `read_mask` gives it.

        Raises
        ------
        BadFrame : the geometry is that of another detector. ShapeMismatch : so is the mask.
        """
        if self.geometry is None:
            return user
        if len(shape) != 2:
            raise ShapeMismatch(
                f"a geometry of panels places the pixels of 2-D frames, and these are {shape}; leave it out"
            )
        off = self.geometry.mask((shape[0], shape[1]))
        if user is None:
            return off
        if user.shape != off.shape:
            raise ShapeMismatch(f"the recipe's mask has shape {user.shape}, the frames {shape}; make one for these")
        return np.asarray(off | (user != 0))

    def detector_header(self, detector: DetectorHeader | None) -> DetectorHeader:
        """The detector's header with this recipe's values in place."""
        return override_detector(detector or DetectorHeader(), self.detector)


def load_recipe(source: "str | Path | dict[str, Any] | Recipe") -> Recipe:
    """A recipe from a YAML or TOML file, a dict, or a recipe.

    ``sample.cell`` may be a cell file (CrystFEL ``.cell``, PDB, mmCIF, MTZ; relative to the recipe's
    folder), or six numbers. ``detector.geometry`` may be a geometry file, relative to the recipe's folder too; its
    content becomes part of the recipe.

    Raises
    ------
    BadRecipe : not a recipe; the message names the field and the remedy.
    """
    if isinstance(source, Recipe):
        return source
    folder = Path()
    if isinstance(source, dict):
        content = dict(source)
    else:
        path = Path(source)
        folder, content = path.parent, _read_mapping(path)
    if isinstance(content.get("sample"), dict):
        content["sample"] = _resolved_sample(content["sample"], folder)
    if isinstance(content.get("mask"), str):
        content |= _resolved_mask(folder / content["mask"], content.get("mask_digest"))
    detector = content.get("detector")
    if isinstance(detector, dict) and isinstance(detector.get("geometry"), str):
        content["detector"] = detector | {"geometry": _resolved_geometry(folder / detector["geometry"])}
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise BadRecipe(f"{source if not isinstance(source, dict) else 'recipe'}: {_in_words(error)}") from None


def crystallography(cell: UnitCell | None, *, name: str = "crystallography", bin_factor: int = 4) -> Recipe:
    """The preset: bin for the live view, find peaks and, with a cell, index and integrate."""
    steps = [
        {"use": "bin", "params": {"factor": bin_factor}},
        {"use": "find_peaks", "params": {}},
    ]
    if cell is not None:
        steps += [{"use": "index", "params": {}}, {"use": "integrate", "params": {}}]
    content: dict[str, Any] = {"name": name, "steps": steps}
    if cell is not None:
        content["sample"] = {"cell": cell.parameters, "space_group": cell.space_group}
    return load_recipe(content)


def _resolved_sample(sample: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The sample with its cell as numbers, whatever it was given as."""
    source = sample.get("cell")
    if source is None:
        raise BadRecipe("sample has no cell; give six numbers or a .cell, PDB, mmCIF or MTZ file")
    if isinstance(source, str) and (folder / source).is_file():
        source = folder / source
    cell = read_cell(source, sample.get("space_group"))
    return sample | {"cell": cell.parameters, "space_group": cell.space_group}


def read_mask(path: Path) -> np.ndarray:
    """A user's mask, (slow, fast), nonzero = do not use."""
    try:
        mask = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise BadRecipe(f"cannot read mask {path}: {error}; save it with numpy.save") from None
    return np.asarray(mask)


def _resolved_mask(path: Path, expected: str | None) -> dict[str, str]:
    """The mask's full path and what is in it; BadRecipe if that is not what the recipe was recorded with."""
    digest = array_digest(read_mask(path))
    if expected not in (None, digest):
        raise BadRecipe(f"mask {path} has changed since the recipe was recorded; restore it, or leave out mask_digest")
    return {"mask": str(path.absolute()), "mask_digest": digest}


def _resolved_geometry(path: Path) -> DetectorGeometry:
    try:
        return read_geometry(path)
    except BadGeometry as error:
        raise BadRecipe(f"detector.geometry: {error}") from None


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
    except OSError as error:
        raise BadRecipe(f"cannot read recipe {path}: {error.strerror}; give a YAML or TOML file") from None
    try:
        content = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise BadRecipe(f"{path} is not valid {path.suffix.lstrip('.') or 'YAML'}: {error}") from None
    if not isinstance(content, dict):
        raise BadRecipe(f"{path} holds a {type(content).__name__}, not a recipe with steps")
    return content


def _check_step(step: StepSpec, recipe: Recipe) -> None:
    """The step exists and takes these parameters."""
    if ":" in step.use:
        check_user_step(step.use, step.params)
    elif step.use not in STEPS:
        raise ValueError(f"no step {step.use!r}; there are {', '.join(STEPS)}, or write package:function")
    else:
        STEPS[step.use].read_params(step.params)
        if STEPS[step.use].needs_cell and recipe.sample is None:
            raise ValueError(f"step {step.use!r} needs sample: with a cell and space_group")


def _in_words(error: ValidationError) -> str:
    return "; ".join(
        field_problem(".".join(map(str, e["loc"])) or "recipe", e["msg"], e.get("input")) for e in error.errors()
    )
