"""The Prefect flow that keeps of a run what is wanted: `flows.veto_frames`, one step each time it runs."""

from typing import Any

from prefect import flow

from flows.veto_frames import VetoRequest, next_step

__all__ = ["retain_run"]


@flow(name="retain-run", flow_run_name="retain {run}", persist_result=False)
def retain_run(
    run: str,
    processing: str | None = None,
    condition: str = "results.hit",
    keep_fraction: float = 0.01,
    grace: str = "7d",
    by: str = "the flow retain-run",
    why: str = "",
    despite_processing: bool = False,
    service: str | None = None,
    root: str | None = None,
) -> dict[str, Any]:
    """Mark the non-hits of an ended run to be vetoed, or carry that out once its grace time is over.

    Parameters
    ----------
    run : experiment/number, or the path of a run folder.
    processing : whose results decide, such as p1; needed to mark.
    condition : of the frames that stay.
    keep_fraction : of the others, kept as a random control sample.
    grace : how long it can be undone, such as 7d or 12h.
    """
    request = VetoRequest(
        run=run, processing=processing, condition=condition, keep_fraction=keep_fraction, grace=grace, by=by, why=why,
        despite_processing=despite_processing, service=service, root=root,
    )  # fmt: skip
    step = next_step(request)
    facts = step.plan.model_dump(mode="json", exclude={"chunks", "control"})
    return facts | {"stage": step.stage, "n_control": len(step.plan.control)}
