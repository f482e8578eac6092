"""What an experiment file holds, as frozen models: every field with its unit, default and meaning."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PrivateAttr, field_validator, model_validator

from flows.criteria import read_criteria
from flows.execution import Execution
from storage.models import Model
from storage.names import check_name
from storage.retention import parse_age
from streaming.service import DEFAULT_ADDRESS, DEFAULT_DETECTOR

__all__ = [
    "DataSource",
    "Deployment",
    "Experiment",
    "Exports",
    "Pool",
    "Pools",
    "PrefectServer",
    "Retention",
    "Sample",
    "ServicePlace",
    "parse_ranges",
]

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
