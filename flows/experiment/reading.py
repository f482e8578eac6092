"""An experiment file read, its paths made absolute, and what is wrong with it said field by field."""

import sys
import tomllib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from flows.experiment.model import Experiment
from storage.errors import BadExperiment
from storage.models import field_problem

__all__ = ["load_experiment", "read_mapping", "with_cell_file"]


def load_experiment(path: str | Path) -> Experiment:
    """The experiment of a YAML or TOML file, with its paths made absolute.

    Raises
    ------
    BadExperiment : no such file, not YAML, or not an experiment; the message names the file and, for
        each problem, the field, its value and what would do.
    """
    path = Path(path).absolute()
    content = {k: v if k == "recipes" else _without_none(v) for k, v in read_mapping(path).items() if v is not None}
    try:
        experiment = Experiment.model_validate(_with_absolute_paths(content, path.parent))
    except ValidationError as error:
        raise BadExperiment(f"{path}: {_in_words(error, content)}") from None
    experiment._file = path
    _import_from(experiment.deployment.python_path)
    return experiment


def read_mapping(path: Path, error_class: type[Exception] = BadExperiment) -> dict[str, Any]:
    try:
        text = path.read_text()
        content = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except OSError as error:
        raise error_class(f"cannot read {path}: {error.strerror}; `nearline init` writes an example") from None
    except (tomllib.TOMLDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise error_class(f"{path} is not valid {'TOML' if path.suffix == '.toml' else 'YAML'}: {error}") from None
    if not isinstance(content, dict):
        raise error_class(f"{path} holds a {type(content).__name__}, not a mapping of fields; see `nearline init`")
    return content


def _without_none(value: Any) -> Any:
    """A section whose lines are all commented out reads as None: it means the defaults."""
    if isinstance(value, dict):
        return {k: _without_none(v) for k, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def _with_absolute_paths(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same with paths taken from the experiment file's folder; what is not as it should be stays for the model."""
    content = dict(content)
    if isinstance(recipes := content.get("recipes"), dict):
        content["recipes"] = {k: str(folder / v) if isinstance(v, str) else v for k, v in recipes.items()}
    if isinstance(samples := content.get("samples"), list | tuple):
        content["samples"] = [with_cell_file(s, folder) if isinstance(s, dict) else s for s in samples]
    if not isinstance(deployment := content.get("deployment") or {}, dict):
        return content
    deployment = {"root": "nearline-data"} | deployment
    if isinstance(root := deployment["root"], str) and "://" not in root:
        deployment["root"] = str(folder / Path(root).expanduser())
    if isinstance(prefect := deployment.get("prefect"), dict) and isinstance(home := prefect.get("home"), str):
        deployment["prefect"] = prefect | {"home": str(folder / Path(home).expanduser())}
    if isinstance(paths := deployment.get("python_path"), list | tuple):
        deployment["python_path"] = [str(folder / p) if isinstance(p, str) else p for p in paths]
    return content | {"deployment": deployment}


def with_cell_file(sample: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A sample whose cell, if it is a file beside the experiment file, is named by its full path."""
    cell = sample.get("cell")
    return sample | {"cell": str(folder / cell)} if isinstance(cell, str) and (folder / cell).is_file() else sample


def _import_from(folders: tuple[str, ...]) -> None:
    """Let users' own steps be found."""
    sys.path[:0] = [folder for folder in folders if folder not in sys.path]


def _in_words(error: ValidationError, content: dict[str, Any]) -> str:
    return "; ".join(_problem(dict(e), content) for e in error.errors())


def _problem(error: dict[str, Any], content: dict[str, Any]) -> str:
    place, kind, value = error["loc"], error["type"], error.get("input")
    field = ".".join(map(str, place)) or "the file"
    if kind == "extra_forbidden":
        known = ", ".join(_fields_at(place[:-1]))
        return f"{field}: there is no such field; there are {known}"
    if kind == "missing":
        return f"{field}: missing; add it"
    return field_problem(field, str(error["msg"]), value)


def _fields_at(place: tuple[Any, ...]) -> list[str]:
    """Names of the fields of the model at a place in the file."""
    schema = Experiment.model_json_schema()
    found = schema
    for part in place:
        found = found["items"] if isinstance(part, int) else found.get("properties", {}).get(part, {})
        options = [found, *found.get("anyOf", ()), *found.get("allOf", ())]
        references = [o["$ref"].rpartition("/")[2] for o in options if "$ref" in o]
        if references:
            found = schema["$defs"][references[0]]
    return list(found.get("properties", {}))
