"""The Prefect flow that processes many runs again, each as a flow run of `process_run`, here or by a worker."""

from dataclasses import asdict
from typing import Annotated, Any, Literal

from prefect import flow, runtime, tags

from flows.deployed import find_deployment, processing_of, start_deployed, wait_for_flow_run
from flows.giving_way import give_way
from flows.markdown_page import MarkdownPage
from flows.parameters import DataSource, RecipeParameter, Root, ServiceAddress, Threads, described
from flows.process_run import process_run
from flows.reprocessing import Place, ProcessOne, RunOutcome, reprocess
from flows.run_choice import ChosenRuns, choose_runs
from storage.errors import RunsFailed
from storage.names import parse_run_key
from tasks.recipe import Recipe, load_recipe

__all__ = ["outcome_table", "reprocess_runs"]

Runs = Annotated[
    list[str],
    described(
        "Runs",
        "Runs (lyso-2026/3), ranges with both ends (lyso-2026/3-9), whole experiments (lyso-2026/*)",
        examples=[["lyso-2026/3-9"]],
    ),
]
Where = Annotated[
    str | None,
    described(
        "Condition",
        "SQL condition over runs: experiment, run, state, sample, started_at, n_frames, hit_rate, indexing_rate …; "
        "of the runs above, or of all there are if none is named",
        examples=["sample = 'lysozyme' AND indexing_rate < 0.3"],
    ),
]
How = Annotated[
    Literal["subflows", "deployments"],
    described(
        "How",
        "subflows: in this worker. deployments: each run by a worker of its own, through "
        "process-run/<experiment>-again, else process-run/<experiment>",
    ),
]
Parallel = Annotated[int, described("Runs at a time", "So many runs are processed at a time", ge=1, le=64)]
Again = Annotated[
    bool, described("Again", "Process also runs that have a finished processing with this very recipe and code")
]


def _flow_run_name() -> str:
    given = runtime.flow_run.parameters
    words = [*(given.get("runs") or []), *([f"where {given['where']}"] if given.get("where") else [])]
    return f"reprocess {', '.join(words)}"[:200]


@flow(name="reprocess-runs", flow_run_name=_flow_run_name, persist_result=False, validate_parameters=True)
def reprocess_runs(
    runs: Runs,
    recipe: RecipeParameter,
    where: Where = None,
    parallel: Parallel = 1,
    how: How = "subflows",
    again: Again = False,
    data_source: DataSource = None,
    service: ServiceAddress = None,
    root: Root = None,
    n_threads: Threads = None,
) -> dict[str, Any]:
    """Process finished runs again with another recipe; only the steps that change are computed, old results stay.

    The summary says for each run what came out and how many chunks of each step were reused and computed. If runs
    failed, the others are done all the same, and the flow ends as failed and names them.
    """
    give_way()
    loaded = load_recipe(recipe)
    chosen = choose_runs(runs, where, service=service, root=root)
    place = Place(service, root, data_source)
    start = _as_subflow if how == "subflows" else _through_deployment
    page = _Page(loaded, chosen)
    summary = reprocess(
        chosen, loaded, start(loaded, place, n_threads), place=place, parallel=parallel, again=again, reporter=page
    )
    page.finish(summary)
    if summary["failed"]:
        why = "; ".join(f"{run}: {error}" for run, error in summary["failed"].items())
        raise RunsFailed(f"{summary['n_failed']} of {summary['n_runs']} runs failed: {why}", summary)
    return summary


def outcome_table(outcomes: list[dict[str, Any]]) -> str:
    """What became of each run, as a Markdown table."""
    rows = [f"| {' | '.join(_cells(one))} |" for one in outcomes]
    head = "| run | state | processing | frames | hits of frames | indexed of hits | chunks computed | s | why |"
    return "\n".join([head, "|---|---|---|---|---|---|---|---|---|", *rows])


def _cells(one: dict[str, Any]) -> list[str]:
    rates = [f"{100 * one[name]:.1f} %" for name in ("hit_rate", "indexing_rate")]
    why = (one["error"] or "").replace("|", "/").replace("\n", " ")
    known = [one["run"], one["state"], one["processing"] or "", str(one["frames"])]
    return [*known, *rates, _steps_in_words(one["steps"]), f"{one['seconds']:.1f}", why]


def _steps_in_words(steps: dict[str, dict[str, int]]) -> str:
    return ", ".join(f"{name} {n['computed']} of {n['computed'] + n['reused']}" for name, n in steps.items())


def _as_subflow(recipe: Recipe, place: Place, n_threads: int | None) -> ProcessOne:
    mine = list(runtime.flow_run.tags or [])

    def process_one(run: str) -> dict[str, Any]:
        with tags(*mine):  # a flow run within another has none of its tags by itself
            summary: dict[str, Any] = process_run(**_parameters(run, recipe, place, n_threads))
        return summary

    return process_one


def _through_deployment(recipe: Recipe, place: Place, n_threads: int | None) -> ProcessOne:
    def process_one(run: str) -> dict[str, Any]:
        experiment, _ = parse_run_key(run)
        deployment = find_deployment([f"process-run/{experiment}-again", f"process-run/{experiment}"])
        started = start_deployed(deployment, _parameters(run, recipe, place, n_threads))
        wait_for_flow_run(started)
        processing = processing_of(run, started.flow_run_id, service=place.service, root=place.root)
        return (processing.summary or {}) | {"processing": processing.name}

    return process_one


def _parameters(run: str, recipe: Recipe, place: Place, n_threads: int | None) -> dict[str, Any]:
    given = {
        "data_source": place.data_source,
        "service": place.service,
        "root": place.root,
        "n_threads": n_threads,
    }
    content = recipe.model_dump(mode="json")
    return {"run": run, "recipe": content} | {name: value for name, value in given.items() if value is not None}


class _Page:
    """How far it is, on the flow run's page: one artifact, brought up to date after each run."""

    def __init__(self, recipe: Recipe, chosen: ChosenRuns) -> None:
        self._recipe, self._chosen = recipe, chosen
        self._done: list[dict[str, Any]] = []
        self._page = MarkdownPage(f"reprocess-{recipe.name}-{recipe.digest[:8]}", "what became of each run")
        self._page.show(self._text())

    def began(self, run: str) -> None:
        pass

    def ended(self, outcome: RunOutcome, n_done: int, n_runs: int) -> None:
        self._done.append(asdict(outcome))
        self._page.show(self._text())

    def finish(self, summary: dict[str, Any]) -> None:
        self._done = summary["runs"]
        self._page.show(self._text(), is_last=True)

    def _text(self) -> str:
        left_out = [f"* {run} is left out: {why}" for run, why in self._chosen.left_out.items()]
        head = f"# {len(self._done)} of {len(self._chosen.names)} runs with recipe {self._recipe.name}"
        return "\n".join([head, "", outcome_table(self._done), "", *left_out])
