"""Let Bluesky say where a run begins and ends: subscribe this to a RunEngine.

All detector series between the engine's ``start`` and ``stop`` documents become one Nearline run,
and the start document's metadata goes with it. Shown here with a plan that only waits; at a
beamline the plan moves motors and triggers the detector.
"""

from typing import Any

from bluesky import RunEngine, plan_stubs, preprocessors

import nearline


class NearlineRuns:
    """A Bluesky callback; ``runs`` maps the engine's uid to the number of the Nearline run."""

    def __init__(self, experiment: str) -> None:
        self.experiment = experiment
        self.runs: dict[str, int] = {}

    def __call__(self, name: str, document: dict[str, Any]) -> None:
        if name == "start":
            metadata = {key: value for key, value in document.items() if isinstance(value, str | int | float | bool)}
            self.runs[document["uid"]] = nearline.start_run(
                self.experiment, sample=document.get("sample"), user_data={"bluesky": metadata}
            )
        elif name == "stop":
            went_well = document["exit_status"] == "success"
            nearline.stop_run(
                self.experiment,
                self.runs[document["run_start"]],
                aborted=None if went_well else f"the plan ended with {document['exit_status']}",
            )


def main() -> None:
    engine, runs = RunEngine(), NearlineRuns("lyso-2026")
    engine.subscribe(runs)

    @preprocessors.run_decorator(md={"sample": "lysozyme", "temperature": 100.0})
    def plan() -> Any:
        yield from plan_stubs.sleep(0.5)

    engine(plan())
    print("Nearline runs:", sorted(runs.runs.values()))


if __name__ == "__main__":
    main()
