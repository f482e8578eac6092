"""The Prefect flow that keeps of a run what is wanted: `flows.veto_frames`, one step each time it runs."""

from typing import Annotated, Any

from prefect import flow

from flows.giving_way import give_way
from flows.parameters import OptionalProcessing, Root, RunName, ServiceAddress, described
from flows.veto_frames import VetoRequest, next_step

__all__ = ["retain_run"]


Condition = Annotated[str, described("Condition", "Of the frames that stay, as in queries", examples=["results.hit"])]
Fraction = Annotated[
    float, described("Control sample", "Share of the other frames that is kept, drawn at random", ge=0, lt=1)
]
Grace = Annotated[
    str, described("Grace time", "How long it can be undone: a number and min, h, d or w", examples=["7d", "12h"])
]
Who = Annotated[str, described("By", "Who wants it, for the record")]
Why = Annotated[str, described("Why", "The reason, for the record")]
Despite = Annotated[
    bool, described("Despite processing", "Also while another processing of the run is at work, which may then fail")
]


@flow(name="retain-run", flow_run_name="retain {run}", persist_result=False, validate_parameters=True)
def retain_run(
    run: RunName,
    processing: OptionalProcessing = None,
    condition: Condition = "results.hit",
    keep_fraction: Fraction = 0.01,
    grace: Grace = "7d",
    by: Who = "the flow retain-run",
    why: Why = "",
    despite_processing: Despite = False,
    service: ServiceAddress = None,
    root: Root = None,
) -> dict[str, Any]:
    """Mark the non-hits of an ended run to be vetoed, or carry that out once its grace time is over.

    Marking needs the processing whose results decide, such as p1.
    """
    give_way()
    request = VetoRequest(
        run=run, processing=processing, condition=condition, keep_fraction=keep_fraction, grace=grace, by=by, why=why,
        despite_processing=despite_processing, service=service, root=root,
    )  # fmt: skip
    step = next_step(request)
    facts = step.plan.model_dump(mode="json", exclude={"chunks", "control"})
    return facts | {"stage": step.stage, "n_control": len(step.plan.control)}
