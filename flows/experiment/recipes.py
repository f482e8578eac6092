"""What holds for a run of an experiment: its sample, its recipe, when it has enough."""

from pathlib import Path
from typing import Any

from flows.experiment.model import Experiment, Sample, parse_ranges
from flows.experiment.reading import load_experiment, read_mapping, with_cell_file
from storage.errors import BadRecipe
from storage.names import parse_run_key
from tasks.recipe import Recipe, crystallography, load_recipe

__all__ = ["RECIPE_PREFIX", "all_recipes", "recipe_for", "recipe_of_run", "resolve_recipe", "sample_for", "stop_for"]

# A recipe parameter that begins with this names an experiment file; the run's sample chooses the recipe in it.
RECIPE_PREFIX = "experiment:"


def sample_for(experiment: Experiment, run: int | None = None, sample: str | None = None) -> Sample | None:
    """The sample of a run: the one it names, else the one whose ``runs`` hold its number, else the default.

    None where the file has no samples, or none of them is meant.
    """
    by_name = {s.name: s for s in experiment.samples}
    if sample in by_name:
        return by_name[sample]
    for candidate in experiment.samples:
        if run is not None and any(run in numbers for numbers in parse_ranges(candidate.runs)):
            return candidate
    if experiment.default_sample:
        return by_name[experiment.default_sample]
    return experiment.samples[0] if len(experiment.samples) == 1 else None


def recipe_for(experiment: Experiment, run: int | None = None, sample: str | None = None) -> Recipe:
    """The recipe of a run: its sample's, with the sample's cell and the experiment's exports in place.

    Parameters
    ----------
    run : number of the run.
    sample : name of the sample as the run's header says it.

    Raises
    ------
    BadRecipe : it cannot be read; the message names file and field.
    """
    chosen = sample_for(experiment, run, sample)
    name = (chosen and chosen.recipe) or experiment.default_recipe or next(iter(experiment.recipes), None)
    content = _recipe_content(experiment, name)
    if chosen is not None and chosen.cell is not None:
        content["sample"] = {"name": chosen.name, "cell": chosen.cell, "space_group": chosen.space_group}
    elif chosen is not None and isinstance(content.get("sample"), dict):
        content["sample"] = content["sample"] | {"name": chosen.name}
    if name is None and content.get("sample"):
        content["steps"] = [*content["steps"], {"use": "index"}, {"use": "integrate"}]
    exports = experiment.exports.model_dump(include={"nexus", "crystfel"}, exclude_none=True)
    content["export"] = dict(content.get("export") or {}) | exports
    try:
        return load_recipe(content)
    except BadRecipe as error:
        what = f"sample {chosen.name}" if chosen else "runs without a sample"
        raise BadRecipe(f"recipe {name or 'preset'} for {what}: {error}") from None


def _recipe_content(experiment: Experiment, name: str | None) -> dict[str, Any]:
    """A recipe as written, with its own relative paths made absolute."""
    if name is None:
        return crystallography(None).model_dump(mode="json")
    source = experiment.recipes[name]
    if isinstance(source, str):
        path = Path(source)
        content, folder = read_mapping(path, BadRecipe), path.parent
    else:
        content, folder = dict(source), experiment.file.parent if experiment.file else Path()
    content.setdefault("name", name)
    if isinstance(content.get("mask"), str):
        content["mask"] = str(folder / content["mask"])
    detector = content.get("detector")
    if isinstance(detector, dict) and isinstance(detector.get("geometry"), str):
        content["detector"] = detector | {"geometry": str(folder / detector["geometry"])}
    if isinstance(content.get("sample"), dict):
        content["sample"] = with_cell_file(content["sample"], folder)
    return content


def stop_for(experiment: Experiment, run: int | None = None, sample: str | None = None) -> tuple[str, ...]:
    """The stop criteria of a run: its sample's, or those of the experiment."""
    chosen = sample_for(experiment, run, sample)
    return experiment.stop if chosen is None or chosen.stop is None else chosen.stop


def recipe_of_run(experiment_file: str | Path, run_name: str, sample: str | None = None) -> dict[str, Any]:
    """The recipe of a run by the experiment file, as plain content.

    Parameters
    ----------
    run_name : experiment/number, or the path of a run folder, which ends so.
    sample : what the run's header calls its sample.

    Raises
    ------
    BadExperiment, BadRecipe : the file, or the recipe in it, cannot be used.
    """
    experiment = load_experiment(experiment_file)
    number = parse_run_key("/".join(run_name.rstrip("/").split("/")[-2:]))[1]
    return recipe_for(experiment, number, sample).model_dump(mode="json")


def resolve_recipe(recipe: str | dict[str, Any], run_name: str, sample: str | None = None) -> Recipe:
    """A flow's recipe parameter as a recipe: ``experiment:FILE`` (see `recipe_of_run`), a path, or the content."""
    if isinstance(recipe, str) and recipe.startswith(RECIPE_PREFIX):
        recipe = recipe_of_run(recipe.removeprefix(RECIPE_PREFIX), run_name, sample)
    return load_recipe(recipe)


def all_recipes(experiment: Experiment) -> dict[str | None, Recipe]:
    """By sample's name, the recipe of its runs; under None that of runs without a known sample."""
    found: dict[str | None, Recipe] = {s.name: recipe_for(experiment, sample=s.name) for s in experiment.samples}
    if sample_for(experiment) is None:
        found[None] = recipe_for(experiment)
    return found
