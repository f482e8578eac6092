"""An experiment file: all that a beamline says once about an experiment, as one typed YAML.

Who it is, which detectors are listened to, which samples there are and which runs show them, how
frames are analysed, when there is enough, what is kept, and where all of it runs. Relative paths
in it are relative to its own folder. Nothing here knows Prefect: the service, the checks and a
notebook read the same file.
"""

import re
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BeforeValidator, Field, PrivateAttr, ValidationError, field_validator, model_validator

from flows.criteria import read_criteria
from flows.execution import Execution
from storage.errors import BadExperiment, BadRecipe
from storage.models import Model
from storage.names import check_name, parse_run_key
from storage.retention import RetentionPolicy, parse_age
from streaming.service import DEFAULT_ADDRESS, DEFAULT_DETECTOR, ServiceSettings, SourceSettings
from tasks.recipe import Recipe, crystallography, load_recipe

__all__ = [
    "EXAMPLE",
    "RECIPE_PREFIX",
    "DataSource",
    "Deployment",
    "Execution",
    "Experiment",
    "Exports",
    "Pool",
    "Pools",
    "PrefectServer",
    "Retention",
    "Sample",
    "ServicePlace",
    "all_recipes",
    "load_experiment",
    "parse_ranges",
    "recipe_for",
    "recipe_of_run",
    "resolve_recipe",
    "retention_policy",
    "sample_for",
    "serve_arguments",
    "service_settings",
    "stop_for",
]

# The commented file that `nearline init` writes.
EXAMPLE = Path(__file__).with_name("experiment_example.yaml")
# A recipe parameter that begins with this names an experiment file; the run's sample chooses the recipe in it.
RECIPE_PREFIX = "experiment:"

_RANGE = re.compile(r"(\d+)(?:\s*(-)\s*(\d+)?)?")
_TCP = r"^tcp://[^\s/:]+:\d{1,5}$"


def _name(what: str) -> BeforeValidator:
    return BeforeValidator(lambda value: check_name(value, what))


class DataSource(Model):
    """A detector whose frames the service takes."""

    name: Annotated[str, _name("data source")] = Field(
        "eiger", description="name of the data source in every run, e.g. eiger"
    )
    kind: Literal["dectris-stream-2"] = Field(
        "dectris-stream-2", description="protocol that the detector speaks: DECTRIS stream v2 (CBOR)"
    )
    endpoint: str = Field(
        DEFAULT_DETECTOR, pattern=_TCP, description="where the detector's stream is bound, tcp://HOST:PORT"
    )
    persistence: Literal["stored", "online"] = Field(
        "stored", description="online: frames stay in memory only, until newer ones need the room"
    )


