"""Let Bluesky say where a run begins and ends: subscribe this to a RunEngine.

All detector series between the engine's ``start`` and ``stop`` documents become one Nearline run,
and the start document's metadata goes with it. Shown here with a plan that only waits; at a
beamline the plan moves motors and triggers the detector.
"""

import os
from typing import Any

from bluesky import RunEngine, plan_stubs, preprocessors

from streaming.control import start_run, stop_run


class NearlineRuns:
    """A Bluesky callback; ``runs`` maps the engine's uid to the number of the Nearline run."""

    def __init__(self, experiment: str, service: str) -> None:
        self.experiment, self.service = experiment, service
        self.runs: dict[str, int] = {}

    def __call__(self, name: str, document: dict[str, Any]) -> None:
        if name == "start":
            metadata = {key: value for key, value in document.items() if isinstance(value, str | int | float | bool)}
            self.runs[document["uid"]] = start_run(
                self.experiment, service=self.service, sample=document.get("sample"), user_data={"bluesky": metadata}
            )
        elif name == "stop":
            went_well = document["exit_status"] == "success"
            stop_run(
                self.experiment,
                self.runs[document["run_start"]],
                service=self.service,
                aborted=None if went_well else f"the plan ended with {document['exit_status']}",
            )


def main() -> None:
    service = os.environ.get("NEARLINE_SERVICE", "tcp://127.0.0.1:5600")
    engine, runs = RunEngine(), NearlineRuns("lyso-2026", service)
    engine.subscribe(runs)

    @preprocessors.run_decorator(md={"sample": "lysozyme", "temperature": 100.0})
    def plan() -> Any:
        yield from plan_stubs.sleep(0.5)

    engine(plan())
    print("Nearline runs:", sorted(runs.runs.values()))


if __name__ == "__main__":
    main()
