"""The Prefect flow that tries new parameters on the newest frames of a run."""

from typing import Annotated, Any

from prefect import flow, runtime

from flows.canary import try_recipe
from flows.comparison_page import show_comparison
from flows.giving_way import give_way
from flows.parameters import DataSource, RecipeParameter, Root, RunName, ServiceAddress, Threads, described
from streaming.retrieval import open_run
from tasks.recipe import load_recipe

__all__ = ["canary_run"]

Minutes = Annotated[float, described("Minutes", "So much of the newest data is tried, in minutes", gt=0, le=1440)]


@flow(name="canary-run", flow_run_name="canary on {run}", persist_result=False, validate_parameters=True)
def canary_run(
    run: RunName,
    recipe: RecipeParameter,
    minutes: Minutes = 1.0,
    data_source: DataSource = None,
    service: ServiceAddress = None,
    root: Root = None,
    n_threads: Threads = None,
) -> dict[str, Any]:
    """Try a recipe on the newest minute of a run, live or finished, and compare it with the running processing."""
    give_way()
    flow_run = (str(runtime.flow_run.id), str(runtime.flow_run.ui_url))
    opened = open_run(run, service=service, root=root)
    summary, found = try_recipe(
        opened, load_recipe(recipe), minutes, data_source=data_source, n_threads=n_threads, flow_run=flow_run
    )
    if found is not None:
        show_comparison(found)
    return summary