class Sample(Model):
    """What is in the beam, and which runs show it."""

    name: Annotated[str, _name("sample")] = Field(
        description="as runs name it (`nearline start-run --sample`); letters, digits and . _ - @ +"
    )
    cell: tuple[float, float, float, float, float, float] | str | None = Field(
        None,
        description="a, b, c in Å and alpha, beta, gamma in degrees, or a .cell, PDB, mmCIF or MTZ file; "
        "replaces the cell of the recipe",
    )
    space_group: str | None = Field(None, description="Hermann-Mauguin name, e.g. P 43 21 2; needed with six numbers")
    recipe: str | None = Field(None, description="name of one of the recipes; by default default_recipe")
    runs: str = Field(
        "", description="numbers of runs that show it where they do not name their sample, e.g. 1-20, 25, 30-"
    )
    stop: tuple[str, ...] | None = Field(None, description="stop criteria of this sample's runs, in place of stop")

    @field_validator("runs", mode="before")
    @classmethod
    def _readable_runs(cls, value: Any) -> str:
        text = str(value)
        parse_ranges(text)
        return text

    @field_validator("stop")
    @classmethod
    def _stop_is_text(cls, values: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if values is None else _criteria(values)

    @model_validator(mode="after")
    def _cell_has_symmetry(self) -> Self:
        if isinstance(self.cell, tuple) and not self.space_group:
            raise ValueError("six numbers say nothing of the symmetry; add space_group, e.g. P 43 21 2 (P 1 for none)")
        if self.space_group and self.cell is None:
            raise ValueError("a space_group without a cell; add cell, or leave both to the recipe")
        return self


class Exports(Model):
    """Files written beside the tables; replaces what the recipes say."""

    nexus: Literal["all", "hits", "none"] | None = Field(None, description="frames in the NXmx file of each run")
    crystfel: bool | None = Field(None, description="whether a CrystFEL .stream is written")
    frames_per_file: int | None = Field(
        None, gt=0, description="of `export-nexus`: a master and data files of so many frames; by default one file"
    )


class Retention(Model):
    """What is kept, and how long; nothing is removed unless this says so."""

    older_than: str | None = Field(None, description="runs that ended so long ago may go: 30d, 12h, 6w")
    keep_last: int = Field(0, ge=0, description="number of newest runs that stay, whatever their age")
    only_uploaded: bool = Field(False, description="only runs of which a whole copy was uploaded may go")
    veto_non_hits: str | None = Field(
        None, description="frames that are no hits may go so long after the run's end (grace time): 2d, 12h"
    )

    @field_validator("older_than", "veto_non_hits")
    @classmethod
    def _readable_age(cls, value: str | None) -> str | None:
        if value is not None:
            parse_age(value)
        return value


class ServicePlace(Model):
    """How the streaming service of this experiment is started, and where it is found."""

    address: str = Field(DEFAULT_ADDRESS, pattern=_TCP, description="where clients and flows find it, tcp://HOST:PORT")
    bind: str | None = Field(None, description="where it listens, if not at its address, e.g. tcp://0.0.0.0:5600")
    http_port: int | None = Field(
        None, ge=1, le=65535, description="also serve /health, /metrics and /runs on this port of loopback"
    )
    buffer_gib: float = Field(0.5, gt=0, description="memory for frames, GiB")
    gap_timeout_s: float = Field(2.0, gt=0, description="wait for a missing frame index, s")
    idle_timeout_s: float = Field(60.0, gt=0, description="end a run as aborted after so long without a message, s")
    catalog_url: str | None = Field(
        None, description="SQLAlchemy URL of the catalog; SQLite in the data folder if left out"
    )
    upload_to: str | None = Field(None, description="URL that every sealed chunk is sent to, e.g. s3://bucket/prefix")
    wants_tokens: bool = Field(False, description="let in only who shows a token of `nearline token create`")
    encrypts: bool = Field(False, description="speak CURVE: clients need the key of `nearline token key`")
    allows_insecure: bool = Field(False, description="listen beyond loopback even without tokens or encryption")


class PrefectServer(Model):
    """Where the Prefect server is."""

    api: str | None = Field(
        None,
        pattern=r"^https?://\S+$",
        description="address of its API; by default PREFECT_API_URL, or the server on this machine at port",
    )
    port: int = Field(4200, ge=1, le=65535, description="port of the server that `nearline up` starts on this machine")
    home: str | None = Field(
        None, description="folder of that server's database and settings; by default Prefect's own"
    )
    database_url: str | None = Field(
        None,
        pattern=r"^(postgresql\+asyncpg|sqlite\+aiosqlite)://",
        description="database of that server, e.g. postgresql+asyncpg://prefect@127.0.0.1/prefect; by default SQLite "
        "in its home",
    )


class Pool(Model):
    """A work pool; experiments that name the same one share it."""

    name: Annotated[str, _name("work pool")] = Field(description="name of the work pool in Prefect")
    concurrency_limit: int | None = Field(
        None, ge=0, description="flow runs at a time over all its workers; empty for no limit"
    )


class Pools(Model):
    """Three, so that reprocessing and exports never starve live work; each has workers of its own."""

    live: Pool = Field(Pool(name="live", concurrency_limit=2), description="analysis of runs as they are taken")
    reprocess: Pool = Field(
        Pool(name="reprocess", concurrency_limit=1), description="analysis of past runs, merging, retention"
    )
    export: Pool = Field(Pool(name="export", concurrency_limit=1), description="files written for elsewhere")

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [self.live.name, self.reprocess.name, self.export.name]
        if len(set(names)) < len(names):
            raise ValueError(f"work pools {names} are not three; name each differently: live work shares no pool")
        return self


class Deployment(Model):
    """Where all of it runs."""

    root: str = Field("nearline-data", description="data folder; runs are <root>/<experiment>/<run>/")
    service: ServicePlace = Field(ServicePlace(), description="the streaming service")
    prefect: PrefectServer = Field(PrefectServer(), description="the Prefect server")
    pools: Pools = Field(Pools(), description="work pools")
    execution: Execution | None = Field(None, description="where chunks are analysed; default one after the other")
    n_threads: int | None = Field(None, gt=0, description="threads over the frames of a chunk; default one per core")
    python_path: tuple[str, ...] = Field((), description="folders with your own steps (package:function)")
    environment: dict[str, str] = Field(
        default_factory=dict, description="environment variables of flow runs, e.g. OMP_NUM_THREADS"
    )


class Experiment(Model):
    """All of an experiment file."""

    experiment: Annotated[str, _name("experiment")] = Field(
        description="name: proposal, visit or beamtime; letters, digits and . _ - @ +"
    )
    beamline: Annotated[str, _name("beamline")] = Field(description="name of the beamline, e.g. I24")
    title: str = Field("", description="what it is about, for people")
    contact: str = Field("", description="whom to ask: name, mail or telephone")
    data_sources: tuple[DataSource, ...] = Field((DataSource(),), min_length=1, description="detectors to listen to")
    samples: tuple[Sample, ...] = Field((), description="what is in the beam")
    default_sample: str | None = Field(
        None, description="sample of runs that neither name one nor are in its runs; by default the only one"
    )
    recipes: dict[str, str | dict[str, Any]] = Field(
        default_factory=dict,
        description="by name: the path of a YAML or TOML file, or the recipe itself; none: the crystallography preset",
    )
    default_recipe: str | None = Field(None, description="recipe of samples that name none; by default the only one")
    exports: Exports = Field(Exports(), description="files written beside the tables")
    stop: tuple[str, ...] = Field(
        (), description="when a run has enough, e.g. n_indexed >= 1000; judged after each chunk, told as an event"
    )
    retention: Retention = Field(Retention(), description="what is kept, and how long")
    deployment: Deployment = Field(Deployment(), description="where all of it runs")

    _file: Path | None = PrivateAttr(None)

    @field_validator("stop")
    @classmethod
    def _stop_is_text(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        return _criteria(values)

    @field_validator("data_sources")
    @classmethod
    def _sources_differ(cls, values: tuple[DataSource, ...]) -> tuple[DataSource, ...]:
        _all_different([source.name for source in values], "data sources")
        _all_different([source.endpoint for source in values], "endpoints")
        return values

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        names = [sample.name for sample in self.samples]
        _all_different(names, "samples")
        _known(self.default_sample, names, "default_sample", "samples")
        _known(self.default_recipe, list(self.recipes), "default_recipe", "recipes")
        for sample in self.samples:
            _known(sample.recipe, list(self.recipes), f"recipe of sample {sample.name}", "recipes")
        _runs_are_disjoint(self.samples)
        each_has_one = self.samples and all(s.recipe for s in self.samples)
        if len(self.recipes) > 1 and self.default_recipe is None and not each_has_one:
            raise ValueError(f"which of {', '.join(self.recipes)} is the default? add default_recipe")
        return self

    @property
    def file(self) -> Path | None:
        """The file that it was read from."""
        return self._file

    @property
    def root(self) -> Path:
        """The data folder."""
        return Path(self.deployment.root)


# ---- reading ------------------------------------------------------------------------------------


def load_experiment(path: str | Path) -> Experiment:
    """The experiment of a YAML or TOML file, with its paths made absolute.

    Raises
    ------
    BadExperiment : no such file, not YAML, or not an experiment; the message names the file and, for
        each problem, the field, its value and what would do.
    """
    path = Path(path).absolute()
    content = {k: v if k == "recipes" else _without_none(v) for k, v in _read_mapping(path).items() if v is not None}
    try:
        experiment = Experiment.model_validate(_with_absolute_paths(content, path.parent))
    except ValidationError as error:
        raise BadExperiment(f"{path}: {_in_words(error, content)}") from None
    experiment._file = path
    _import_from(experiment.deployment.python_path)
    return experiment


def parse_ranges(text: str) -> list[range]:
    """Run numbers such as ``1-20, 25, 30-`` (both ends belong to it) as half-open ranges.

    Raises
    ------
    ValueError : something else than numbers and ranges.
    """
    found = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        match = _RANGE.fullmatch(part)
        if not match:
            raise ValueError(f"{part!r} is not a run number or range; write them like 1-20, 25, 30-")
        start, is_range, last = int(match[1]), match[2], match[3]
        stop = (int(last) + 1 if last else 10**9 + 1) if is_range else start + 1
        if stop <= start:
            raise ValueError(f"{part!r} ends before it begins; write the smaller number first")
        found.append(range(start, stop))
    return found


def _read_mapping(path: Path, error_class: type[Exception] = BadExperiment) -> dict[str, Any]:
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
        content["samples"] = [_with_cell_file(s, folder) if isinstance(s, dict) else s for s in samples]
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


def _with_cell_file(sample: dict[str, Any], folder: Path) -> dict[str, Any]:
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
    message = str(error["msg"]).removeprefix("Value error, ")
    shown = repr(value)
    is_told = not place or isinstance(value, dict) or len(shown) > 80 or shown in message
    return f"{field}: {message}" if is_told else f"{field} is {shown}: {message}"


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


def _criteria(values: tuple[str, ...]) -> tuple[str, ...]:
    values = tuple(value.strip() for value in values)
    if not all(values):
        raise ValueError("an empty stop criterion; write one like n_indexed >= 1000, or leave it out")
    read_criteria(values)
    return values


def _all_different(names: list[str], what: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{what} {', '.join(twice)} appear twice; each needs its own")


def _known(name: str | None, names: list[str], field: str, what: str) -> None:
    if name is not None and name not in names:
        raise ValueError(f"{field} is {name!r}, but {what} has {', '.join(names) or 'none'}; name one of them")


def _runs_are_disjoint(samples: tuple[Sample, ...]) -> None:
    taken: list[tuple[range, str]] = []
    for sample in samples:
        for mine in parse_ranges(sample.runs):
            for other, name in taken:
                if (both := max(mine.start, other.start)) < min(mine.stop, other.stop):
                    raise ValueError(f"run {both} belongs to {name} and to {sample.name}; correct their runs")
            taken.append((mine, sample.name))


# ---- what holds for a run -----------------------------------------------------------------------


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
        content, folder = _read_mapping(path, BadRecipe), path.parent
    else:
        content, folder = dict(source), experiment.file.parent if experiment.file else Path()
    content.setdefault("name", name)
    if isinstance(content.get("mask"), str):
        content["mask"] = str(folder / content["mask"])
    detector = content.get("detector")
    if isinstance(detector, dict) and isinstance(detector.get("geometry"), str):
        content["detector"] = detector | {"geometry": str(folder / detector["geometry"])}
    if isinstance(content.get("sample"), dict):
        content["sample"] = _with_cell_file(content["sample"], folder)
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


# ---- what the parts are started with ------------------------------------------------------------


def service_settings(experiment: Experiment) -> ServiceSettings:
    """The settings of the streaming service that takes this experiment."""
    place = experiment.deployment.service
    same = (
        "gap_timeout_s",
        "idle_timeout_s",
        "catalog_url",
        "upload_to",
        "wants_tokens",
        "encrypts",
        "allows_insecure",
    )
    return ServiceSettings(
        root=experiment.root,
        bind=place.bind or place.address,
        experiment=experiment.experiment,
        sources=tuple(
            SourceSettings(name=s.name, endpoint=s.endpoint, persistence=s.persistence) for s in experiment.data_sources
        ),
        buffer_bytes=int(place.buffer_gib * (1 << 30)),
        **{name: getattr(place, name) for name in same},
    )


def serve_arguments(experiment: Experiment) -> list[str]:
    """The same as arguments of ``nearline serve``."""
    place = experiment.deployment.service
    arguments = ["--root", str(experiment.root), "--bind", place.bind or place.address]
    arguments += ["--experiment", experiment.experiment, "--buffer", f"{place.buffer_gib:g}"]
    arguments += ["--gap-timeout", f"{place.gap_timeout_s:g}", "--idle-timeout", f"{place.idle_timeout_s:g}"]
    for source in experiment.data_sources:
        arguments += ["--source", f"{source.name}={source.endpoint}"]
        arguments += ["--online", source.name] if source.persistence == "online" else []
    options = {"--catalog": place.catalog_url, "--upload-to": place.upload_to, "--http": place.http_port}
    arguments += [str(word) for pair in options.items() if pair[1] is not None for word in pair]
    flags = {"--tokens": place.wants_tokens, "--encrypt": place.encrypts, "--insecure": place.allows_insecure}
    return arguments + [flag for flag, wanted in flags.items() if wanted]


def retention_policy(experiment: Experiment) -> RetentionPolicy | None:
    """The rule by which whole runs of the experiment may go; None where the file lets none go."""
    rule = experiment.retention
    if rule.older_than is None:
        return None
    return RetentionPolicy(
        older_than=parse_age(rule.older_than),
        keep_last=rule.keep_last,
        only_uploaded=rule.only_uploaded,
        experiment=experiment.experiment,
    )
