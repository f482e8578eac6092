"""What a step of a recipe is: a pure function of a chunk, with parameters, and the code it is known by."""

import functools
import hashlib
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from types import ModuleType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from storage.step_store import Tables
from tasks.chunk_frames import ChunkFrames
from tasks.engines import Engine
from tasks.unit_cell import UnitCell

__all__ = ["FrameWork", "Step", "Upstream", "library_versions", "source_digest"]

# The tables of the steps before, by their names in the recipe.
Upstream = Mapping[str, Tables]


@dataclass(frozen=True)
class FrameWork:
    """What a step does that looks at each frame by itself.

    each : of a position in the chunk, from any thread. gather : of all that ``each`` returned, in order, the tables.
    """

    each: Callable[[int], Any]
    gather: Callable[[list[Any]], Tables]


@dataclass(frozen=True)
class Step:
    """One step, ours or a user's.

    run : (chunk, params, cell, upstream) → tables. kernels : all modules whose source is part of
    the step's identity; it is read at once. frame_work : (chunk, params) → the same, for steps that want nothing but
    the frames; neighbours of this kind are carried out together, frame by frame.
    engine : the program of others that does the work; so is its version. libraries : versions that are part of the
    identity beside those of ours.
    """

    params: type
    run: Callable[[ChunkFrames, Any, UnitCell | None, Upstream], Tables]
    kernels: tuple[ModuleType, ...]
    needs_cell: bool = False
    frame_work: Callable[[ChunkFrames, Any], FrameWork] | None = None
    engine: Engine | None = None
    libraries: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        source_digest(*self.kernels)

    def read_params(self, given: Mapping[str, Any]) -> Any:
        """The step's parameters from what a recipe says; ValueError names what it does not know."""
        known = {field.name for field in fields(self.params)}
        unknown = sorted(set(given) - known)
        if unknown:
            raise ValueError(f"unknown parameter {', '.join(unknown)}; this step knows {', '.join(sorted(known))}")
        for name, value in given.items():
            is_infinite = isinstance(value, float) and not math.isfinite(value)
            if is_infinite and value != getattr(self.params, name, None):
                raise ValueError(f"{name}: {value} is not a usable number")
        try:
            return _reader(self.params).validate_python(dict(given))
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
            raise ValueError(problems) from None

    @property
    def identity(self) -> dict[str, str]:
        """What the code of this step is: source digest and versions of the numeric libraries.

        Raises EngineMissing where the step wants a program that is not on this machine.
        """
        program = {self.engine.name: self.engine.version()} if self.engine is not None else {}
        return {"source": source_digest(*self.kernels), **library_versions(), **self.libraries, **program}

    @property
    def modules(self) -> dict[str, str]:
        """The source digest of each module that is part of its identity."""
        return {module.__name__: source_digest(module) for module in self.kernels}


@functools.cache
def library_versions() -> dict[str, str]:
    """Versions of what computes numbers; read once, which takes ten milliseconds."""
    return {
        "bitshuffle": version("bitshuffle"),
        "numpy": version("numpy"),
        "numba": version("numba"),
        "gemmi": version("gemmi"),
        "scipy": version("scipy"),
    }


def source_digest(*modules: ModuleType) -> str:
    """sha256 over the source text of modules, hex."""
    return hashlib.sha256("".join(_source_of(module) for module in modules).encode()).hexdigest()


@functools.cache
def _reader(params: type) -> TypeAdapter[Any]:
    """Made once: that takes longer than reading the parameters of a chunk."""
    return TypeAdapter(params)


@functools.cache
def _source_of(module: ModuleType) -> str:
    """The text this process runs: read once, early, since the file may be changed under a running worker."""
    return inspect.getsource(module)
