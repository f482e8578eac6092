"""Parameters that several flows share, as the forms of the Prefect UI show them: a title, a sentence, limits."""

from typing import Annotated, Any

from pydantic import Field

__all__ = [
    "DataSource", "DataSources", "OptionalProcessing", "RecipeParameter", "Root", "RunName", "ServiceAddress",
    "SourceRecipes", "Threads", "described",
]  # fmt: skip


def described(title: str, description: str, **options: Any) -> Any:
    """A parameter's field: title, sentence and limits (``ge``, ``examples`` …) in the form of the UI.

    Prefect overwrites a field's own title and description with the parameter's name and what a Google docstring
    says; only what is extra in the schema stays.
    """
    return Field(json_schema_extra={"title": title, "description": description}, **options)


RunName = Annotated[
    str,
    described("Run", "experiment/number, or the path of a run folder", examples=["lyso-2026/17"], min_length=1),
]
RecipeParameter = Annotated[
    str | dict[str, Any],
    described(
        "Recipe",
        "Path of a recipe file (YAML or TOML) that the worker can read, or the recipe's content",
        examples=["recipes/lysozyme.yaml"],
    ),
]
DataSource = Annotated[str | None, described("Data source", "Which detector; needed only if the run has several")]
DataSources = Annotated[
    str | list[str] | None,
    described(
        "Data source",
        "Which detector; needed only if the run has several. A list, or all, are processed side by side",
        examples=["eiger", ["eiger", "jungfrau"], "all"],
    ),
]
SourceRecipes = Annotated[
    dict[str, RecipeParameter] | None,
    described("Recipes", "Recipes of single data sources, by name; the others get the recipe"),
]
OptionalProcessing = Annotated[
    str | None, described("Processing", "Id of a processing such as p1; empty for the run's default")
]
ServiceAddress = Annotated[
    str | None,
    described(
        "Service",
        "Address of the streaming service; by default the one on the worker's machine, if it runs",
        examples=["tcp://127.0.0.1:5600"],
    ),
]
Root = Annotated[str | None, described("Data folder", "Where runs are looked for when no service answers")]
Threads = Annotated[
    int | None,
    described("Threads", "Threads over the frames of a chunk; by default one per core", ge=1, le=256),
]
