"""An experiment file: all that a beamline says once about an experiment, as one typed YAML.

Who it is, which detectors are listened to, which samples there are and which runs show them, how
frames are analysed, when there is enough, what is kept, and where all of it runs. Relative paths
in it are relative to its own folder. Nothing here knows Prefect: the service, the checks and a
notebook read the same file.

`model` has its fields, `reading` makes them of a file, `recipes` says what holds for a run, `starting` what the parts
are started with.
"""

from pathlib import Path

from flows.execution import Execution
from flows.experiment.model import (
    DataSource,
    Deployment,
    Experiment,
    Exports,
    Pool,
    Pools,
    PrefectServer,
    Retention,
    Sample,
    ServicePlace,
    parse_ranges,
)
from flows.experiment.reading import load_experiment
from flows.experiment.recipes import (
    RECIPE_PREFIX,
    all_recipes,
    recipe_for,
    recipe_of_run,
    resolve_recipe,
    sample_for,
    stop_for,
)
from flows.experiment.starting import retention_policy, serve_arguments, service_settings

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
EXAMPLE = Path(__file__).with_name("example.yaml")
